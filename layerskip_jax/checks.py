"""Declaration of settings, and validation of values that users give: conditions, and values of declared types."""

import contextlib
import dataclasses
import math
import typing
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from layerskip_jax.errors import UserError, nearest

T = TypeVar("T")

EXPECTED = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}
"""What error messages call the plain types."""


def require(condition: bool, message: str) -> None:
    """Raise `UserError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise UserError(message)


def require_rising(name: str, exits: Sequence[int]) -> None:
    """Raise `UserError` unless ``exits`` are strictly increasing and at least 1."""
    rising = list(exits) == sorted(set(exits)) and min(exits, default=1) >= 1
    require(rising, f"{name} must be strictly increasing and at least 1, got {' '.join(map(str, exits))}")


def setting(default: T, doc: str) -> T:
    """Declare a dataclass field with its default and its ``--help`` line, which gives the unit in brackets."""
    return dataclasses.field(default=default, metadata={"doc": doc})


def check_fields(config: Any) -> None:
    """Convert the fields of a dataclass to their declared types, see `parse_value`."""
    for name, hint in typing.get_type_hints(type(config)).items():
        object.__setattr__(config, name, parse_value(hint, getattr(config, name), name))


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
