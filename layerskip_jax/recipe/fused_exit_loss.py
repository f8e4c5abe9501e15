"""The exit loss of `exit_loss`, computed in chunks of positions and with the head's gradient in the forward pass.

The plain form saves the logits of every exit for the backward pass. This form computes the gradients of a chunk right
after its logits. So it holds no array of shape [B, T, V], and still computes every logit once: 6 D V FLOPs per token
and exit. C is the number of positions of each sequence in a chunk.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike

from layerskip_jax.attention import SAVED_OUTPUT
from layerskip_jax.config import ModelConfig
from layerskip_jax.data.batch import Batch
from layerskip_jax.model import Block, Head, Transformer, compute_dtype, run_layers, unembed
from layerskip_jax.recipe.early_exit import ExitLoss, cross_entropy
from layerskip_jax.recipe.exit_loss import ExitLosses
from layerskip_jax.recipe.layer_dropout import ApplyDropout, BlockFunction, DropoutMask, apply_masked
from layerskip_jax.sharding import constrain, mesh_size, on_each_device, row_major, sum_over

INNER_EXIT, LAST_EXIT = "inner_exit_loss", "last_exit_loss"
"""Named scopes of the conditionals that turn exits on or off, to find them in the text of a compiled program."""

BLOCK_INPUT = "block input"

OFFLOAD_BLOCK_INPUTS = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[BLOCK_INPUT],
    offload_src="device",
    offload_dst="pinned_host",
)

Labels = tuple[jax.Array, jax.Array, Any]
"""``(targets_BT, mask_BT, teacher)``, or one chunk of each."""


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
    """What the backward pass recomputes: ``train.remat``."""
    loss: ExitLoss = cross_entropy
    apply_dropout: ApplyDropout = apply_masked
    exits: tuple[int, ...] = ()
    """If not empty, no other exits than these and the last may have a weight above 0."""
    distillation: ExitLoss | None = None
    """Takes the place of ``loss`` at ``exits``, which must then be given; its teacher is ``(x_L, share)``."""

    @property
    def recompute(self) -> bool:
        """Whether the backward pass recomputes a block from its input."""
        return self.remat in ("full", "offload")

    @property
    def policy(self) -> Any:
        """Where the inputs of blocks are saved if `recompute`."""
        return OFFLOAD_BLOCK_INPUTS if self.remat == "offload" else None


def fused_exit_losses(
    model: Transformer,
    batch: Batch,
    weight_L: jax.Array,
    settings: FusedSettings,
    dropout_mask: DropoutMask | None = None,
    teacher: Any = None,
    share: ArrayLike = 1.0,
) -> ExitLosses:
    """Return what `exit_losses` returns, with the gradient of the objective (LayerSkip eq. 5) already computed.

    Each exit is inside a conditional on its weight: one compiled program serves every step of a curriculum, and an
    exit of weight 0 costs no FLOPs. The carry of the scan over blocks accumulates the gradient of the head. With
    ``remat`` none or dots, the forward pass also computes each exit's gradient with respect to ``x``. With full or
    offload, the backward pass recomputes the logits of inner exits instead of saving that gradient: 8 D V FLOPs per
    token.

    If ``settings.exits`` names the exits, their losses follow the scan, which only keeps their inputs. Their gradients
    then take memory for these exits alone, and the last exit can be their teacher.

    Only the objective has a gradient; ``loss_L`` has none.
    """
    weight_L = jnp.asarray(weight_L, jnp.float32)  # custom_vjp needs a float
    exits = ExitContext.create(model, batch, ChunkedLoss(model.config, settings.loss, settings.chunk), teacher)
    if settings.exits:
        x_BTD, d_matrix, inner = exits_after_scan(model, batch, weight_L, settings, dropout_mask, exits, share)
    else:
        x_BTD, d_matrix, inner = exits_within_scan(model, batch, weight_L, settings, dropout_mask, exits)
    with jax.named_scope(LAST_EXIT):
        x_BTD, d_matrix, last = exit_with_saved_gradients(exits, weight_L[-1], x_BTD, d_matrix)
    objective = attach_gradient(jnp.sum(inner.objective) + last.objective, exits.head[1], d_matrix)
    return ExitLosses(objective, jnp.append(inner.loss_L, last.loss_L))


def exits_within_scan(
    model: Transformer,
    batch: Batch,
    weight_L: jax.Array,
    settings: FusedSettings,
    dropout_mask: DropoutMask | None,
    exits: "ExitContext",
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
            x_BTD, d_matrix, losses = inner_exit(exits, weight, x_BTD, d_matrix)
        return (run_block(block, x_BTD, mask), d_matrix), losses

    if recompute:
        block_fn = jax.checkpoint(block_fn, policy=settings.policy, prevent_cse=False)
    # Iteration l computes the exit before block l, whose input x is the iteration's saved input. The exit after block l
    # would need the block's output, so full remat would also recompute the block's down projection.
    weight_before_L = jnp.roll(weight_L, 1).at[0].set(0)  # no exit comes before block 0
    start = model.embed(batch.inputs_BT), jax.tree.map(jnp.zeros_like, exits.head[1])
    (x_BTD, d_matrix), inner = run_layers(model.blocks, start, block_fn, (weight_before_L, dropout_mask))
    return x_BTD, d_matrix, jax.tree.map(itemgetter(slice(1, None)), inner)


def exits_after_scan(
    model: Transformer,
    batch: Batch,
    weight_L: jax.Array,
    settings: FusedSettings,
    dropout_mask: DropoutMask | None,
    exits: "ExitContext",
    share: ArrayLike,
) -> tuple[jax.Array, nnx.Param, ExitLosses]:
    """Run all blocks, then compute the losses of ``settings.exits``; return what `exits_within_scan` returns."""
    run_block = block_with_dropout(model, batch, settings, dropout_mask)
    K, L = len(settings.exits), model.config.num_layers

    def run_named_block(block: Block, x_BTD: jax.Array, mask: DropoutMask | None) -> jax.Array:
        return run_block(block, checkpoint_name(x_BTD, BLOCK_INPUT), mask)

    if settings.recompute:
        run_named_block = jax.checkpoint(run_named_block, policy=settings.policy, prevent_cse=False)

    def block_fn(
        block: Block, carry: tuple[jax.Array, jax.Array], inputs: tuple[jax.Array, DropoutMask | None]
    ) -> tuple[Any, None]:
        (x_BTD, kept_KBTD), (slot, mask) = carry, inputs
        x_BTD = row_major(x_BTD)
        kept_KBTD = jax.lax.dynamic_update_index_in_dim(kept_KBTD, x_BTD, slot, 0)
        return (run_named_block(block, x_BTD, mask), kept_KBTD), None

    # The input of block e is the output of exit e. Nothing reads slot K, to which all other blocks write: an update of
    # one slot happens in place, but a conditional would copy all slots.
    slot_L = jnp.full(L, K).at[jnp.array(settings.exits)].set(jnp.arange(K))
    x_BTD = model.embed(batch.inputs_BT)
    kept_KBTD = constrain(jnp.zeros((K + 1, *x_BTD.shape), x_BTD.dtype), None, "batch", "length", None)
    (x_BTD, kept_KBTD), _ = run_layers(model.blocks, (x_BTD, kept_KBTD), block_fn, (slot_L, dropout_mask))

    if settings.distillation is not None:
        loss = dataclasses.replace(exits.loss, loss=settings.distillation)
        share_BT = jnp.broadcast_to(jnp.asarray(share, jnp.float32), batch.mask_BT.shape)
        taught = batch.targets_BT, batch.mask_BT, (x_BTD, share_BT)
        exits = exits._replace(loss=loss, labels=jax.lax.stop_gradient(taught))

    def exit_fn(d_matrix: nnx.Param, inputs: tuple[jax.Array, jax.Array]) -> tuple[nnx.Param, ExitLosses]:
        with jax.named_scope(INNER_EXIT):
            _, d_matrix, losses = exit_with_saved_gradients(exits, *inputs, d_matrix)
        return d_matrix, losses

    place_K = jnp.array(settings.exits) - 1
    no_gradient = jax.tree.map(jnp.zeros_like, exits.head[1])
    d_matrix, losses = jax.lax.scan(exit_fn, no_gradient, (weight_L[place_K], kept_KBTD[:K]))
    return x_BTD, d_matrix, jax.tree.map(lambda values: jnp.zeros(L - 1).at[place_K].set(values), losses)


def block_with_dropout(
    model: Transformer, batch: Batch, settings: FusedSettings, dropout_mask: DropoutMask | None
) -> Callable[[Block, jax.Array, DropoutMask | None], jax.Array]:
    """Return ``x + M f(x)`` of LayerSkip eq. 1 as a function of a block, ``x_BTD``, and the block's M."""
    f = block_function(model)
    skips = dropout_mask is not None and settings.apply_dropout is not apply_masked
    if settings.remat == "dots" or skips:  # `apply_skipping` copies every saved residual, so save less
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
    exits = ExitContext.create(model, batch, ChunkedLoss(model.config, loss, chunk), teacher)
    f = block_function(model)

    def block_fn(block: Block, x_BTD: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        x_BTD = x_BTD + f(block, x_BTD, batch.segments_BT)
        return x_BTD, exits.loss.value(exits.gathered_head, x_BTD, exits.labels)

    return run_layers(model.blocks, model.embed(batch.inputs_BT), block_fn, None)[1]


def block_function(model: Transformer) -> BlockFunction:
    """Return f of LayerSkip eq. 1: a block without its residual connection."""

    def f(block: Block, x_BTD: jax.Array, segments_BT: jax.Array) -> jax.Array:
        x_BTD = constrain(x_BTD, "batch", "length", None)
        # Inside f, each device computes the tables of its own positions. JAX hoists them out of the scan.
        rotary = model.rotary_tables(jnp.arange(x_BTD.shape[1])[None])
        return block(x_BTD, rotary, segments_BT)[0]

    return f


@dataclasses.dataclass(frozen=True)
class ChunkedLoss:
    """The loss of one exit, summed over the counted positions of a batch [nats]; static under jit.

    Each device loops over chunks of its own sequences, and the sums over devices follow the loop. Without
    `on_each_device` the partitioner would sum the head's gradient over the devices after every chunk.
    """

    config: ModelConfig
    loss: ExitLoss
    chunk: int

    def value(self, head: Head, x_BTD: jax.Array, labels: Labels) -> jax.Array:
        """Return the loss."""

        def local_value(x_BTD: jax.Array, labels: Labels, *head: nnx.Param) -> jax.Array:
            def add_chunk(total: jax.Array, chunk: tuple[jax.Array, Labels]) -> tuple[jax.Array, None]:
                x_BCD, labels = chunk
                return total + self._chunk_value(labels, x_BCD, *head), None

            total, _ = jax.lax.scan(add_chunk, jnp.zeros(()), self._split((x_BTD, labels)))
            return sum_over("batch", total)

        batch, replicated = ("batch",), ()
        on_devices = on_each_device(local_value, [batch, batch, replicated, replicated], replicated, along=batch)
        return on_devices(x_BTD, labels, *head)

    def value_and_gradients(
        self, head: Head, x_BTD: jax.Array, labels: Labels, cotangent: jax.Array
    ) -> tuple[jax.Array, jax.Array, Head]:
        """Return the loss, and its gradients ``d_x_BTD`` and ``d_head`` times ``cotangent``.

        XLA removes the computation of a gradient that the caller does not use.
        """

        def local_gradients(x_BTD: jax.Array, labels: Labels, cotangent: jax.Array, *head: nnx.Param) -> Any:
            def add_chunk(sums: Any, chunk: tuple[jax.Array, Labels]) -> tuple[Any, jax.Array]:
                x_BCD, labels = chunk
                value, pullback = jax.vjp(partial(self._chunk_value, labels), x_BCD, *head)
                d_x_BCD, *d_head = pullback(cotangent)
                value, d_norm_D, d_matrix = jax.tree.map(jnp.add, sums, (value, *d_head))
                return (value, d_norm_D, gather(d_matrix)), d_x_BCD

            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), head)
            sums, d_x = jax.lax.scan(add_chunk, (jnp.zeros(()), *zeros), self._split((x_BTD, labels)))
            return *sum_over("batch", sums), join_chunks(d_x)

        batch, replicated = ("batch",), ()
        inputs = [batch, batch, replicated, replicated, replicated]
        on_devices = on_each_device(local_gradients, inputs, [replicated, replicated, replicated, batch], along=batch)
        value, d_norm_D, d_matrix, d_x_BTD = on_devices(x_BTD, labels, cotangent, *head)
        return value, d_x_BTD, (d_norm_D, d_matrix)

    def _chunk_value(self, labels: Labels, x_BCD: jax.Array, norm_D: nnx.Param, matrix: nnx.Param) -> jax.Array:
        # Repeat the constraint inside the loop, where it moves nothing; else the partitioner may gather in every chunk.
        g = partial(unembed, self.config, (norm_D, gather(matrix)))
        return self.loss(g, x_BCD, *labels)

    def _split(self, arrays: Any) -> Any:
        return jax.tree.map(partial(split_chunks, chunk=self.chunk), arrays)


