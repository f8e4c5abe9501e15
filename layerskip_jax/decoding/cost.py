"""The cost model of self-speculation: what a round costs, what speedup its acceptance buys, and how fast memory is.

Decoding a few tokens at a time is bound by memory: a pass costs the bytes of the weights that it reads. Costs here are
in passes of the full model for one token, so 1 is a round of plain decoding.
"""

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from layerskip_jax.config import ModelConfig
from layerskip_jax.model import compute_dtype, parameter_count
from layerskip_jax.sharding import target_platform


class Overhead(NamedTuple):
    """What speculation costs beyond the bytes of the weights, where arithmetic or operations take time.

    As the settings of `DecodeConfig` of the same names, which `python -m layerskip_jax sweep` measures.
    """

    start_cost: float = 0.0
    """c: once in a round that drafts at all, since several positions are verified otherwise than one."""
    width_cost: float = 0.0
    """w: for each drafted token, since it is one more position to verify."""


NO_OVERHEAD = Overhead()


def weight_count(config: ModelConfig) -> int:
    """Return the weights that one token's pass reads: all but the embedding, of which it reads one row."""
    return parameter_count(config) - (0 if config.tied_embedding else config.vocab_size * config.dim)


def weight_bytes(config: ModelConfig, kind: str = "full") -> int:
    """Return the bytes in which the loop reads a weight: the compute type's, or 1 of int8 (`DecodeConfig.weights`).

    XLA:CPU makes int8 weights full ones before the loop.
    """
    return 1 if kind == "int8" and target_platform() != "cpu" else compute_dtype(config).itemsize


def head_share(config: ModelConfig) -> float:
    """Return h: the head's part of the weights that one token's pass through the model reads."""
    return config.vocab_size * config.dim / weight_count(config)


def round_cost(config: ModelConfig, exit_layer: float, drafted: float, overhead: Overhead = NO_OVERHEAD) -> float:
    """``(1-h)(1 + d E/L) + h(1+d) + [d > 0] c + w d``: drafts read E of L blocks and the head, verification all once.

    c and w are 0 where weights' bytes alone count.

    >>> round(round_cost(ModelConfig(num_layers=8, vocab_size=1), exit_layer=2, drafted=4), 2)
    2.0
    """
    h = head_share(config)
    by_bytes = (1 - h) * (1 + drafted * exit_layer / config.num_layers) + h * (1 + drafted)
    return by_bytes + (overhead.start_cost if drafted else 0.0) + overhead.width_cost * drafted


def predicted_speedup(
    config: ModelConfig, exit_layer: float, drafted_per_round: float, tokens_per_round: float
) -> float:
    """``S = tokens / round_cost``: 1 is the speed of plain decoding; below 1 speculation does not pay.

    >>> config = ModelConfig(num_layers=8, vocab_size=1)
    >>> round(predicted_speedup(config, exit_layer=2, drafted_per_round=4, tokens_per_round=4), 2)
    2.0
    """
    return tokens_per_round / round_cost(config, exit_layer, drafted_per_round)


def measured_bandwidth(megabytes: int = 256, repeats: int = 5) -> float:
    """Read so many float32 megabytes by a matrix-vector product; return the best rate [bytes/s] of the default device.

    This is the speed of the memory, if caches are smaller than what is read.
    """
    rows = megabytes * 2**20 // (4 * 4096)
    matrix, vector = jnp.ones((rows, 4096)), jnp.ones(4096)
    product = jax.jit(jnp.matmul)
    product(matrix, vector).block_until_ready()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        product(matrix, vector).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return matrix.nbytes / min(seconds)
