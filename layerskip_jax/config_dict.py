"""Configs as nested dictionaries, which checkpoints store as JSON, and overrides of their settings."""

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from layerskip_jax.checks import parse_value, require
from layerskip_jax.config import Config
from layerskip_jax.errors import UserError, nearest

T = TypeVar("T")

RENAMED = {
    "model.rope_low_turns": "rope_low_freq_factor",
    "model.rope_high_turns": "rope_high_freq_factor",
}
"""Former names of settings in stored configs."""

REMOVED = {"decode.start_cost", "decode.width_cost"}
"""Settings in stored configs that no longer exist."""


def saved_settings(config: Config) -> dict[str, Any]:
    """Return what a checkpoint stores: the config as nested dictionaries for JSON, without `Config.distributed`, which
    describes machines."""
    return {group: settings for group, settings in dataclasses.asdict(config).items() if group != "distributed"}


def changed_settings(config: Config, base: Config | None = None) -> dict[str, tuple[Any, Any]]:
    """Return the values in ``base`` (by default the default config) and in ``config`` of the `saved_settings` that
    differ, by their dotted names."""
    old = saved_settings(base or Config())
    return {
        f"{group}.{name}": (old[group][name], value)
        for group, settings in saved_settings(config).items()
        for name, value in settings.items()
        if value != old[group][name]
    }


def from_dict(values: Mapping[str, Any], kind: type[T], where: str = "") -> T:
    """Rebuild a config from nested dictionaries; raises `UserError` for an unknown name or a wrong type.

    Settings that were renamed since a checkpoint was written keep their values, and removed ones are ignored.
    """
    require(isinstance(values, Mapping), f"{where.removesuffix('.') or 'a config'} must be settings by name")
    hints = typing.get_type_hints(kind)
    known = {field.name for field in dataclasses.fields(typing.cast(Any, kind))}
    arguments: dict[str, Any] = {}
    for stored, value in values.items():
        if f"{where}{stored}" in REMOVED:
            continue
        key = RENAMED.get(f"{where}{stored}", stored)
        if key not in known:
            raise UserError(f"unknown setting {where}{key}{nearest(key, known)}")
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            arguments[key] = from_dict(value, typing.cast(type, hint), f"{where}{key}.")
        else:
            arguments[key] = parse_value(hint, value, f"{where}{key}")
    return kind(**arguments)


def apply_overrides(defaults: T, overrides: dict[str, Any]) -> T:
    """Return ``defaults`` with dotted ``overrides`` applied; the dataclasses check the result.

    Raises `UserError` for an unknown name.
    """
    known = list(_setting_names(defaults))
    for name in overrides.keys() - set(known):
        raise UserError(f"unknown setting {name}{nearest(name, known)}")
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(typing.cast(Any, defaults)):
        value = getattr(defaults, field.name)
        if dataclasses.is_dataclass(value):
            inner = {k.split(".", 1)[1]: v for k, v in overrides.items() if k.startswith(f"{field.name}.")}
            if inner:
                try:
                    changes[field.name] = apply_overrides(value, inner)
                except UserError as error:  # DecodeConfig is also used alone, so its errors name no group
                    if str(error).split()[0] not in _setting_names(value):
                        raise
                    raise UserError(f"{field.name}.{error}") from error
        elif field.name in overrides:
            new = overrides[field.name]
            changes[field.name] = tuple(new) if isinstance(new, list) else new
    return dataclasses.replace(typing.cast(Any, defaults), **changes) if changes else defaults


def _setting_names(config: Any, group: str = "") -> Iterator[str]:
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{group}{field.name}"
        yield from _setting_names(value, f"{name}.") if dataclasses.is_dataclass(value) else [name]
