"""The exit loss of `exit_loss`, with the head's gradient computed in the forward pass, chunk by chunk.

`exits_within_scan` serves curricula that may turn on any exit. `exits_after_scan` serves a few named exits: it takes
less memory, and they and the last exit can teach each other.
"""

import dataclasses
from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike

from layerskip_jax.data.batch import Batch
from layerskip_jax.document_attention import SAVED_OUTPUT
from layerskip_jax.model import Block, Transformer, run_layers
from layerskip_jax.recipe.chunked_loss import (
    INNER_EXIT,
    LAST_EXIT,
    ChunkedLoss,
    ExitContext,
    attach_gradient,
    exit_with_recomputed_logits,
    exit_with_saved_gradients,
)
from layerskip_jax.recipe.early_exit import ExitLoss, cross_entropy
from layerskip_jax.recipe.exit_loss import ExitLosses
from layerskip_jax.recipe.layer_dropout import ApplyDropout, BlockFunction, DropoutMask, apply_masked
from layerskip_jax.sharding import constrain, row_major

BLOCK_INPUT = "block input"

OFFLOAD_BLOCK_INPUTS = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[BLOCK_INPUT],
    offload_src="device",
    offload_dst="pinned_host",
)


def save_matmuls(primitive: Any, *operands: Any, **parameters: Any) -> Any:
    """Save the outputs of matmuls and attention kernels, and recompute the rest: the policy of ``remat = "dots"``."""
    policies = jax.checkpoint_policies
    matmul_or_splash = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(SAVED_OUTPUT)
    )
    # cuDNN's attention output has no name, so match its primitive, which jax has not renamed since 0.4.31.
    return matmul_or_splash(primitive, *operands, **parameters) or primitive.name == "dot_product_attention_fwd_wrapper"


@dataclasses.dataclass(frozen=True)
class FusedSettings:
    """Settings of `fused_exit_losses`; static under jit."""

    chunk: int
    """Positions of each sequence whose logits exist at once; must divide T, or exceed it."""
    remat: str = "none"
    """``train.remat``, which decides what the backward pass recomputes."""
    loss: ExitLoss = cross_entropy
    apply_dropout: ApplyDropout = apply_masked
    exits: tuple[int, ...] = ()
    """If not empty, only these and the last exit may have a weight above 0."""
    distillation: ExitLoss | None = None
    """Takes the place of ``loss`` at ``exits``, which must then be given; its teacher is ``(x_L, share)``."""
    agreement: ExitLoss | None = None
    """Takes the place of ``loss`` at the last exit; its teacher is ``(x, share)`` of ``agreement_exit``."""
    agreement_exit: int = 0
    """One of ``exits``, if there is an ``agreement``."""

    @property
    def recompute(self) -> bool:
        """Return whether the backward pass recomputes a block from its input."""
        return self.remat in ("full", "offload")

    @property
    def policy(self) -> Any:
        """Return where to save the inputs of blocks if `recompute`."""
        return OFFLOAD_BLOCK_INPUTS if self.remat == "offload" else None


class Shares(NamedTuple):
    """The share of each teacher in the loss of its exits."""

    distillation: ArrayLike = 1.0
    agreement: ArrayLike = 0.0


def fused_exit_losses(
    model: Transformer,
    batch: Batch,
    weight_L: jax.Array,
    settings: FusedSettings,
    dropout_mask: DropoutMask | None = None,
    teacher: Any = None,
    shares: Shares = Shares(),  # noqa: B008  (immutable)
) -> ExitLosses:
    """Return what `exit_losses` returns, with gradients of the objective (LayerSkip eq. 5) already computed.

    Each exit is inside a conditional on its weight: one compiled program serves every step of a curriculum, and an
    exit of weight 0 costs no FLOPs. The carry of the scan accumulates the gradient of the head's matrix. With
    ``remat`` none or dots, the forward pass also computes and saves each exit's gradient with respect to ``x``. With
    full or offload, the backward pass recomputes the logits of inner exits to compute that gradient. An inner exit then
    costs 8 D V FLOPs per token instead of 6.

    If ``settings.exits`` names the exits, the scan over blocks keeps only their hidden states, and their losses are
    computed after it. Their gradients with respect to ``x`` are then saved for every ``remat``, one array for each
    named exit, and no logits are recomputed. These exits and the last one can teach each other.

    Only the objective has a gradient; ``loss_L`` has none.
    """
    weight_L = jnp.asarray(weight_L, jnp.float32)  # custom_vjp needs a float
    context = ExitContext.create(model, batch, ChunkedLoss(model.config, settings.loss, settings.chunk), teacher)
    if settings.exits:
        x_BTD, kept_KBTD = run_blocks_and_keep(model, batch, settings, dropout_mask)
        taught = context
        if settings.distillation is not None:
            taught = context.taught_by(settings.distillation, x_BTD, shares.distillation)
        d_matrix, inner = exits_after_scan(taught, weight_L, settings.exits, kept_KBTD)
        if settings.agreement is not None:
            teacher_x_BTD = kept_KBTD[settings.exits.index(settings.agreement_exit)]
            context = context.taught_by(settings.agreement, teacher_x_BTD, shares.agreement)
    else:
        x_BTD, d_matrix, inner = exits_within_scan(model, batch, weight_L, settings, dropout_mask, context)
    with jax.named_scope(LAST_EXIT):
        x_BTD, d_matrix, last = exit_with_saved_gradients(context, weight_L[-1], x_BTD, d_matrix)
    objective = attach_gradient(jnp.sum(inner.objective) + last.objective, context.head[1], d_matrix)
    return ExitLosses(objective, jnp.append(inner.loss_L, last.loss_L))


