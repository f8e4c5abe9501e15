"""The exit loss in its plain form, which defines what `fused_exit_loss.losses_and_gradients` computes.

`jax.value_and_grad` differentiates it. It holds logits of shape [B, T, V] for every exit at once.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from layerskip_jax.data.batch import Batch
from layerskip_jax.model import Block, Transformer, run_layers
from layerskip_jax.recipe.distillation import Taught
from layerskip_jax.recipe.early_exit import ExitLoss, cross_entropy
from layerskip_jax.recipe.layer_dropout import DropoutMask, apply_masked


class ExitLosses(NamedTuple):
    """The objective J and the loss of each exit, both summed over the counted positions of a batch [nats]."""

    objective: jax.Array
    loss_L: jax.Array


class Teaching(NamedTuple):
    """The losses of exits that learn from another exit of the same pass, as in `distillation`."""

    distillation: tuple[ExitLoss, ArrayLike] | None = None
    """Loss and share m for every exit but the last. The loss receives the detached teacher ``(x_L, m)``."""
    agreement: tuple[ExitLoss, ArrayLike, int] | None = None
    """Loss, share a and exit E, for the last exit. The loss receives the detached teacher ``(x_E, a)``."""


NO_TEACHING = Teaching()


def exit_losses(
    model: Transformer,
    batch: Batch,
    weight_L: jax.Array,
    dropout_mask: DropoutMask | None = None,
    *,
    loss: ExitLoss = cross_entropy,
    teacher: Any = None,
    teaching: Teaching = NO_TEACHING,
) -> ExitLosses:
    """Return ``J = sum_l w_l CE(g(x_{l+1}), Y)`` (LayerSkip eq. 5), and the loss of each exit with a weight above 0.

    ``x_{l+1} = x_l + M_l f_l(x_l)`` (eq. 1) with M from ``dropout_mask``; None keeps every block. ``weight_L`` is
    w(t, l) of eq. 6. ``loss`` takes the place of CE; it receives ``teacher``, a tree of ``[B, T, ...]`` arrays.
    ``teaching.distillation`` replaces ``loss`` at inner exits, ``teaching.agreement`` at the last exit.
    """
    B, T = batch.inputs_BT.shape
    L = model.config.num_layers
    rotary = model.rotary_tables(jnp.arange(T)[None])
    mask = dropout_mask or DropoutMask(jnp.ones((L, B), bool), jnp.ones(L))

    def f(block: Block, x_BTD: jax.Array, segments_BT: jax.Array) -> jax.Array:
        return block(x_BTD, rotary, segments_BT)[0]

    def block_fn(block: Block, x_BTD: jax.Array, mask: DropoutMask) -> tuple[jax.Array, jax.Array]:
        x_BTD = apply_masked(f, block, (x_BTD, batch.segments_BT), *mask)
        return x_BTD, x_BTD

    last_x_BTD, x_LBTD = run_layers(model.blocks, model.embed(batch.inputs_BT), block_fn, mask)
    inner, inner_teacher = loss, teacher
    if teaching.distillation is not None:
        distillation, share = teaching.distillation
        inner = Taught(distillation)
        inner_teacher = jax.lax.stop_gradient(last_x_BTD), jnp.full((B, T), share)
    last, last_teacher = loss, teacher
    if teaching.agreement is not None:
        agreement, share, exit_layer = teaching.agreement
        last = Taught(agreement)
        last_teacher = jax.lax.stop_gradient(x_LBTD[exit_layer - 1]), jnp.full((B, T), share)

    def value(exit_loss: ExitLoss, x_BTD: jax.Array, teacher: Any) -> jax.Array:
        return exit_loss(model.unembed, x_BTD, batch.targets_BT, batch.mask_BT, teacher)

    values = [value(inner, x_BTD, inner_teacher) for x_BTD in x_LBTD[:-1]]
    loss_L = jnp.where(weight_L > 0, jnp.stack([*values, value(last, last_x_BTD, last_teacher)]), 0)
    return ExitLosses(jnp.sum(weight_L * loss_L), loss_L)
