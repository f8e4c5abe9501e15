"""Floating-point operations of a training step, counted by formula: what MFU and HFU are made of.

A product of [m, k] and [k, n] matrices counts 2mkn. Counted are the matrix products and attention over all T x T
positions, as PaLM counts (arXiv 2204.02311, appendix B): no norm, softmax, rotation or optimizer, and no saving from
the causal mask. Every position of a batch counts, padding too.
"""

import math
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layerskip_jax.config import Config
from layerskip_jax.model import parameter_count

PEAK_FLOPS = {
    # bfloat16 FLOP/s of a chip, from its maker's data sheet
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,  # of a device: half a chip
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


class StepFlops(NamedTuple):
    """An optimizer step's parts, over all devices [FLOP]; the recipe's own are ``plain + exits - skipped``."""

    plain: float
    """Forward and backward pass of the plain model: one loss, at the last layer, and every block."""
    exits: float
    """Heads of further exits: ``6 D V`` a position for each exit with a loss beyond one."""
    skipped: float
    """Blocks that dropout spares: drop rate x the block. 0 in the masked form, which computes them all; the skipping
    form saves less than this, by its rounding up to row groups."""
    recomputed: float
    """Forward FLOPs that the backward pass repeats, with ``train.remat`` full or offload: ``2 D V`` a position for each
    inner exit with a loss, and the forward pass of every block that is not skipped, without its down projection
    (``2 D F``), whose output no gradient needs. What dots recomputes has no matmul."""

    @property
    def hardware(self) -> float:
        """What the devices compute: the numerator of HFU."""
        return self.plain + self.exits - self.skipped + self.recomputed


def step_flops(config: Config, weight_L: np.ndarray, drop_rate_L: np.ndarray) -> StepFlops:
    """Count a step: exits weigh ``weight_L`` (eq. 6; 0 is off) and blocks drop at ``drop_rate_L`` (eq. 2)."""
    positions = config.train.batch_size * config.data.sequence_length
    head = 2 * config.model.dim * config.model.vocab_size
    losses, inner = int(np.count_nonzero(weight_L)), int(np.count_nonzero(weight_L[:-1]))
    skips = config.layer_dropout.form == "skipping"
    dropped = float(np.sum(drop_rate_L)) if skips else 0.0
    recomputes = config.train.remat in ("full", "offload")
    needed = block_flops(config) / 3 - 2 * config.model.dim * config.model.ffn_dim
    again = head * inner + needed * (config.model.num_layers - dropped)
    return StepFlops(
        plain=positions * flops_per_token(config),
        exits=positions * 3 * head * (losses - 1),
        skipped=positions * block_flops(config) * dropped,
        recomputed=positions * again if recomputes else 0.0,
    )


def flops_per_token(config: Config) -> float:
    """``6 N + 12 L D T`` [FLOP a trained token]: the standard rule (PaLM, arXiv 2204.02311, appendix B).

    N leaves the embedding table out, which is looked up and not multiplied. Exits and dropout do not enter, so MFU
    compares with the same model trained plainly.
    """
    model = config.model
    lookup = 0 if model.tied_embedding else model.vocab_size * model.dim
    multiplied = parameter_count(model) - lookup
    return 6 * multiplied + attention_flops(config)


def attention_flops(config: Config) -> float:
    """``12 L D T``: scores and their products with the values, forward and backward [FLOP a token]; D = N H here."""
    width = config.model.num_heads * config.model.head_dim
    return 12 * config.model.num_layers * width * config.data.sequence_length


def block_flops(config: Config) -> float:
    """One block's part of `flops_per_token`, forward and backward [FLOP a position]."""
    model = config.model
    head = 6 * (model.vocab_size * model.dim + model.dim)  # with the norm before it
    return (flops_per_token(config) - head) / model.num_layers


def peak_flops(seconds: float = 0.3) -> float:
    """Return the peak of all devices together [FLOP/s]: the data sheet's, or where there is none a measured product's.

    A CPU has no useful data sheet, so the best of repeated float32 products of 1024 x 1024 matrices stands in for it,
    for all its simulated devices, which share its cores. For each accelerator without one, bfloat16's of 8192 x 8192.
    """
    kind = jax.devices()[0].device_kind
    if kind in PEAK_FLOPS:
        return PEAK_FLOPS[kind] * jax.device_count()
    on_cpu = jax.default_backend() == "cpu"
    size, dtype, devices = (1024, jnp.float32, 1) if on_cpu else (8192, jnp.bfloat16, jax.device_count())
    multiply = jax.jit(jnp.matmul)
    a = jax.block_until_ready(multiply(jnp.ones((size, size), dtype), jnp.ones((size, size), dtype)))
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        jax.block_until_ready(multiply(a, a))
        best = min(best, time.perf_counter() - began)
    return devices * 2 * size**3 / best