def exits_within_scan(
    model: Transformer,
    batch: Batch,
    weight_L: jax.Array,
    settings: FusedSettings,
    dropout_mask: DropoutMask | None,
    context: ExitContext,
) -> tuple[jax.Array, nnx.Param, ExitLosses]:
    """Run all blocks, with the loss of every inner exit between them.

    Returns ``x_L``, the gradient of the head's matrix, and the objectives and losses of the exits 1..L-1.
    """
    recompute = settings.recompute
    inner_exit = exit_with_recomputed_logits if recompute else exit_with_saved_gradients
    run_block = block_with_dropout(model, batch, settings, dropout_mask)

    def block_fn(
        block: Block, carry: tuple[jax.Array, nnx.Param], inputs: tuple[jax.Array, DropoutMask | None]
    ) -> tuple[Any, ExitLosses]:
        (x_BTD, d_matrix), (weight, mask) = carry, inputs
        x_BTD = checkpoint_name(row_major(x_BTD), BLOCK_INPUT)
        with jax.named_scope(INNER_EXIT):
            x_BTD, d_matrix, losses = inner_exit(context, weight, x_BTD, d_matrix)
        return (run_block(block, x_BTD, mask), d_matrix), losses

    if recompute:
        block_fn = jax.checkpoint(block_fn, policy=settings.policy, prevent_cse=False)
    # Iteration l computes the exit before block l, whose input x is the iteration's saved input. The exit after block l
    # would need the block's output, so full remat would also recompute the block's down projection.
    weight_before_L = jnp.roll(weight_L, 1).at[0].set(0)  # no exit comes before block 0
    start = model.embed(batch.inputs_BT), jax.tree.map(jnp.zeros_like, context.head[1])
    (x_BTD, d_matrix), inner = run_layers(model.blocks, start, block_fn, (weight_before_L, dropout_mask))
    return x_BTD, d_matrix, jax.tree.map(itemgetter(slice(1, None)), inner)


def run_blocks_and_keep(
    model: Transformer, batch: Batch, settings: FusedSettings, dropout_mask: DropoutMask | None
) -> tuple[jax.Array, jax.Array]:
    """Run all blocks; return ``x_L``, and ``kept_KBTD``, the hidden states at each of ``settings.exits``."""
    run_block = block_with_dropout(model, batch, settings, dropout_mask)
    K, L = len(settings.exits), model.config.num_layers

    def run_named_block(block: Block, x_BTD: jax.Array, mask: DropoutMask | None) -> jax.Array:
        return run_block(block, checkpoint_name(x_BTD, BLOCK_INPUT), mask)

    if settings.recompute:
        run_named_block = jax.checkpoint(run_named_block, policy=settings.policy, prevent_cse=False)

    def block_fn(
        block: Block, carry: tuple[jax.Array, jax.Array], inputs: tuple[jax.Array, jax.Array, DropoutMask | None]
    ) -> tuple[Any, None]:
        (x_BTD, kept_KBTD), (slot, up_to_last_exit, mask) = carry, inputs
        x_BTD = row_major(x_BTD)
        value_BTD = jnp.where(up_to_last_exit, x_BTD, kept_KBTD[slot])
        kept_KBTD = jax.lax.dynamic_update_index_in_dim(kept_KBTD, value_BTD, slot, 0)
        return (run_named_block(block, x_BTD, mask), kept_KBTD), None

    # The hidden state of exit e is the input of block e, counted from 0. Every block overwrites the slot of the next
    # exit with its input, so the slot of exit e ends with the input of block e. Blocks after the last of
    # `settings.exits` write the last slot back unchanged: XLA updates one slot in place, but would copy all slots for a
    # conditional.
    exit_K, layer_L = jnp.array(settings.exits), jnp.arange(L)
    slot_L = jnp.minimum(jnp.searchsorted(exit_K, layer_L), K - 1)
    up_to_last_exit_L = layer_L <= exit_K[-1]
    x_BTD = model.embed(batch.inputs_BT)
    kept_KBTD = constrain(jnp.zeros((K, *x_BTD.shape), x_BTD.dtype), None, "batch", "length", None)
    (x_BTD, kept_KBTD), _ = run_layers(
        model.blocks, (x_BTD, kept_KBTD), block_fn, (slot_L, up_to_last_exit_L, dropout_mask)
    )
    return x_BTD, kept_KBTD


