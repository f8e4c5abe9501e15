"""The cost model of self-speculation: the cost of a round, the speedup for a given acceptance, and memory bandwidth.

A pass over a few tokens is bound by memory bandwidth: its time is the time to read its weights. Costs are in passes of
the full model for one token, so a plain round costs 1.
"""

import itertools
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layerskip_jax.checks import parse_value, require
from layerskip_jax.config import ModelConfig
from layerskip_jax.model import compute_dtype, weight_count
from layerskip_jax.sharding import target_platform

Overhead = tuple[float, ...]
"""What rounds with 1, 2, ... drafts cost beyond reading weights. A longer round costs the last entry, scaled by its
drafts.

On a CPU this is not linear in the drafts, because matmuls of some widths run other kernels. ``layerskip sweep``
measures it, and `DecodeConfig.round_costs` stores it.
"""

NO_OVERHEAD: Overhead = ()


def checked_overhead(overhead: Sequence[float]) -> Overhead:
    """Return the overhead as a tuple, which is hashable; raises `UserError` for a negative or infinite cost."""
    costs = parse_value(tuple[float, ...], overhead, "overhead")
    require(all(0 <= cost < math.inf for cost in costs), f"overhead must be finite and at least 0, got {costs}")
    return costs


def round_overhead(drafted: float | jax.Array, overhead: Overhead) -> Any:
    """Return the overhead of a round with ``drafted`` tokens, interpolated between whole numbers of drafts.

    >>> [round_overhead(drafts, (0.5, 0.75)) for drafts in (0, 1.5, 4)]
    [0.0, 0.625, 1.5]
    """
    numpy = jnp if isinstance(drafted, jax.Array) else np
    known = max(len(overhead), 1)
    cost = numpy.interp(drafted, np.arange(len(overhead) + 1), np.array((0.0, *overhead)))
    cost = cost * numpy.maximum(drafted / known, 1)
    return cost if isinstance(drafted, jax.Array) else float(cost)


def expected_tokens(acceptance_X: jax.Array, longest: int) -> jax.Array:
    """Return ``tokens_XQ``, the expected tokens of rounds with n = 0..longest drafts: ``1 + a + ... + a^n``.

    >>> expected_tokens(jnp.array([0.5, 1.0]), 2).tolist()
    [[1.0, 1.5, 1.75], [1.0, 2.0, 3.0]]
    """
    length_Q = np.arange(longest + 1)
    power_XQ = acceptance_X[:, None] ** length_Q[None]
    # Sum the powers up to each n with a triangle of ones, not with cumsum, which XLA:CPU runs as many small operations.
    return jnp.sum(power_XQ[:, None] * np.tri(len(length_Q))[None], axis=2)


def weight_bytes(config: ModelConfig, kind: str = "full") -> int:
    """Return the bytes per weight that decoding reads: those of the compute type, or 1 if ``kind`` is int8.

    XLA:CPU converts int8 weights to the compute type before the loop, so there they save nothing.
    """
    return 1 if kind == "int8" and target_platform() != "cpu" else compute_dtype(config).itemsize


def head_share(config: ModelConfig) -> float:
    """Return h: the head's share of the weights that one token's pass through the model reads."""
    return config.vocab_size * config.dim / weight_count(config)


def round_cost(
    config: ModelConfig, exit_layer: float | jax.Array, drafted: float | jax.Array, overhead: Overhead = NO_OVERHEAD
) -> Any:
    """``(1-h)(1 + d E/L) + h(1+d) + overhead(d)``.

    Each of d drafts reads E of L blocks and the head; the verification reads everything once. The KV cache is left out:
    it divides among the blocks as their weights do, so a long context only lowers the head's share h. E and d may be
    numbers or JAX arrays.

    >>> round(round_cost(ModelConfig(num_layers=8, vocab_size=1), exit_layer=2, drafted=4), 2)
    2.0
    """
    h = head_share(config)
    weights = (1 - h) * (1 + drafted * exit_layer / config.num_layers) + h * (1 + drafted)
    return weights + round_overhead(drafted, overhead)


def predicted_speedup(
    config: ModelConfig, exit_layer: float, drafted_per_round: float, tokens_per_round: float
) -> float:
    """``S = tokens / round_cost``: the speed relative to plain decoding. Below 1, speculation does not pay.

    >>> config = ModelConfig(num_layers=8, vocab_size=1)
    >>> round(predicted_speedup(config, exit_layer=2, drafted_per_round=4, tokens_per_round=4), 2)
    2.0
    """
    return tokens_per_round / round_cost(config, exit_layer, drafted_per_round)


def best_speedup(config: ModelConfig, exit_layer: int, acceptance: float, longest: int = 12) -> float:
    """Return the predicted speedup at the best draft length, if each draft is accepted with the same probability a.

    A round of d drafts emits ``1 + a + ... + a^d`` tokens on average.

    >>> config = ModelConfig(num_layers=8, vocab_size=1)
    >>> round(best_speedup(config, exit_layer=2, acceptance=0.8), 2)
    1.69
    """
    tokens = list(itertools.accumulate(acceptance**drafted for drafted in range(longest + 1)))
    return max(predicted_speedup(config, exit_layer, drafted, tokens[drafted]) for drafted in range(longest + 1))


def measured_bandwidth() -> float:
    """Return the memory bandwidth of the default device [bytes/s]: the best rate of a float32 matrix-vector product.

    The matrix has 256 MiB, more than the device's caches.
    """
    matrix, vector = jnp.ones((16384, 4096)), jnp.ones(4096)
    product = jax.jit(jnp.matmul)
    product(matrix, vector).block_until_ready()
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        product(matrix, vector).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return matrix.nbytes / min(seconds)
