"""Cross-entropy at the exits, computed inside the scan over layers, without ever holding [batch, length, vocab]."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from layerskip_jax.attention import same_document
from layerskip_jax.layer_dropout import Rows, apply_masked
from layerskip_jax.model import Block, Transformer, run_layers

Apply = Callable[[Callable[[jax.Array, jax.Array], jax.Array], Rows, jax.Array, jax.Array], jax.Array]
"""``(f, (x_BTD, segments_BT), kept_B, scale) -> x_BTD``: eq. 1 in one of the forms of `layer_dropout`."""


class Batch(NamedTuple):
    """Packed sequences: what `layerskip_jax.data.pipeline` yields."""

    inputs_BT: jax.Array
    targets_BT: jax.Array
    segments_BT: jax.Array
    mask_BT: jax.Array


class Draw(NamedTuple):
    """Which blocks each sequence keeps, and by what a kept block's output is multiplied."""

    kept_LB: jax.Array
    scale_L: jax.Array


def cross_entropy(unembed: Callable[[jax.Array], jax.Array], x_BTD: jax.Array, batch: Batch, chunk: int) -> jax.Array:
    """Return the sum over counted positions of ``-log softmax(g(x))[target]`` [nats].

    Only ``chunk`` positions of each sequence are unembedded at once, in the backward pass too, where the logits are
    computed again. ``chunk`` divides T or exceeds it.
    """
    B, T = x_BTD.shape[:2]
    chunk = min(chunk, T)

    @jax.checkpoint
    def of_chunk(x_BCD: jax.Array, targets_BC: jax.Array, mask_BC: jax.Array) -> jax.Array:
        logits_BCV = unembed(x_BCD)
        # A comparison in place of a gather: it fuses, and it works when the vocabulary is split over devices.
        is_target_BCV = jnp.arange(logits_BCV.shape[-1])[None, None] == targets_BC[:, :, None]
        target_logit_BC = jnp.sum(jnp.where(is_target_BCV, logits_BCV, 0), axis=-1)
        return jnp.sum((jax.nn.logsumexp(logits_BCV, axis=-1) - target_logit_BC) * mask_BC)

    if chunk == T:
        return of_chunk(x_BTD, batch.targets_BT, batch.mask_BT)

    def chunks(array: jax.Array) -> jax.Array:
        return array.reshape(B, T // chunk, chunk, *array.shape[2:]).swapaxes(0, 1)

    def add(total: jax.Array, piece: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        return total + of_chunk(*piece), None

    pieces = (chunks(x_BTD), chunks(batch.targets_BT), chunks(batch.mask_BT))
    return jax.lax.scan(add, jnp.zeros(()), pieces)[0]


def exit_losses(
    model: Transformer,
    batch: Batch,
    weight_L: jax.Array,
    *,
    chunk: int,
    draw: Draw | None = None,
    apply: Apply = apply_masked,
    remat: bool = False,
) -> jax.Array:
    """Return ``loss_L``: the summed cross-entropy of every exit whose weight is not zero, 0 for the others.

    One forward pass (eq. 1) serves all exits; the loss after block l sits in the scan's body under a condition, so
    one compiled program serves every step of a curriculum and an exit that is off costs nothing (eq. 5).
    """
    position = model.positions(jnp.arange(batch.inputs_BT.shape[1])[None])

    # Without the checkpoint, the condition would hand out the head as a residual, and the scan keep L copies of it.
    @jax.checkpoint
    def loss_if_on(weight: jax.Array, x_BTD: jax.Array) -> jax.Array:
        return jax.lax.cond(
            weight > 0,
            lambda x_BTD: cross_entropy(model.unembed, x_BTD, batch, chunk),
            lambda x_BTD: jnp.zeros(()),
            x_BTD,
        )

    def step(
        block: Block, x_BTD: jax.Array, inputs: tuple[jax.Array, jax.Array | None, jax.Array | None]
    ) -> tuple[jax.Array, jax.Array]:
        weight, kept_B, scale = inputs

        def f(x_BTD: jax.Array, segments_BT: jax.Array) -> jax.Array:
            return block(x_BTD, position, same_document(segments_BT))[0]

        if kept_B is None or scale is None:
            x_BTD = x_BTD + f(x_BTD, batch.segments_BT)
        else:
            x_BTD = apply(f, (x_BTD, batch.segments_BT), kept_B, scale)
        return x_BTD, loss_if_on(weight, x_BTD)

    kept_LB, scale_L = (None, None) if draw is None else draw
    inputs = (weight_L, kept_LB, scale_L)
    _, loss_L = run_layers(model.blocks, model.embed(batch.inputs_BT), jax.checkpoint(step) if remat else step, inputs)
    return loss_L
