"""Rotary position embeddings (RoFormer, arXiv 2104.09864), and their scaling for long contexts."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layerskip_jax.config import ModelConfig
from layerskip_jax.sharding import target_platform


def rotary_frequencies(config: ModelConfig) -> np.ndarray:
    """``1 / base^(2i/H)`` for i < H/2 (RoFormer, section 3.2.2), scaled as configured [radians per token].

    "linear" divides every frequency by ``rope_factor`` (arXiv 2306.15595). "llama3" (Llama 3.1) looks at how many turns
    a frequency makes in ``rope_original_length`` tokens. It keeps a frequency of at least ``rope_high_freq_factor``
    turns, divides one of at most ``rope_low_freq_factor`` turns, and interpolates between the two.

    At position 4,000, an error of one float32 step is 2e-4 radians. So the host rounds each operation to float32, as
    transformers does; XLA's power is less accurate.
    """
    exponent_H = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequency_H = 1 / np.power(np.float32(config.rope_base), exponent_H, dtype=np.float64).astype(np.float32)
    kept_H = np.full_like(frequency_H, config.rope_scaling == "none")
    if config.rope_scaling == "llama3":
        turns_H = config.rope_original_length / (2 * math.pi / frequency_H)
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        kept_H = np.clip((turns_H - low) / (high - low), 0, 1)
    return (1 - kept_H) * frequency_H / config.rope_factor + kept_H * frequency_H


class RotaryTables(NamedTuple):
    """Positions, and the sines and cosines by which `rotate` turns the H dimensions of a head at each position."""

    index_BT: jax.Array
    sin_BT1H: jax.Array
    """The first half of H has the opposite sign, as eq. 34 needs it."""
    cos_BT1H: jax.Array

    @classmethod
    def at(cls, index_BT: jax.Array, frequency_H: np.ndarray) -> "RotaryTables":
        """Dimensions i and i + H/2 turn by ``index * frequency_i``, for i < H/2."""
        angle_BT1H = index_BT[:, :, None, None].astype(jnp.float32) * frequency_H[None, None, None]
        sin_BT1H, cos_BT1H = jnp.sin(angle_BT1H), jnp.cos(angle_BT1H)
        tables = jnp.concatenate([-sin_BT1H, sin_BT1H], axis=-1), jnp.concatenate([cos_BT1H, cos_BT1H], axis=-1)
        # Without the barrier, XLA fuses the sines into every use, and so recomputes them in each block.
        return cls(index_BT, *jax.lax.optimization_barrier(tables))

    def first(self, count: int) -> "RotaryTables":
        """Return the tables of the first ``count`` positions of each row."""
        return RotaryTables(*(array[:, :count] for array in self))


def rotate(x_BTNH: jax.Array, rotary: RotaryTables) -> jax.Array:
    """Apply rotary positions (RoFormer, eq. 34). Dimension i pairs with i + H/2, as in Llama checkpoints."""
    half = x_BTNH.shape[-1] // 2
    if target_platform() == "tpu":
        # Swap the halves by a matmul: a roll by half a head leaves half of each vector register empty.
        swap_HH = jnp.roll(jnp.eye(2 * half, dtype=x_BTNH.dtype), half, axis=1)
        swapped_BTNH = jnp.matmul(x_BTNH, swap_HH, precision=jax.lax.Precision.HIGHEST)  # exact in float32
    else:
        swapped_BTNH = jnp.roll(x_BTNH, half, axis=-1)
    rotated_BTNH = x_BTNH.astype(jnp.float32) * rotary.cos_BT1H + swapped_BTNH.astype(jnp.float32) * rotary.sin_BT1H
    return rotated_BTNH.astype(x_BTNH.dtype)
