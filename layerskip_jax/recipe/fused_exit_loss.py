"""The exit loss of `exit_loss` with its gradients, computed chunk by chunk in the backward pass."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike

from layerskip_jax.data.batch import Batch
from layerskip_jax.document_attention import SAVED_OUTPUT
from layerskip_jax.model import Block, Transformer, run_layers
from layerskip_jax.recipe.chunked_loss import (
    INNER_EXIT,
    LAST_EXIT,
    TWO_EXITS,
    ChunkedLoss,
    ExitContext,
    Passed,
    exit_in_backward_pass,
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
    """The policy of ``remat = "dots"``: save the outputs of matmuls with weights and of attention kernels.

    The backward pass recomputes the rest, also the batched matmuls of attention if XLA runs it.
    """
    policies = jax.checkpoint_policies
    matmul_or_splash = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(SAVED_OUTPUT)
    )
    # cuDNN's attention output has no name, so match its primitive, which jax has not renamed since 0.4.31.
    return matmul_or_splash(primitive, *operands, **parameters) or primitive.name == "dot_product_attention_fwd_wrapper"


@dataclasses.dataclass(frozen=True)
class FusedSettings:
    """Settings of `losses_and_gradients`; static under jit."""

    chunk: int
    """Positions of each sequence whose logits exist at once; must divide T, or exceed it."""
    remat: str = "none"
    """``train.remat``, which decides what the backward pass recomputes."""
    loss: ExitLoss = cross_entropy
    apply_dropout: ApplyDropout = apply_masked
    distillation: ExitLoss | None = None
    """Takes the place of ``loss`` at every exit but the last; its teacher is ``(x_L, share)``."""
    agreement: ExitLoss | None = None
    """Takes the place of ``loss`` at the last exit; its teacher is ``(x, share)`` of ``agreement_exit``."""
    agreement_exit: int = 0

    @property
    def recompute(self) -> bool:
        """Return whether the backward pass recomputes a block from its input."""
        return self.remat in ("full", "offload")

    @property
    def policy(self) -> Any:
        """Return the `jax.checkpoint` policy of a block for `recompute`; None saves its input on the device."""
        return OFFLOAD_BLOCK_INPUTS if self.remat == "offload" else None


class Shares(NamedTuple):
    """The share of each teacher in the loss of its exits."""

    distillation: ArrayLike = 1.0
    agreement: ArrayLike = 0.0


def losses_and_gradients(
    model: Transformer,
    batch: Batch,
    weight_L: jax.Array,
    settings: FusedSettings,
    dropout_mask: DropoutMask | None = None,
    teacher: Any = None,
    shares: Shares = Shares(),  # noqa: B008  (immutable)
) -> tuple[ExitLosses, Transformer]:
    """Return what `exit_losses` returns, and the gradient of the objective (LayerSkip eq. 5).

    The forward pass runs the embedding and the blocks only. The backward pass computes logits, loss and gradients of
    each exit together (`exit_in_backward_pass`), so an exit costs 6 D V FLOPs per token, and 2 D V more with a teacher.
    The exit that teaches the last one and the last exit share their logits (`TwoExits`).
    `jax.value_and_grad` would compute the logits in the forward pass, and then compute them again (8 D V) or save an
    array of the shape of x or of the logits for each exit. Do not differentiate the result.

    Each exit is inside a conditional on its weight: one compiled program serves every step of a curriculum, and an exit
    of weight 0 costs no FLOPs.
    """
    weight_L = jnp.asarray(weight_L, jnp.float32)  # the cotangent of the loss, which is float32
    alone_L = weight_L  # the weights of the losses that are computed one by one
    if settings.agreement is not None:
        # Exit E teaches the last exit. If both have a loss at this step, `TwoExits` computes the two losses in one
        # conditional, and their own conditionals are off. Otherwise the conditional of `TwoExits` is off.
        assert 1 <= settings.agreement_exit < len(weight_L)
        pair = jnp.array([-1, settings.agreement_exit - 1])
        both = jnp.all(weight_L[pair] > 0)
        pair_weights = jnp.where(both, weight_L[pair], 0)
        alone_L = jnp.where(both, weight_L.at[pair].set(0), weight_L)

    def run(model: Transformer, loss_slot_L: jax.Array) -> Passed:
        context = ExitContext.create(model, batch, ChunkedLoss(model.config, settings.loss, settings.chunk), teacher)
        inner = last = context
        if settings.distillation is not None:
            inner = context.taught_by_last(settings.distillation, shares.distillation)
        passed, agreement_x_BTD = run_blocks(model, batch, settings, dropout_mask, inner, alone_L, loss_slot_L)
        if settings.agreement is not None and agreement_x_BTD is not None:
            last = context.taught_by(settings.agreement, agreement_x_BTD, shares.agreement)
            two = passed._replace(x_BTD=(passed.x_BTD, agreement_x_BTD))
            two = exit_in_backward_pass(inner.with_last(last), TWO_EXITS, pair_weights, two, loss_slot_L[pair])
            passed = two._replace(x_BTD=two.x_BTD[0])
        return exit_in_backward_pass(last, LAST_EXIT, alone_L[-1], passed, loss_slot_L[-1])

    passed, pullback = jax.vjp(run, model, jnp.zeros_like(weight_L))
    # The gradients start at zero, and each exit adds its own. The cotangent of last_x brings x_L to the inner exits.
    cotangents = jax.tree.map(jnp.zeros_like, passed)
    if passed.last_x_BTD is not None:
        cotangents = cotangents._replace(last_x_BTD=passed.x_BTD)
    gradients, loss_L = pullback(cotangents)
    return ExitLosses(jnp.sum(weight_L * loss_L), loss_L), gradients


def run_blocks(
    model: Transformer,
    batch: Batch,
    settings: FusedSettings,
    dropout_mask: DropoutMask | None,
    context: ExitContext,
    alone_L: jax.Array,
    loss_slot_L: jax.Array,
) -> tuple[Passed, jax.Array | None]:
    """Run all blocks, and the inner exits between them; ``context`` and ``alone_L`` belong to the inner exits.

    Also returns the hidden state at ``settings.agreement_exit``, or None without an agreement. Through it, the gradient
    of `TwoExits` enters the backward pass at that exit.
    """
    run_block = block_with_dropout(model, batch, settings, dropout_mask)

    def block_fn(
        block: Block,
        carry: tuple[Passed, jax.Array | None],
        inputs: tuple[jax.Array, jax.Array, jax.Array, DropoutMask | None],
    ) -> tuple[Any, None]:
        (passed, agreement_x_BTD), (weight, loss_slot, is_agreement_exit, mask) = carry, inputs
        passed = passed._replace(x_BTD=checkpoint_name(row_major(passed.x_BTD), BLOCK_INPUT))
        if agreement_x_BTD is not None:
            agreement_x_BTD = jnp.where(is_agreement_exit, passed.x_BTD, agreement_x_BTD)
        passed = exit_in_backward_pass(context, INNER_EXIT, weight, passed, loss_slot)
        return (passed._replace(x_BTD=run_block(block, passed.x_BTD, mask)), agreement_x_BTD), None

    if settings.recompute:
        block_fn = jax.checkpoint(block_fn, policy=settings.policy, prevent_cse=False)
    # Exit l reads the input of block l, the array that full remat saves. So iteration l computes exit l. If it computed
    # exit l+1, from the block's output, full remat would have to recompute the block's down projection.
    weight_before_L = jnp.roll(alone_L, 1).at[0].set(0)  # no exit comes before block 0
    is_agreement_exit_L = jnp.arange(len(alone_L)) == settings.agreement_exit
    x_BTD = model.embed(batch.inputs_BT)
    start = Passed(x_BTD, model.head(), None if settings.distillation is None else jnp.zeros_like(x_BTD))
    agreement_x_BTD = None if settings.agreement is None else jnp.zeros_like(x_BTD)
    inputs = weight_before_L, jnp.roll(loss_slot_L, 1), is_agreement_exit_L, dropout_mask
    return run_layers(model.blocks, (start, agreement_x_BTD), block_fn, inputs)[0]


def block_with_dropout(
    model: Transformer, batch: Batch, settings: FusedSettings, dropout_mask: DropoutMask | None
) -> Callable[[Block, jax.Array, DropoutMask | None], jax.Array]:
    """Return ``x + M f(x)`` of LayerSkip eq. 1 as a function of a block, ``x_BTD``, and the block's M."""
    f = block_function(model)
    skips = dropout_mask is not None and settings.apply_dropout is not apply_masked
    # Skipping copies every residual into an array with a slot per row group. `save_matmuls` leaves fewer to copy.
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
    f, (norm_D, _) = block_function(model), model.head()

    def block_fn(block: Block, x_BTD: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        x_BTD = x_BTD + f(block, x_BTD, batch.segments_BT)
        return x_BTD, context.chunked.value((norm_D, context.gathered_matrix), x_BTD, context.labels)

    return run_layers(model.blocks, model.embed(batch.inputs_BT), block_fn, None)[1]


def block_function(model: Transformer) -> BlockFunction:
    """Return f of LayerSkip eq. 1: a block without its residual connection."""

    def f(block: Block, x_BTD: jax.Array, segments_BT: jax.Array) -> jax.Array:
        x_BTD = constrain(x_BTD, "batch", "length", None)
        # The tables are computed here, where they get the sharding of x along the length: each device then computes
        # them for its own positions only. They do not depend on x, so JAX moves them out of the forward scan.
        rotary = model.rotary_tables(jnp.arange(x_BTD.shape[1])[None])
        return block(x_BTD, rotary, segments_BT)[0]

    return f
