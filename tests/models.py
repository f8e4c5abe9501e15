"""Small random models for tests."""

from flax import nnx

from layerskip_jax.config import ModelConfig
from layerskip_jax.model import Transformer


def tiny_config(**changes) -> ModelConfig:
    values = {"num_layers": 4, "dim": 32, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 48, "vocab_size": 61}
    return ModelConfig(**(values | {"compute_dtype": "float32"} | changes))


def tiny_model(seed: int = 0, **changes) -> Transformer:
    return Transformer(tiny_config(**changes), rngs=nnx.Rngs(seed))
