"""Store and read the decoding settings that ``layerskip sweep`` found fastest, next to a model's tokenizer."""

import json
from collections.abc import Collection
from typing import Any

from etils import epath

from layerskip_jax.checkpoint.reading import ModelFolder, open_model_folder
from layerskip_jax.config import Config, DecodeConfig
from layerskip_jax.config_dict import apply_overrides, from_dict
from layerskip_jax.errors import UserError
from layerskip_jax.locations import file_inside, read_limited, write_file

SWEPT = "decode.json"

DEPENDENT = {"mode", "policy", "exit_layer", "draft_length", "lookup_length", "choices", "exits"}
"""Settings that the sweep chose together, so they are used together or not at all."""


def store_swept(path: str | ModelFolder, settings: dict[str, Any], measured: dict[str, Any]) -> epath.Path:
    """Store `DecodeConfig` fields for the model at ``path``, with their measurements; return the file.

    Raises `UserError` if the file is a link out of the folder.
    """
    file = file_inside(open_model_folder(path).model_folder, SWEPT)
    write_file(file, json.dumps({"decode": settings, "measured": measured}, indent=1) + "\n")
    return file


def swept_settings(path: str | ModelFolder, given: Collection[str]) -> dict[str, Any]:
    """Return the stored settings, without those that the user has ``given``.

    If one of `DEPENDENT` is given, all of them are left out. Raises `UserError` for a file that `store_swept` did not
    write.
    """
    file = file_inside(open_model_folder(path).model_folder, SWEPT)
    if not file.exists():
        return {}
    try:
        settings = json.loads(read_limited(file))["decode"]
        known = from_dict(settings, DecodeConfig, "decode.")
    except (OSError, ValueError, KeyError, TypeError, RecursionError, UserError) as error:
        raise UserError(f"{file} is not what layerskip sweep writes ({error}): remove it") from error
    left_out = set(given) | (DEPENDENT if DEPENDENT & set(given) else set())
    return {name: value for name, value in settings.items() if name not in left_out and hasattr(known, name)}


def decode_settings(path: str | ModelFolder, config: Config, given: dict[str, Any] | None = None) -> DecodeConfig:
    """Return how to decode the model at ``path``: ``given`` overrides swept settings, which override ``config``'s.

    Raises `UserError` as `swept_settings` does, and for a setting that is not valid.
    """
    given = given or {}
    return apply_overrides(config.decode_settings, swept_settings(path, given) | given)
