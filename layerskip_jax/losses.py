"""Cross-entropy at the exits, computed inside the scan over layers, without ever holding [batch, length, vocab]."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from layerskip_jax.attention import SAVED_OUTPUT
from layerskip_jax.layer_dropout import BlockFunction, Rows, apply_masked
from layerskip_jax.model import Block, Transformer, run_layers
from layerskip_jax.sharding import mesh_size

Apply = Callable[[BlockFunction, Block, Rows, jax.Array, jax.Array], jax.Array]
"""``(f, block, (x_BTD, segments_BT), kept_B, scale) -> x_BTD``: eq. 1, in the masked or the skipping form."""


EXIT_LOSS = "exit_loss"
"""The scope of the conditions that turn exits on, in the text of a compiled program."""
BLOCK_INPUT = "block input"
KEEP_PRODUCTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(SAVED_OUTPUT),
)
INPUTS_TO_HOST = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[BLOCK_INPUT],
    offload_src="device",
    offload_dst="pinned_host",
)


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
    computed again. ``chunk`` divides T or exceeds it, and the devices that a sequence is split over divide it.
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
        # Of every part of a sequence that is split over devices, some of its positions: none moves.
        parts = mesh_size("length")
        array = array.reshape(B, parts, T // chunk, chunk // parts, *array.shape[2:])
        return jnp.moveaxis(array, 2, 0).reshape(T // chunk, B, chunk, *array.shape[4:])

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
    remat: str = "none",
) -> jax.Array:
    """Return ``loss_L``: the summed cross-entropy of every exit whose weight is not zero, 0 for the others.

    One forward pass (eq. 1) serves all exits; the loss after block l sits in the scan's body under a condition, so
    one compiled program serves every step of a curriculum and an exit that is off costs nothing (eq. 5).
    """

    # Without the checkpoint, the condition would hand out the head as a residual, and the scan keep L copies of it.
    @jax.checkpoint
    def loss_if_on(weight: jax.Array, x_BTD: jax.Array) -> jax.Array:
        with jax.named_scope(EXIT_LOSS):
            return jax.lax.cond(
                weight > 0,
                lambda x_BTD: cross_entropy(partial(model.unembed, head_DV=model.head()), x_BTD, batch, chunk),
                lambda x_BTD: jnp.zeros(()),
                x_BTD,
            )

    def f(block: Block, x_BTD: jax.Array, segments_BT: jax.Array) -> jax.Array:
        # Positions are made here, as each device makes its own, and JAX takes them out of the scan.
        return block(x_BTD, model.positions(jnp.arange(x_BTD.shape[1])[None]), segments_BT)[0]

    if remat == "dots":
        f = jax.checkpoint(f, policy=KEEP_PRODUCTS, prevent_cse=False)

    def step(
        block: Block, x_BTD: jax.Array, inputs: tuple[jax.Array, jax.Array | None, jax.Array | None]
    ) -> tuple[jax.Array, jax.Array]:
        weight, kept_B, scale = inputs
        x_BTD = checkpoint_name(x_BTD, BLOCK_INPUT)
        if kept_B is None or scale is None:
            x_BTD = x_BTD + f(block, x_BTD, batch.segments_BT)
        else:
            x_BTD = apply(f, block, (x_BTD, batch.segments_BT), kept_B, scale)
        return x_BTD, loss_if_on(weight, x_BTD)

    if remat in ("full", "offload"):
        step = jax.checkpoint(step, policy=INPUTS_TO_HOST if remat == "offload" else None, prevent_cse=False)
    kept_LB, scale_L = (None, None) if draw is None else draw
    inputs = (weight_L, kept_LB, scale_L)
    _, loss_L = run_layers(model.blocks, model.embed(batch.inputs_BT), step, inputs)
    return loss_L