def exits_after_scan(
    context: ExitContext, weight_L: jax.Array, exit_layers: tuple[int, ...], kept_KBTD: jax.Array
) -> tuple[nnx.Param, ExitLosses]:
    """Compute the losses of ``exit_layers``, whose hidden states are ``kept_KBTD``.

    Returns the gradient of the head's matrix, and the objectives and losses of the exits 1..L-1.
    """

    def exit_fn(d_matrix: nnx.Param, inputs: tuple[jax.Array, jax.Array]) -> tuple[nnx.Param, ExitLosses]:
        with jax.named_scope(INNER_EXIT):
            _, d_matrix, losses = exit_with_saved_gradients(context, *inputs, d_matrix)
        return d_matrix, losses

    place_K = jnp.array(exit_layers) - 1
    no_gradient = jax.tree.map(jnp.zeros_like, context.head[1])
    d_matrix, losses = jax.lax.scan(exit_fn, no_gradient, (weight_L[place_K], kept_KBTD))
    return d_matrix, jax.tree.map(lambda values: jnp.zeros(len(weight_L) - 1).at[place_K].set(values), losses)


def block_with_dropout(
    model: Transformer, batch: Batch, settings: FusedSettings, dropout_mask: DropoutMask | None
) -> Callable[[Block, jax.Array, DropoutMask | None], jax.Array]:
    """Return ``x + M f(x)`` of LayerSkip eq. 1 as a function of a block, ``x_BTD``, and the block's M."""
    f = block_function(model)
    skips = dropout_mask is not None and settings.apply_dropout is not apply_masked
    # Skipping copies each saved residual into an array with a slot per row group. With the policy of dots, fewer
    # residuals are saved and copied.
    if settings.remat == "dots" or skips:
        f = jax.checkpoint(f, policy=save_matmuls, prevent_cse=False)

    def run_block(block: Block, x_BTD: jax.Array, mask: DropoutMask | None) -> jax.Array:
        if mask is None:
            return x_BTD + f(block, x_BTD, batch.segments_BT)
        return settings.apply_dropout(f, block, (x_BTD, batch.segments_BT), *mask)

    return run_block


def chunked_exit_losses(
    model: Transformer, batch: Batch, *, chunk: int, loss: ExitLoss = cross_entropy, teacher: Any = None
) -> jax.Array:
    """Return ``loss_L`` of every exit, as `exit_losses` without dropout does, for evaluation."""
    context = ExitContext.create(model, batch, ChunkedLoss(model.config, loss, chunk), teacher)
    f = block_function(model)

    def block_fn(block: Block, x_BTD: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        x_BTD = x_BTD + f(block, x_BTD, batch.segments_BT)
        return x_BTD, context.loss.value(context.gathered_head, x_BTD, context.labels)

    return run_layers(model.blocks, model.embed(batch.inputs_BT), block_fn, None)[1]


def block_function(model: Transformer) -> BlockFunction:
    """Return f of LayerSkip eq. 1: a block without its residual connection."""

    def f(block: Block, x_BTD: jax.Array, segments_BT: jax.Array) -> jax.Array:
        x_BTD = constrain(x_BTD, "batch", "length", None)
        # The tables are computed here, where they get the sharding of x along the length: each device then computes
        # them for its own positions only. They do not depend on x, so JAX moves them out of the scan over blocks.
        rotary = model.rotary_tables(jnp.arange(x_BTD.shape[1])[None])
        return block(x_BTD, rotary, segments_BT)[0]

    return f
