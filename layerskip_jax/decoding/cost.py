"""The cost model of self-speculation: the cost of a round, the speedup for a given acceptance, and memory bandwidth.

A pass over a few tokens is bound by memory bandwidth: its time is the time to read its weights. Costs are in passes of
the full model for one token, so a plain round costs 1.
"""

import itertools
import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layerskip_jax.checks import require
from layerskip_jax.config import ModelConfig
from layerskip_jax.model import compute_dtype, weight_count
from layerskip_jax.sharding import target_platform


class Overhead(NamedTuple):
    """Costs of speculation beyond reading weights, for devices on which arithmetic or kernel launches take time.

    ``layerskip sweep`` measures them. They are `DecodeConfig.start_cost` and `DecodeConfig.width_cost`.
    """

    per_round: float = 0.0
    """c: added to each round that drafts, because verifying several positions uses other kernels than one position."""
    per_draft: float = 0.0
    """w: added for each drafted token, because it is one more position to verify."""

    def as_settings(self) -> dict[str, Any]:
        """Return the overhead as settings of `DecodeConfig`."""
        return {"start_cost": self.per_round, "width_cost": self.per_draft}


NO_OVERHEAD = Overhead()


def check_overhead(overhead: Overhead) -> None:
    """Raise `UserError` unless the costs are finite and at least 0."""
    require(all(0 <= cost < math.inf for cost in overhead), f"overhead must be finite and at least 0, got {overhead}")


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
    """``(1-h)(1 + d E/L) + h(1+d) + [d > 0] c + w d``.

    Each of d drafts reads E of L blocks and the head; the verification reads everything once. c and w are the overhead.
    E and d may be numbers or arrays.

    >>> round(round_cost(ModelConfig(num_layers=8, vocab_size=1), exit_layer=2, drafted=4), 2)
    2.0
    """
    h = head_share(config)
    weights = (1 - h) * (1 + drafted * exit_layer / config.num_layers) + h * (1 + drafted)
    return weights + overhead.per_round * (drafted > 0) + overhead.per_draft * drafted


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
