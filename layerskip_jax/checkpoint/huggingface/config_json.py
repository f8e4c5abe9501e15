"""Conversion between the ``config.json`` of a Llama and `ModelConfig`. Models that compute differently are refused."""

import json
from typing import Any

from etils import epath

from layerskip_jax.config import ModelConfig
from layerskip_jax.errors import UserError
from layerskip_jax.locations import file_inside, read_limited

CONFIG = "config.json"

SHAPES = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "dim",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "intermediate_size": "ffn_dim",
    "vocab_size": "vocab_size",
}
"""Integers in the ``config.json`` of every Llama (older ones lack ``num_key_value_heads``), and their names here."""

SUPPORTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu", "swish", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "sliding_window": (None,),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
    "transformers_weights": (None,),
    "tie_word_embeddings": (True, False, None),
}
"""Keys that change what a model computes, and the values that this project implements (None: absent or null)."""


def read_json(folder: epath.Path, name: str) -> dict[str, Any]:
    """Read a JSON object from a file of a model folder; raises `UserError` for anything else."""
    file = file_inside(folder, name)
    try:
        value = json.loads(read_limited(file))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {file} as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} must be a JSON object, not {_shown(value)}")
    return value


def read_model_config(folder: epath.Path) -> ModelConfig:
    """Return the config of the Llama in ``folder``; raises `UserError` for a model that computes differently.

    Rotary scaling is read from ``rope_scaling`` or from the newer ``rope_parameters``.
    """
    values = read_json(folder, CONFIG)
    try:
        return _model_config(values)
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from error


def _model_config(values: dict[str, Any]) -> ModelConfig:
    _check_supported(values)
    older = {"num_key_value_heads": values.get("num_attention_heads")}
    settings: dict[str, Any] = {name: _whole(values, key, older.get(key)) for key, name in SHAPES.items()}
    head_dim = _whole(values, "head_dim", 0)
    return ModelConfig(
        **settings,
        **_rotary(values),
        head_width=0 if head_dim * settings["num_heads"] == settings["dim"] else head_dim,
        norm_epsilon=_number(values, "rms_norm_eps", 1e-6),
        tied_embedding=bool(values.get("tie_word_embeddings")),
        context_length=_whole(values, "max_position_embeddings", 2048),
    )


def _check_supported(values: dict[str, Any]) -> None:
    for key, supported in SUPPORTED.items():
        given = values.get(key)
        if not any(given == value and isinstance(given, bool) == isinstance(value, bool) for value in supported):
            wanted = " or ".join("absent" if value is None else json.dumps(value) for value in supported)
            raise UserError(f"{key} {_shown(given)} is not supported, it must be {wanted}")


def _shown(value: Any) -> str:
    """Return the start of a value as JSON."""
    try:
        return json.dumps(value)[:60]
    except RecursionError:
        return "a deeply nested value"


def _whole(values: dict[str, Any], key: str, default: int | None = None) -> int:
    value = default if values.get(key) is None else values[key]
    if type(value) is not int or not 0 <= value < 2**31:
        raise UserError(f"{key} must be a whole number below 2^31, not {_shown(value)}")
    return value


def _number(values: dict[str, Any], key: str, default: float | None = None) -> float:
    """Return a number, or ``default`` if it is absent or null: transformers writes null for unset values."""
    value = default if values.get(key) is None else values[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise UserError(f"{key} must be a number, not {_shown(value)}")
    return float(value)


def _rotary(values: dict[str, Any]) -> dict[str, Any]:
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise UserError(f"rotary scaling must be a JSON object, not {_shown(given)}")
    _check_supported(values | {"partial_rotary_factor": given.get("partial_rotary_factor")})
    kind = given.get("rope_type") or given.get("type") or "default"
    settings: dict[str, Any] = {"rope_base": _number(given, "rope_theta", _number(values, "rope_theta", 10_000.0))}
    if kind == "default":
        return settings
    if kind not in ("linear", "llama3"):
        raise UserError(f"rotary scaling {_shown(kind)} is not supported: it must be default, linear or llama3")
    settings |= {"rope_scaling": kind, "rope_factor": _number(given, "factor")}
    if kind == "llama3":
        # transformers prefers the top level, and takes the whole context if no key gives the length.
        length = _whole(given, "original_max_position_embeddings", _whole(values, "max_position_embeddings", 2048))
        settings |= {
            "rope_low_freq_factor": _number(given, "low_freq_factor"),
            "rope_high_freq_factor": _number(given, "high_freq_factor"),
            "rope_original_length": _whole(values, "original_max_position_embeddings", length),
        }
    return settings


def config_json(config: ModelConfig, context_length: int, dtype: str, bos: int | None, eos: int) -> dict[str, Any]:
    """Return the ``config.json`` of an exported model, with keys that both transformers 4 and 5 read."""
    scaling: dict[str, Any] | None = None
    if config.rope_scaling != "none":
        scaling = {"rope_type": config.rope_scaling, "factor": config.rope_factor}
    if scaling and config.rope_scaling == "llama3":
        scaling |= {
            "low_freq_factor": config.rope_low_freq_factor,
            "high_freq_factor": config.rope_high_freq_factor,
            "original_max_position_embeddings": config.rope_original_length,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: getattr(config, name) for key, name in SHAPES.items()},
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_base,
        "rope_scaling": scaling,
        "tie_word_embeddings": config.tied_embedding,
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": context_length,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "torch_dtype": dtype,
    }
