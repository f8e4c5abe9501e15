"""Declare settings, and validate values that users give."""

import contextlib
import dataclasses
import math
import typing
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from layerskip_jax.errors import UserError, nearest

T = TypeVar("T")

EXPECTED = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}
"""Names of the plain types in error messages."""
ANY = "(-inf, inf)"
INT32_MAX, FLOAT32_MAX = 2**31 - 1, 3.4028234663852886e38
"""The largest int32 and the largest float32."""


def require(condition: bool, message: str) -> None:
    """Raise `UserError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise UserError(message)


def require_exits(name: str, exits: Sequence[int], num_layers: int) -> None:
    """Raise `UserError` unless ``exits`` are layers of the model, counted from 1."""
    inside = all(1 <= exit_layer <= num_layers for exit_layer in exits)
    require(inside, f"{name} {' '.join(map(str, exits))} must be in 1..{num_layers}, the model's layers")


def require_rising(name: str, exits: Sequence[int]) -> None:
    """Raise `UserError` unless ``exits`` are strictly increasing and at least 1."""
    rising = list(exits) == sorted(set(exits)) and min(exits, default=1) >= 1
    require(rising, f"{name} must be strictly increasing and at least 1, got {' '.join(map(str, exits))}")


def require_positive(name: str, value: int) -> None:
    """Raise `UserError` unless ``value`` is a whole number of at least 1."""
    parse_value(int, value, name)
    require(value >= 1, f"{name} must be at least 1, not {value}")


def setting(default: T, doc: str, within: str = "[1, inf)") -> T:
    """Declare a dataclass field with its default and its ``--help`` line, which gives the unit in brackets.

    ``within`` is the interval of a number, or of each number of a tuple.
    """
    return dataclasses.field(default=default, metadata={"doc": doc, "within": within})


def check_fields(config: Any, group: str = "") -> None:
    """Convert the fields of a dataclass to their declared types, see `parse_value`, and check that numbers are within
    their intervals; raises `UserError`, which names the setting ``group.field``.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        name = f"{group}.{field.name}" if group else field.name
        value = parse_value(hints[field.name], getattr(config, field.name), name)
        object.__setattr__(config, field.name, value)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not isinstance(number, bool):
                _check_number(name, number, field.metadata["within"])


def _check_number(name: str, number: float, within: str) -> None:
    low, high = (float(end) for end in within[1:-1].split(","))
    most = high if high < math.inf else INT32_MAX if isinstance(number, int) else FLOAT32_MAX
    above = number >= low if within[0] == "[" else number > low
    below = number <= most if within[-1] == "]" or high == math.inf else number < most
    if above and below:
        return
    if high < math.inf:
        expected = f"in {low:.0f}..{high:.0f}" if isinstance(number, int) else f"in {within}"
    elif isinstance(number, int) and above:
        expected = f"at most {INT32_MAX}"
    elif above or math.isnan(number):
        expected = f"at most {FLOAT32_MAX:g}" if math.isfinite(number) else EXPECTED[float]
    else:
        expected = f"at least {low:g}" if within[0] == "[" else f"more than {low:g}"
    raise UserError(f"{name} must be {expected}, not {number}")


def parse_value(hint: Any, value: Any, name: str = "", *, is_text: bool = False) -> Any:
    """Return ``value`` as a ``hint``: bool, int, float, str, a `Literal` of strings, or ``tuple[item, ...]``.

    ``value`` comes from Python or JSON, where an int may stand for a float and a list for a tuple; with ``is_text`` it
    is a word of the command line. Raises `UserError`, which names the setting ``name``, for any other value.

    >>> parse_value(float, 2), parse_value(int, "2_000", is_text=True), parse_value(tuple[int, ...], [1, 2])
    (2.0, 2000, (1, 2))
    """
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        if value not in arguments:
            raise _wrong(name, f"one of {', '.join(arguments)}", value, nearest(str(value), arguments))
        return value
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise _wrong(name, "a list", value)
        return tuple(parse_value(arguments[0], item, name, is_text=is_text) for item in value)
    result = _from_text(hint, value) if is_text else value
    if hint is float and isinstance(result, int) and not isinstance(result, bool):
        with contextlib.suppress(OverflowError):
            result = float(result)
    if not isinstance(result, hint) or isinstance(result, bool) != (hint is bool):
        raise _wrong(name, EXPECTED[hint], value)
    return result


def _wrong(name: str, expected: str, value: Any, suggestion: str = "") -> UserError:
    return UserError(f"{name} must be {expected}, not {value!r:.60}{suggestion}".lstrip())


def _from_text(hint: type, text: str) -> Any:
    """Return the value that ``text`` stands for, or ``text`` itself where it is not a ``hint``."""
    if hint is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if hint is str:
        return text
    try:
        value = hint(text.replace("_", ""))
    except ValueError:
        return text
    return value if hint is int or math.isfinite(value) else text
