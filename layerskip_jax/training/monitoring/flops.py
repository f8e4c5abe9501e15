"""FLOPs of a training step by formula, for MFU and HFU.

As in PaLM (arXiv 2204.02311, appendix B), a matmul of [m, k] and [k, n] counts 2mkn, and attention counts all T x T
positions, whatever the causal mask. Softmax, rotary positions and the optimizer are left out. MFU counts the
tokens with a loss; HFU counts every position of a batch, padding and prompts included.
"""

import math
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layerskip_jax.config import Config
from layerskip_jax.model import weight_count
from layerskip_jax.recipe.recipe import Recipe

PEAK_FLOPS = {
    # bfloat16 FLOP/s of a chip, from the vendor's data sheet
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,  # per device, which is half a chip
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


class StepFlops(NamedTuple):
    """FLOPs of an optimizer step over all devices, by part; the recipe needs ``plain + exits - skipped``."""

    plain: float
    """Forward and backward pass of the plain model: every block, and one loss at the last layer."""
    exits: float
    """Heads of the other exits with a loss: ``6 D V`` per position and exit, and ``2 D V`` for the teacher of
    each exit that has one. Nothing for the teachers of the two exits of `TwoExits`, whose logits are there anyway."""
    skipped: float
    """Blocks that dropout skips: drop rate times the block's FLOPs. 0 in the masked form, which computes all blocks.
    The skipping form saves less, since it rounds up to row groups."""
    recomputed: float
    """Forward FLOPs that the backward pass repeats with ``train.remat`` full or offload. It repeats each block that is
    not skipped, without its down projection (``2 D F`` per position), whose output no gradient needs. With dots it
    repeats no matmul with weights. Not counted: the two attention matmuls that dots repeats if XLA runs the attention;
    the kernels for TPUs and GPUs save their output."""

    @property
    def hardware(self) -> float:
        """FLOPs that the devices execute: the numerator of HFU."""
        return self.plain + self.exits - self.skipped + self.recomputed


def step_flops(config: Config, recipe: Recipe, weight_L: np.ndarray, drop_rate_L: np.ndarray) -> StepFlops:
    """Count a step with exit weights ``weight_L`` (eq. 6; 0 is off) and drop rates ``drop_rate_L`` (eq. 2)."""
    positions = config.train.batch_size * config.data.sequence_length
    head = 2 * config.model.dim * config.model.vocab_size
    inner, last, two = exits_by_form(recipe, weight_L)
    losses = inner + last + 2 * two
    teachers = (0 if recipe.distillation is None else inner) + (0 if recipe.agreement is None else last)
    dropped = float(np.sum(drop_rate_L)) if recipe.skips else 0.0
    recomputes = config.train.remat in ("full", "offload")
    needed = block_flops(config) / 3 - 2 * config.model.dim * config.model.ffn_dim
    again = needed * (config.model.num_layers - dropped)
    return StepFlops(
        plain=positions * flops_per_token(config),
        exits=positions * head * (3 * (losses - 1) + teachers),
        skipped=positions * block_flops(config) * dropped,
        recomputed=positions * again if recomputes else 0.0,
    )


def exits_by_form(recipe: Recipe, weight_L: np.ndarray) -> tuple[int, int, int]:
    """Count the losses at these weights: inner exits alone, the last exit alone, and the two together (`TwoExits`)."""
    two = bool(recipe.agreement is not None and weight_L[-1] > 0 and weight_L[recipe.agreement_exit - 1] > 0)
    return int(np.count_nonzero(weight_L[:-1])) - two, int(weight_L[-1] > 0) - two, int(two)


def flops_per_token(config: Config) -> float:
    """``6 N + 12 L D T`` [FLOPs per trained token] (PaLM, arXiv 2204.02311, appendix B).

    N excludes the embedding table, whose lookup is no matmul. Exits and dropout do not count, so the MFU compares with
    plain training of the same model.
    """
    return 6 * weight_count(config.model) + attention_flops(config)


def attention_flops(config: Config) -> float:
    """``12 L D T``: scores and weighted values, forward and backward [FLOPs per token]; here D = N H."""
    width = config.model.num_heads * config.model.head_dim
    return 12 * config.model.num_layers * width * config.data.sequence_length


def block_flops(config: Config) -> float:
    """One block's part of `flops_per_token`, forward and backward [FLOPs per position]."""
    model = config.model
    head = 6 * (model.vocab_size * model.dim + model.dim)  # with the final norm
    return (flops_per_token(config) - head) / model.num_layers


PEAK_SECONDS = 0.3
"""How long `peak_flops` measures a device that has no data sheet [seconds]."""


def peak_flops() -> float:
    """Return the peak of all devices together [FLOP/s], from the data sheet or, for other devices, measured.

    The measurement takes `PEAK_SECONDS` and is the best of repeated matmuls: float32 of 1024 x 1024 on a CPU, whose
    simulated devices share its cores, and bfloat16 of 8192 x 8192 on an accelerator.
    """
    kind = jax.devices()[0].device_kind
    if kind in PEAK_FLOPS:
        return PEAK_FLOPS[kind] * jax.device_count()
    on_cpu = jax.default_backend() == "cpu"
    size, dtype, devices = (1024, jnp.float32, 1) if on_cpu else (8192, jnp.bfloat16, jax.device_count())
    multiply = jax.jit(jnp.matmul)
    a = jax.block_until_ready(multiply(jnp.ones((size, size), dtype), jnp.ones((size, size), dtype)))
    best, end = math.inf, time.perf_counter() + PEAK_SECONDS
    while time.perf_counter() < end:
        began = time.perf_counter()
        jax.block_until_ready(multiply(a, a))
        best = min(best, time.perf_counter() - began)
    return devices * 2 * size**3 / best
