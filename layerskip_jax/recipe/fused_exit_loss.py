"""Cross-entropy at the exits, computed inside the scan over layers, without ever holding [batch, length, vocab]."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from layerskip_jax.attention import SAVED_OUTPUT
from layerskip_jax.config import ModelConfig
from layerskip_jax.data.batch import Batch
from layerskip_jax.model import Block, Head, Transformer, compute_dtype, run_layers, unembed
from layerskip_jax.recipe.early_exit import ExitLoss, cross_entropy
from layerskip_jax.recipe.layer_dropout import BlockFunction, Rows, apply_masked
from layerskip_jax.sharding import constrain, mesh_size, on_each_device, row_major, sum_over

Apply = Callable[[BlockFunction, Block, Rows, jax.Array, jax.Array], jax.Array]
"""``(f, block, (x_BTD, segments_BT), kept_B, scale) -> x_BTD``: eq. 1, in the masked or the skipping form."""


INNER_EXIT, LAST_EXIT = "inner_exit_loss", "last_exit_loss"
"""The scopes of the conditions that turn exits on, in the text of a compiled program."""

BLOCK_INPUT = "block input"


def keep_matmuls(primitive: Any, *operands: Any, **parameters: Any) -> Any:
    """Save the outputs of matmuls and of attention kernels; the policy of remat dots."""
    policies = jax.checkpoint_policies
    splash_or_matmul = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(SAVED_OUTPUT)
    )
    # cuDNN's attention has no name to save it by, and its primitive is the same in every version since jax 0.4.31.
    return splash_or_matmul(primitive, *operands, **parameters) or primitive.name == "dot_product_attention_fwd_wrapper"


INPUTS_TO_HOST = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[BLOCK_INPUT],
    offload_src="device",
    offload_dst="pinned_host",
)


ROWS = ("batch",)
Labels = tuple[jax.Array, jax.Array, Any]
"""``targets_BT``, ``mask_BT`` and the guide of a recipe's exit loss, or a chunk of each."""


class Draw(NamedTuple):
    """Which blocks each sequence keeps, and by what a kept block's output is multiplied."""

    kept_LB: jax.Array
    scale_L: jax.Array


class ExitLosses(NamedTuple):
    """What the exits say of a batch: ``objective = sum_l weight_l loss_l`` (eq. 5), and summed losses [nats]."""

    objective: jax.Array
    loss_L: jax.Array


@dataclasses.dataclass(frozen=True)
class Exit:
    """What all exits of a model share; static under jit."""

    config: ModelConfig
    loss: ExitLoss
    chunk: int
    """Positions of each sequence that are unembedded at once; divides T, or exceeds it."""


def whole_matrix(axes: tuple[str, ...], matrix: jax.Array) -> jax.Array:
    """Gather a head's matrix on every device; a vocabulary that is split over devices stays split."""
    return constrain(matrix, *(axis if axis == "vocab" else None for axis in axes))