def split_chunks(array: jax.Array, chunk: int) -> jax.Array:
    """[B, T, ...] -> [T/C, B, C, ...].

    If T is split over devices, every chunk takes the same number of positions from each part, so that none moves.
    """
    (B, T), C, parts = array.shape[:2], min(chunk, array.shape[1]), mesh_size("length")
    array = array.reshape(B, parts, T // C, C // parts, *array.shape[2:])
    return jnp.moveaxis(array, 2, 0).reshape(T // C, B, C, *array.shape[4:])


def join_chunks(chunks: jax.Array) -> jax.Array:
    """[T/C, B, C, D] -> [B, T, D]: the inverse of `split_chunks`."""
    (count, B, C, D), parts = chunks.shape, mesh_size("length")
    chunks = chunks.reshape(count, B, parts, C // parts, D)
    return jnp.moveaxis(chunks, 0, 2).reshape(B, count * C, D)


def gather(matrix: nnx.Param) -> nnx.Param:
    """Gather the head's matrix on every device, except along a vocabulary split by tensor parallelism."""
    axes = [axis if axis == "vocab" else None for axis in matrix.get_metadata()["axes"]]
    return jax.tree.map(lambda leaf: constrain(leaf, *axes), matrix)


class ExitContext(NamedTuple):
    """What all exits of a forward pass share."""

    loss: ChunkedLoss
    labels: Labels
    head: Head
    """The parameters, which receive gradients."""
    gathered_head: Head
    """Their values in the compute dtype, gathered once for all exits; no gradient passes through them."""

    @classmethod
    def create(cls, model: Transformer, batch: Batch, loss: ChunkedLoss, teacher: Any) -> "ExitContext":
        """Gather the head of ``model`` and collect the labels of ``batch``."""
        norm_D, matrix = head = model.head()
        dtype = compute_dtype(model.config)
        gathered_head = norm_D, gather(jax.tree.map(lambda leaf: leaf.astype(dtype), matrix))
        labels = batch.targets_BT, batch.mask_BT, teacher
        return cls(loss, jax.lax.stop_gradient(labels), head, jax.lax.stop_gradient(gathered_head))


def exit_with_saved_gradients(
    exits: ExitContext, weight: jax.Array, x_BTD: jax.Array, d_matrix: nnx.Param
) -> tuple[jax.Array, nnx.Param, ExitLosses]:
    """Compute an exit's loss and all its gradients now; save those for ``x`` and the norm for the backward pass.

    Returns ``x``, ``d_matrix`` plus the gradient of the head's matrix, and the losses.
    """

    def on(x_BTD: jax.Array, d_matrix: nnx.Param) -> Any:
        head, labels = exits.gathered_head, exits.labels
        value, d_x_BTD, (d_norm_D, exit_d_matrix) = exits.loss.value_and_gradients(head, x_BTD, labels, weight)
        return value, (d_x_BTD, d_norm_D), add_resharded(d_matrix, exit_d_matrix)

    def off(x_BTD: jax.Array, d_matrix: nnx.Param) -> Any:
        return jnp.zeros(()), jax.tree.map(jnp.zeros_like, (x_BTD, exits.head[0])), d_matrix

    value, gradient, d_matrix = jax.lax.cond(weight > 0, on, off, jax.lax.stop_gradient(x_BTD), d_matrix)
    objective = attach_gradient(weight * value, (x_BTD, exits.head[0]), gradient)
    return x_BTD, d_matrix, ExitLosses(objective, value)


def exit_with_recomputed_logits(
    exits: ExitContext, weight: jax.Array, x_BTD: jax.Array, d_matrix: nnx.Param
) -> tuple[jax.Array, nnx.Param, ExitLosses]:
    """Compute an exit's loss and the gradient of the head's matrix now, and the other gradients in the backward pass.

    Returns what `exit_with_saved_gradients` returns.
    """

    def on(x_BTD: jax.Array, d_matrix: nnx.Param) -> Any:
        head, labels = exits.gathered_head, exits.labels
        value, _, (_, exit_d_matrix) = exits.loss.value_and_gradients(head, x_BTD, labels, weight)
        return value, add_resharded(d_matrix, exit_d_matrix)

    def off(x_BTD: jax.Array, d_matrix: nnx.Param) -> Any:
        return jnp.zeros(()), d_matrix

    value, d_matrix = jax.lax.cond(weight > 0, on, off, jax.lax.stop_gradient(x_BTD), d_matrix)
    frozen = weight, exits.gathered_head[1], exits.labels
    x_BTD, value = attach_recomputed_gradient(exits.loss, x_BTD, exits.head[0], value, frozen)
    return x_BTD, d_matrix, ExitLosses(weight * value, jax.lax.stop_gradient(value))


def add_resharded(total: nnx.Param, d_matrix: nnx.Param) -> nnx.Param:
    """Reshard a gradient of the head's matrix like the parameter, and add it to ``total``."""
    axes = total.get_metadata()["axes"]
    return jax.tree.map(lambda a, b: a + constrain(b, *axes), total, d_matrix)


@jax.custom_vjp
def attach_gradient(value: jax.Array, at: Any, gradient: Any) -> jax.Array:
    """Return ``value``; in the backward pass, ``at`` receives ``gradient`` times the cotangent of ``value``."""
    return value


attach_gradient.defvjp(
    lambda value, at, gradient: (value, gradient),
    lambda gradient, d: (d, jax.tree.map(lambda leaf: (d * leaf).astype(leaf.dtype), gradient), None),
)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attach_recomputed_gradient(
    loss: ChunkedLoss, x_BTD: jax.Array, norm_D: nnx.Param, value: jax.Array, frozen: tuple[jax.Array, Any, Labels]
) -> tuple[jax.Array, jax.Array]:
    """Return ``x`` and ``value``; the backward pass recomputes the logits for the gradients of ``x`` and the norm.

    ``frozen`` is the exit's weight, the head's matrix and the labels, which receive no gradient here.
    """
    return x_BTD, value


def _attach_forward(loss: ChunkedLoss, x_BTD: jax.Array, norm_D: nnx.Param, value: jax.Array, frozen: Any) -> Any:
    return (x_BTD, value), (x_BTD, norm_D, frozen)


def _attach_backward(loss: ChunkedLoss, residuals: Any, cotangents: tuple[jax.Array, jax.Array]) -> Any:
    x_BTD, norm_D, (weight, matrix, labels) = residuals
    d_x_BTD, d_value = cotangents

    # Add inside the conditional, so that an exit that is off needs no array of zeros.
    def on(d_x_BTD: jax.Array) -> Any:
        _, exit_d_x_BTD, (d_norm_D, _) = loss.value_and_gradients((norm_D, matrix), x_BTD, labels, d_value)
        return d_x_BTD + exit_d_x_BTD, d_norm_D

    def off(d_x_BTD: jax.Array) -> Any:
        return d_x_BTD, jax.tree.map(jnp.zeros_like, norm_D)

    with jax.named_scope(INNER_EXIT):
        d_x_BTD, d_norm_D = jax.lax.cond(weight > 0, on, off, d_x_BTD)
    return d_x_BTD, d_norm_D, d_value, None


attach_recomputed_gradient.defvjp(_attach_forward, _attach_backward)
