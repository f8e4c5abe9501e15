"""Layer dropout: LayerSkip eq. 1-4 as pure functions of numbers, and the plain form that applies them.

    x_{l+1} = x_l + M(p_{l,t}) f_l(x_l)      (eq. 1)      M is 0 with probability p, else 1
    p_{l,t} = S(t) D(l) p_max                (eq. 2)

``D`` is a `LayerScale` and ``S`` a `TimeScale`: any pure function of the same signature can take their place in a
`layerskip_jax.recipe.recipe.Recipe`. Dropout is sampled per sequence and skips the whole block.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

LayerScale = Callable[[int], jax.Array]
"""``num_layers -> D_L``, the drop rate of each block relative to p_max, in [0, 1]."""

TimeScale = Callable[[ArrayLike, int], jax.Array]
"""``(step t, total_steps T) -> S``, in [0, 1]; t counts optimizer steps from 0."""

Rows = tuple[jax.Array, jax.Array]
"""``(x_BTD, segments_BT)``: the inputs of a block. A row is one sequence of the batch."""

BlockFunction = Callable[[Any, jax.Array, jax.Array], jax.Array]
"""``(weights, x_BTD, segments_BT) -> f(x)`` for any number of rows, each independent of the others."""

ApplyDropout = Callable[[BlockFunction, Any, Rows, jax.Array, jax.Array], jax.Array]
"""``(f, weights, (x_BTD, segments_BT), keep_B, scale) -> x_BTD``: eq. 1 at one block, masked or skipping."""


class DropoutMask(NamedTuple):
    """Layer dropout of a batch: M of eq. 1, and the factor on the output of a kept block."""

    keep_LB: jax.Array
    """Whether block l runs on sequence b."""
    scale_L: jax.Array
    """1 as in the paper, or 1/(1-p) with rescaling."""


def exponential_layer_scale(num_layers: int) -> jax.Array:
    """``D(l) = 2^{l/(L-1)} - 1`` (LayerSkip eq. 3): from 0 at the first block to 1 at the last.

    >>> exponential_layer_scale(4).round(4).tolist()  # doctest: +ELLIPSIS
    [0.0, 0.259..., 0.587..., 1.0]
    """
    return jnp.exp2(linear_layer_scale(num_layers)) - 1


def linear_layer_scale(num_layers: int) -> jax.Array:
    """``D(l) = l/(L-1)``; a model of one block has D = 0."""
    return jnp.arange(num_layers, dtype=jnp.float32) / max(num_layers - 1, 1)


def exponential_time_scale(step: ArrayLike, total_steps: int) -> jax.Array:
    """``S(t) = 2^{t/(T-1)} - 1`` (LayerSkip eq. 4): for pretraining from scratch."""
    return jnp.exp2(_progress(step, total_steps)) - 1


def constant_time_scale(step: ArrayLike, total_steps: int) -> jax.Array:
    """``S(t) = 1`` (LayerSkip section 4.1.1): for continual pretraining and finetuning."""
    return jnp.ones_like(_progress(step, total_steps))


def decaying_time_scale(step: ArrayLike, total_steps: int) -> jax.Array:
    """``S(t) = 1 - t/(T-1)``: decays from full dropout to none; meant for a linear layer scale with rescaling.

    Source: a later study by LayerSkip's first author ("Don't Drop Dropout", 2026), which we know only second-hand.
    """
    # Clamp at 0: XLA multiplies by the rounded reciprocal in place of the division, so the last step may give -1e-8.
    return jnp.maximum(1 - _progress(step, total_steps), 0)


def _progress(step: ArrayLike, total_steps: int) -> jax.Array:
    return jnp.asarray(step, jnp.float32) / max(total_steps - 1, 1)


LAYER_SCALES: dict[str, LayerScale] = {"exponential": exponential_layer_scale, "linear": linear_layer_scale}
TIME_SCALES: dict[str, TimeScale] = {
    "exponential": exponential_time_scale,
    "constant": constant_time_scale,
    "decaying": decaying_time_scale,
}


def sample_dropout_mask(key: jax.Array, drop_rate_L: jax.Array, batch: int, shards: int = 1) -> jax.Array:
    """Sample ``keep_LB``, whether block l runs on sequence b: False with probability ``drop_rate_L[l]``.

    Each of the ``shards`` of the batch gets the same sample. All devices then drop the same number of sequences at
    each block, and none waits for another (LayerSkip section 4.1.1 shares the seed for this reason).
    """
    rows = batch // shards
    uniform_LR = jax.random.uniform(key, (drop_rate_L.shape[0], rows))
    return jnp.tile(uniform_LR >= drop_rate_L[:, None], (1, shards))


def apply_masked(f: BlockFunction, weights: Any, rows: Rows, keep_B: jax.Array, scale: jax.Array) -> jax.Array:
    """Return ``x + M scale f(x)`` (eq. 1), computing every ``f``: the reference for `skipping.apply_skipping`."""
    x_BTD, segments_BT = rows
    factor_B = jnp.where(keep_B, scale, 0).astype(x_BTD.dtype)
    return x_BTD + factor_B[:, None, None] * f(weights, x_BTD, segments_BT)
