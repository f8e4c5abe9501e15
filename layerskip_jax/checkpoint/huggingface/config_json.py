"""Conversion between the ``config.json`` of a Llama and `ModelConfig`. Models that compute differently are refused."""

import json
from typing import Any

from etils import epath

from layerskip_jax.config import ModelConfig
from layerskip_jax.errors import UserError
from layerskip_jax.locations import locate

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
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "sliding_window": (None,),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
}
"""Keys that change what a model computes, and the values that this project implements (None: absent or null)."""


def is_llama_folder(path: str) -> bool:
    """Return whether ``path`` is a folder with a ``config.json``."""
    return (locate(path) / CONFIG).is_file()


def read_json(file: epath.Path) -> dict[str, Any]:
    """Read a JSON object from a file; raises `UserError` for anything else."""
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file} as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} must be a JSON object, not {str(value)[:40]}")
    return value


def read_model_config(folder: epath.Path) -> ModelConfig:
    """Return the config of the Llama in ``folder``; raises `UserError` for a model that computes differently.

    Rotary scaling is read from ``rope_scaling`` or from the newer ``rope_parameters``.
    """
    file = folder / CONFIG
    values = read_json(file)
    for key, supported in SUPPORTED.items():
        if values.get(key) not in supported:
            wanted = " or ".join("absent" if value is None else json.dumps(value) for value in supported)
            raise UserError(f"{file}: {key} {json.dumps(values.get(key))[:60]} is not supported, it must be {wanted}")
    heads = values.get("num_attention_heads")
    shape: dict[str, Any] = {"num_key_value_heads": heads} | {
        key: value for key, value in values.items() if value is not None
    }
    for key in SHAPES:
        if type(shape.get(key)) is not int:
            raise UserError(f"{file}: {key} must be a whole number, not {json.dumps(shape.get(key))}")
    settings: dict[str, Any] = {name: shape[key] for key, name in SHAPES.items()}
    head_dim = int(values.get("head_dim") or 0)
    return ModelConfig(
        **settings,
        **_rotary(file, values),
        head_width=0 if head_dim * settings["num_heads"] == settings["dim"] else head_dim,
        norm_epsilon=_number(file, values, "rms_norm_eps", 1e-6),
        tied_embedding=bool(values.get("tie_word_embeddings", False)),
        context_length=int(_number(file, values, "max_position_embeddings", 2048)),
    )


def _number(file: epath.Path, values: dict[str, Any], key: str, default: float) -> float:
    """Return a number, or ``default`` if it is absent or null: transformers writes null for unset values."""
    value = default if values.get(key) is None else values[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{file}: {key} must be a number, not {json.dumps(value)[:60]}")
    return float(value)


def _rotary(file: epath.Path, values: dict[str, Any]) -> dict[str, Any]:
    given = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise UserError(f"{file}: rotary scaling must be a JSON object, not {json.dumps(given)[:60]}")
    kind = given.get("rope_type") or given.get("type") or "default"
    base = _number(file, given, "rope_theta", _number(file, values, "rope_theta", 10_000.0))
    settings: dict[str, Any] = {"rope_base": base}
    if kind == "default":
        return settings
    keys = {"rope_factor": "factor"}
    if kind == "llama3":
        keys |= {
            "rope_low_freq_factor": "low_freq_factor",
            "rope_high_freq_factor": "high_freq_factor",
            "rope_original_length": "original_max_position_embeddings",
        }
    elif kind != "linear":
        raise UserError(f"{file}: rotary scaling {kind!r} is not supported: it must be default, linear or llama3")
    missing = [key for key in keys.values() if not isinstance(given.get(key), int | float)]
    if missing:
        raise UserError(f"{file}: rotary scaling {kind} needs a number for {', '.join(missing)}")
    settings |= {name: type(getattr(ModelConfig, name))(given[key]) for name, key in keys.items()}
    return settings | {"rope_scaling": kind}


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