def exit_loss(
    one: Exit, head: Head, x_BTD: jax.Array, labels: Labels, cotangent: jax.Array, wants_x: bool, d_head: Any
) -> tuple[jax.Array, Any, Any]:
    """Return an exit's summed loss, and its vector-Jacobian products with ``cotangent``.

    They are ``(d_x_BTD, d_norm_D)`` if ``wants_x``, else None; and ``d_head`` with the head's added, if it is not None.
    """
    axes = head[1].get_metadata()["axes"]
    whole = partial(whole_matrix, axes)  # in the loop too: else every chunk would gather the head again

    def local_rows(x_BTD: jax.Array, labels: Labels, norm_D: Any, head: Any, cotangent: jax.Array) -> tuple[Any, ...]:
        """Go through a device's own rows; sum over the devices at the end."""
        B, T = x_BTD.shape[:2]
        C = min(one.chunk, T)
        parts = mesh_size("length")  # of a sequence that lies on several devices, a chunk takes some of each part

        def chunks(array: jax.Array) -> jax.Array:
            array = array.reshape(B, parts, T // C, C // parts, *array.shape[2:])
            return jnp.moveaxis(array, 2, 0).reshape(T // C, B, C, *array.shape[4:])

        def unchunk(d_x: jax.Array) -> jax.Array:
            d_x = d_x.reshape(T // C, B, parts, C // parts, -1)
            return jnp.moveaxis(d_x, 0, 2).reshape(x_BTD.shape)

        def add(carry: tuple[jax.Array, Any, Any], piece: tuple[jax.Array, Labels]) -> tuple[Any, Any]:
            (total, d_norm_D, d_head), (x_BCD, labels) = carry, piece

            def chunk_loss(x_BCD: jax.Array, norm_D: Any, head: Any) -> jax.Array:
                return one.loss(partial(unembed, one.config, (norm_D, jax.tree.map(whole, head))), x_BCD, *labels)

            if not wants_x and d_head is None:
                return (total + chunk_loss(x_BCD, norm_D, head), None, None), None
            value, pullback = jax.vjp(chunk_loss, x_BCD, norm_D, head)
            d_x_BCD, more_norm_D, more_head = pullback(cotangent)
            d_norm_D = jax.tree.map(jnp.add, d_norm_D, more_norm_D) if wants_x else None
            if d_head is not None:
                d_head = jax.tree.map(lambda a, b: whole(a + b), d_head, more_head)
            return (total + value, d_norm_D, d_head), d_x_BCD if wants_x else None

        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), head) if d_head is not None else None
        start = jnp.zeros(()), jax.tree.map(jnp.zeros_like, norm_D) if wants_x else None, zeros
        sums, d_x = jax.lax.scan(add, start, jax.tree.map(chunks, (x_BTD, labels)))
        return *sum_over("batch", sums), unchunk(d_x) if wants_x else None

    # shard_map over the batch: else the partitioner sums the head's gradient over the devices after every chunk.
    all_rows = on_each_device(local_rows, [ROWS, ROWS, (), (), ()], [(), (), (), ROWS], along=ROWS)
    value, d_norm_D, more, d_x_BTD = all_rows(x_BTD, labels, *head, cotangent)
    if d_head is not None:  # reshard the sum like the head
        d_head = jax.tree.map(lambda a, b: a + constrain(b, *axes), d_head, more)
    return value, (d_x_BTD, d_norm_D) if wants_x else None, d_head


@jax.custom_vjp
def with_gradient(value: jax.Array, at: Any, gradient: Any) -> jax.Array:
    """Identity on ``value``; its backward pass also emits the precomputed ``gradient`` for ``at``."""
    return value


with_gradient.defvjp(
    lambda value, at, gradient: (value, gradient),
    lambda gradient, d: (d, jax.tree.map(lambda leaf: (d * leaf).astype(leaf.dtype), gradient), None),
)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def with_later_gradient(
    one: Exit, x_BTD: jax.Array, norm_D: Any, value: jax.Array, weight: jax.Array, head_and_labels: Any
) -> tuple[jax.Array, jax.Array]:
    """Return ``x`` and ``value``; the backward pass recomputes the exit's logits and adds its gradient for ``x``.

    It adds inside the condition, so an exit that is off needs no array of zeros. The head's matrix gets no gradient
    here: the forward pass accumulates it.
    """
    return x_BTD, value


def _later_gradient(one: Exit, kept: Any, d: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    (x_BTD, norm_D, weight, (head, labels)), (d_x_BTD, d_value) = kept, d

    def on(d_x_BTD: jax.Array) -> Any:
        _, (more_BTD, d_norm_D), _ = exit_loss(one, (norm_D, head), x_BTD, labels, d_value, True, None)
        return d_x_BTD + more_BTD, d_norm_D

    def off(d_x_BTD: jax.Array) -> Any:
        return d_x_BTD, jax.tree.map(jnp.zeros_like, norm_D)

    with jax.named_scope(INNER_EXIT):
        return *jax.lax.cond(weight > 0, on, off, d_x_BTD), d_value, None, None


with_later_gradient.defvjp(
    lambda one, x_BTD, norm_D, value, *more: ((x_BTD, value), (x_BTD, norm_D, *more)), _later_gradient
)


def exit_losses(
    model: Transformer,
    batch: Batch,
    weight_L: jax.Array,
    *,
    chunk: int,
    draw: Draw | None = None,
    apply: Apply = apply_masked,
    remat: str = "none",
    train: bool = True,
    loss: ExitLoss = cross_entropy,
    guide: Any = None,
) -> ExitLosses:
    """Return the objective, and the loss of every exit whose weight is not zero (0 for the others).

    One forward pass (eq. 1) serves all exits. Iteration l of the scan takes the loss of exit l from the input of block
    l, and then runs that block; the last exit follows the scan. Each loss is under a condition, so one compiled program
    serves every step of a curriculum, and an exit that is off takes no FLOPs (eq. 5).

    Gradients are those of the objective. The forward pass accumulates the head's gradient in the scan's carry. Without
    remat it also saves each exit's gradient for ``x``: 6 D V FLOPs a token. With ``remat`` full or offload the backward
    pass recomputes the logits of inner exits: 8 D V. A loss at the block's *output* would make the backward pass
    recompute the down projection as well.

    ``loss`` is what an exit minimises; it gets the positions' parts of ``guide``, a tree of ``[B, T, ...]`` arrays.
    """
    one, head, dtype = Exit(model.config, loss, chunk), model.head(), compute_dtype(model.config)
    gather = partial(whole_matrix, head[1].get_metadata()["axes"])
    # Gathered once for all exits.
    fixed = jax.lax.stop_gradient((head[0], jax.tree.map(lambda matrix: gather(matrix.astype(dtype)), head[1])))
    labels = jax.lax.stop_gradient((batch.targets_BT, batch.mask_BT, guide))
    recomputes = train and remat in ("full", "offload")

    def at_exit(weight: jax.Array, x_BTD: jax.Array, d_head: Any, later: bool) -> tuple[jax.Array, Any, ExitLosses]:
        """Return ``x``, the head's gradient so far, and the losses of the exit that reads ``x``.

        Its gradient for ``x`` is computed now, or ``later``, in the backward pass.
        """
        now = train and not later

        def on(x_BTD: jax.Array, d_head: Any) -> Any:
            return exit_loss(one, fixed, x_BTD, labels, weight, now, d_head)

        def off(x_BTD: jax.Array, d_head: Any) -> Any:
            return jnp.zeros(()), jax.tree.map(jnp.zeros_like, (x_BTD, fixed[0])) if now else None, d_head

        value, gradient, d_head = jax.lax.cond(weight > 0, on, off, jax.lax.stop_gradient(x_BTD), d_head)
        if later:
            x_BTD, value = with_later_gradient(one, x_BTD, head[0], value, weight, (fixed[1], labels))
            return x_BTD, d_head, ExitLosses(weight * value, jax.lax.stop_gradient(value))
        weighted = weight * value
        if train:
            weighted = with_gradient(weighted, (x_BTD, head[0]), gradient)
        return x_BTD, d_head, ExitLosses(weighted, value)

    def f(block: Block, x_BTD: jax.Array, segments_BT: jax.Array) -> jax.Array:
        # Positions are made here, as each device makes its own, and JAX takes them out of the scan.
        x_BTD = constrain(x_BTD, "batch", "length", None)
        return block(x_BTD, model.positions(jnp.arange(x_BTD.shape[1])[None]), segments_BT)[0]

    # The skipping form copies its residuals, so save the outputs of matmuls and attention only, and recompute the rest.
    if remat == "dots" or (draw is not None and apply is not apply_masked):
        f = jax.checkpoint(f, policy=keep_matmuls, prevent_cse=False)

    def step(
        block: Block, carry: tuple[jax.Array, Any], inputs: tuple[jax.Array, jax.Array | None, jax.Array | None]
    ) -> tuple[Any, ExitLosses]:
        (x_BTD, d_head), (weight, kept_B, scale) = carry, inputs
        x_BTD = checkpoint_name(row_major(x_BTD), BLOCK_INPUT)
        with jax.named_scope(INNER_EXIT):
            x_BTD, d_head, exit_before = at_exit(weight, x_BTD, d_head, later=recomputes)
        if kept_B is None or scale is None:
            x_BTD = x_BTD + f(block, x_BTD, batch.segments_BT)
        else:
            x_BTD = apply(f, block, (x_BTD, batch.segments_BT), kept_B, scale)
        return (x_BTD, d_head), exit_before

    if recomputes:
        step = jax.checkpoint(step, policy=INPUTS_TO_HOST if remat == "offload" else None, prevent_cse=False)
    d_head = jax.tree.map(jnp.zeros_like, head[1]) if train else None
    kept_LB, scale_L = (None, None) if draw is None else draw
    weight_before_L = jnp.roll(weight_L, 1).at[0].set(0)  # no exit comes before the first block
    start, inputs = (model.embed(batch.inputs_BT), d_head), (weight_before_L, kept_LB, scale_L)
    (x_BTD, d_head), before_L = run_layers(model.blocks, start, step, inputs)
    with jax.named_scope(LAST_EXIT):
        x_BTD, d_head, last = at_exit(weight_L[-1], x_BTD, d_head, later=False)
    objective = jnp.sum(before_L.objective) + last.objective
    loss_L = jnp.append(before_L.loss_L[1:], last.loss_L)
    return ExitLosses(with_gradient(objective, head[1], d_head) if train else objective, loss_L)
