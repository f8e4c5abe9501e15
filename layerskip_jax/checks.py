"""Checks of values that a user gives: conditions, and declared types."""

import types
import typing
from typing import Any, Literal

from layerskip_jax.errors import UserError


def require(condition: bool, message: str) -> None:
    """Raise `UserError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise UserError(message)


def check_fields(config: Any) -> None:
    """Bring the fields of a dataclass to their declared types, as `check_type` does."""
    for name, hint in typing.get_type_hints(type(config)).items():
        object.__setattr__(config, name, check_type(getattr(config, name), hint, name))


def check_type(value: Any, hint: Any, name: str) -> Any:
    """Return ``value`` as ``hint`` (int for float and list for tuple are accepted) or raise `UserError`."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        choices = typing.get_args(hint)
        require(value in choices, f"{name} must be one of {', '.join(choices)}, not {value!r}")
        return value
    if origin is tuple:
        require(isinstance(value, list | tuple), f"{name} must be a list, not {value!r}")
        return tuple(check_type(item, typing.get_args(hint)[0], name) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    plain = isinstance(hint, type) and not isinstance(hint, types.GenericAlias)
    fits = plain and isinstance(value, hint) and isinstance(value, bool) == (hint is bool)
    require(fits, f"{name} must be {getattr(hint, '__name__', hint)}, not {value!r}")
    return value
