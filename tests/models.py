"""Small random models for tests, and their folders in the format of transformers."""

import json

import jax.numpy as jnp
from etils import epath
from flax import nnx

from layerskip_jax.checkpoint.huggingface.config_json import config_json
from layerskip_jax.checkpoint.huggingface.tokenizer_files import tokenizer_files
from layerskip_jax.checkpoint.huggingface.weights import write_weights
from layerskip_jax.config import ModelConfig
from layerskip_jax.model import Transformer


def tiny_config(**changes) -> ModelConfig:
    values = {"num_layers": 4, "dim": 32, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 48, "vocab_size": 61}
    return ModelConfig(**(values | {"compute_dtype": "float32"} | changes))


def tiny_model(seed: int = 0, **changes) -> Transformer:
    return Transformer(tiny_config(**changes), rngs=nnx.Rngs(seed))


def write_llama(folder, config, arrays, tokenizer=None, dtype="float32"):
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(epath.Path(folder), config, arrays, jnp.dtype(dtype))
    values = config_json(config, config.context_length or 256, dtype, 1, 2)
    (folder / "config.json").write_text(json.dumps(values))
    for name, content in (tokenizer_files(tokenizer) if tokenizer else {}).items():
        (folder / name).write_bytes(content)
    return folder
