"""Cross-entropy at the exits, computed inside the scan over layers, without ever holding [batch, length, vocab]."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from layerskip_jax.attention import SAVED_OUTPUT
from layerskip_jax.early_exit import ExitLoss, cross_entropy
from layerskip_jax.layer_dropout import BlockFunction, Rows, apply_masked
from layerskip_jax.model import Block, Transformer, run_layers
from layerskip_jax.sharding import constrain, mesh_size, on_each_device, sum_over

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


ROWS = ("batch",)
Labels = tuple[jax.Array, jax.Array, Any]
"""``targets_BT``, ``mask_BT`` and the guide of a recipe's exit loss, or a chunk of each."""


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


class ExitLosses(NamedTuple):
    """What the exits say of a batch: ``objective = sum_l weight_l loss_l`` (eq. 5), and summed losses [nats]."""

    objective: jax.Array
    loss_L: jax.Array


def exit_loss(
    model: Transformer,
    x_BTD: jax.Array,
    labels: Labels,
    loss: ExitLoss,
    chunk: int,
    weight: jax.Array,
    of_x: bool,
    d_head: Any,
) -> tuple[jax.Array, Any, Any]:
    """Return an exit's summed ``loss``, and the gradients of ``weight`` times it that are asked for.

    They are ``(d_x_BTD, d_norm_D)`` (``of_x``), and ``d_head``, added to the one that comes in (None: not asked for).
    Only ``chunk`` positions of each sequence are unembedded at once; it divides T or exceeds it.
    """
    norm_D, kept_head = model.head()
    axes = kept_head.get_metadata()["axes"]
    # Whole on every device but for a split vocabulary, around the loop and in it: else each chunk would gather it.
    whole = lambda matrix: constrain(matrix, *(axis if axis == "vocab" else None for axis in axes))  # noqa: E731
    head = jax.tree.map(lambda matrix: whole(matrix.astype(x_BTD.dtype)), kept_head)

    def of_rows(x_BTD: jax.Array, labels: Labels, norm_D: Any, head: Any, weight: jax.Array) -> tuple[Any, ...]:
        """Go through a device's own rows; what all rows add up to is summed over the devices at the end."""
        B, T = x_BTD.shape[:2]
        C = min(chunk, T)
        parts = mesh_size("length")  # of a sequence that lies on several devices, a chunk takes some of each part

        def chunks(array: jax.Array) -> jax.Array:
            array = array.reshape(B, parts, T // C, C // parts, *array.shape[2:])
            return jnp.moveaxis(array, 2, 0).reshape(T // C, B, C, *array.shape[4:])

        def joined(d_x: jax.Array) -> jax.Array:
            d_x = d_x.reshape(T // C, B, parts, C // parts, -1)
            return jnp.moveaxis(d_x, 0, 2).reshape(x_BTD.shape)

        def add(carry: tuple[jax.Array, Any, Any], piece: tuple[jax.Array, Labels]) -> tuple[Any, Any]:
            (total, d_norm_D, d_head), (x_BCD, labels) = carry, piece

            def of_chunk(x_BCD: jax.Array, norm_D: Any, head: Any) -> jax.Array:
                return loss(partial(model.unembed, head=(norm_D, jax.tree.map(whole, head))), x_BCD, *labels)

            if not of_x and d_head is None:
                return (total + of_chunk(x_BCD, norm_D, head), None, None), None
            value, pullback = jax.vjp(of_chunk, x_BCD, norm_D, head)
            d_x_BCD, more_norm_D, more_head = pullback(weight)
            d_norm_D = jax.tree.map(jnp.add, d_norm_D, more_norm_D) if of_x else None
            if d_head is not None:
                d_head = jax.tree.map(lambda a, b: whole(a + b), d_head, more_head)
            return (total + value, d_norm_D, d_head), d_x_BCD if of_x else None

        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), head) if d_head is not None else None
        start = jnp.zeros(()), jax.tree.map(jnp.zeros_like, norm_D) if of_x else None, zeros
        sums, d_x = jax.lax.scan(add, start, jax.tree.map(chunks, (x_BTD, labels)))
        return *sum_over("batch", sums), joined(d_x) if of_x else None

    # Each device by itself: the compiler would sum the head's gradient over the devices after every chunk.
    of_devices = on_each_device(of_rows, [ROWS, ROWS, (), (), ()], [(), (), (), ROWS], along=ROWS)
    value, d_norm_D, more, d_x_BTD = of_devices(x_BTD, labels, norm_D, head, weight)
    if d_head is not None:  # lies as the head does
        d_head = jax.tree.map(lambda a, b: a + constrain(b, *axes), d_head, more)
    return value, (d_x_BTD, d_norm_D) if of_x else None, d_head


@jax.custom_vjp
def with_gradient(value: jax.Array, at: Any, gradient: Any) -> jax.Array:
    """Return ``value``, to whose own gradient one with respect to ``at`` is added that is known already."""
    return value


with_gradient.defvjp(
    lambda value, at, gradient: (value, gradient),
    lambda gradient, d: (d, jax.tree.map(lambda leaf: (d * leaf).astype(leaf.dtype), gradient), None),
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

    One forward pass (eq. 1) serves all exits; the loss after block l sits in the scan's body under a condition, so
    one compiled program serves every step of a curriculum and an exit that is off costs nothing (eq. 5). Gradients are
    those of the objective, and with ``train`` they are computed on the way: each exit's own for ``x`` waits for the
    backward pass; that of the head, which all exits share, is summed up through the scan. So a token costs an exit
    6 D V operations, where logits computed again would make it 8 (as they do where ``remat`` keeps inputs alone).

    ``loss`` is what an exit minimises; it gets the positions' parts of ``guide``, a tree of ``[B, T, ...]`` arrays.
    """
    fixed = jax.lax.stop_gradient(model)
    labels = jax.lax.stop_gradient((batch.targets_BT, batch.mask_BT, guide))
    recomputes = remat in ("full", "offload")

    def if_on(weight: jax.Array, x_BTD: jax.Array, of_x: bool, d_head: Any) -> Any:
        def on(x_BTD: jax.Array, d_head: Any) -> Any:
            return exit_loss(fixed, x_BTD, labels, loss, chunk, weight, of_x, d_head)

        def off(x_BTD: jax.Array, d_head: Any) -> Any:
            nothing = jax.tree.map(jnp.zeros_like, (x_BTD, fixed.final_norm_D)) if of_x else None
            return jnp.zeros(()), nothing, d_head

        with jax.named_scope(EXIT_LOSS):
            return jax.lax.cond(weight > 0, on, off, jax.lax.stop_gradient(x_BTD), d_head)

    def f(block: Block, x_BTD: jax.Array, segments_BT: jax.Array) -> jax.Array:
        # Positions are made here, as each device makes its own, and JAX takes them out of the scan.
        x_BTD = constrain(x_BTD, "batch", "length", None)
        return block(x_BTD, model.positions(jnp.arange(x_BTD.shape[1])[None]), segments_BT)[0]

    # The skipping form copies what it keeps to its place, so there the products alone are kept, and computing the rest
    # again takes less time.
    if remat == "dots" or (draw is not None and apply is not apply_masked):
        f = jax.checkpoint(f, policy=KEEP_PRODUCTS, prevent_cse=False)

    def step(
        block: Block, carry: tuple[jax.Array, Any], inputs: tuple[jax.Array, jax.Array | None, jax.Array | None]
    ) -> tuple[Any, ExitLosses]:
        (x_BTD, d_head), (weight, kept_B, scale) = carry, inputs
        x_BTD = checkpoint_name(x_BTD, BLOCK_INPUT)
        if kept_B is None or scale is None:
            x_BTD = x_BTD + f(block, x_BTD, batch.segments_BT)
        else:
            x_BTD = apply(f, block, (x_BTD, batch.segments_BT), kept_B, scale)
        value, of_x, d_head = if_on(weight, x_BTD, train and not recomputes, d_head)
        if not train:
            return (x_BTD, d_head), ExitLosses(weight * value, value)
        if recomputes:
            # Apart from the head's, so that the forward pass leaves this out, and the recomputation that.
            _, of_x, _ = if_on(weight, x_BTD, True, None)
        return (x_BTD, d_head), ExitLosses(with_gradient(weight * value, (x_BTD, model.final_norm_D), of_x), value)

    if recomputes:
        step = jax.checkpoint(step, policy=INPUTS_TO_HOST if remat == "offload" else None, prevent_cse=False)
    d_head = jax.tree.map(jnp.zeros_like, fixed.head()[1]) if train else None
    kept_LB, scale_L = (None, None) if draw is None else draw
    start, inputs = (model.embed(batch.inputs_BT), d_head), (weight_L, kept_LB, scale_L)
    (_, d_head), (objective_L, loss_L) = run_layers(model.blocks, start, step, inputs)
    objective = jnp.sum(objective_L)
    return ExitLosses(with_gradient(objective, model.head()[1], d_head) if train else objective, loss_L)
