"""The loss of one exit in chunks of positions, with its gradients computed right after the logits of each chunk.

So no array of shape [B, T, V] exists, and every logit is computed once: 6 D V FLOPs per token and exit. C is the number
of positions of each sequence in a chunk.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from layerskip_jax.config import ModelConfig
from layerskip_jax.data.batch import Batch
from layerskip_jax.model import Head, Transformer, compute_dtype, unembed
from layerskip_jax.recipe.early_exit import ExitLoss
from layerskip_jax.recipe.exit_loss import ExitLosses
from layerskip_jax.sharding import constrain, mesh_size, on_each_device, sum_over

INNER_EXIT, LAST_EXIT = "inner_exit_loss", "last_exit_loss"
"""Named scopes of the conditionals that turn exits on or off, to find them in the text of a compiled program."""

Labels = tuple[jax.Array, jax.Array, Any]
"""``(targets_BT, mask_BT, teacher)``, or one chunk of each."""


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
        # The callers gather the matrix before the loop over chunks, so this constraint moves no data. Without it, the
        # partitioner may shard the matrix again and gather it in every chunk.
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
    """Values that all exits of a forward pass share."""

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

    def taught_by(self, loss: ExitLoss, x_BTD: jax.Array, share: ArrayLike) -> "ExitContext":
        """Return a copy that uses ``loss`` with the detached teacher ``(x, share)``."""
        targets_BT, mask_BT, _ = self.labels
        teacher = x_BTD, jnp.broadcast_to(jnp.asarray(share, jnp.float32), mask_BT.shape)
        labels = jax.lax.stop_gradient((targets_BT, mask_BT, teacher))
        return self._replace(loss=dataclasses.replace(self.loss, loss=loss), labels=labels)


def exit_with_saved_gradients(
    context: ExitContext, weight: jax.Array, x_BTD: jax.Array, d_matrix: nnx.Param
) -> tuple[jax.Array, nnx.Param, ExitLosses]:
    """Compute an exit's loss and all its gradients in the forward pass; attach those for ``x`` and the norm to it.

    Returns ``x`` unchanged, ``d_matrix`` plus this exit's weighted gradient of the head's matrix, and the losses (0 if
    the exit is off). `fused_exit_losses` attaches the final ``d_matrix`` once, for all exits.
    """

    def on(x_BTD: jax.Array, d_matrix: nnx.Param) -> Any:
        head, labels = context.gathered_head, context.labels
        value, d_x_BTD, (d_norm_D, exit_d_matrix) = context.loss.value_and_gradients(head, x_BTD, labels, weight)
        return value, (d_x_BTD, d_norm_D), add_resharded(d_matrix, exit_d_matrix)

    def off(x_BTD: jax.Array, d_matrix: nnx.Param) -> Any:
        return jnp.zeros(()), jax.tree.map(jnp.zeros_like, (x_BTD, context.head[0])), d_matrix

    value, gradient, d_matrix = jax.lax.cond(weight > 0, on, off, jax.lax.stop_gradient(x_BTD), d_matrix)
    objective = attach_gradient(weight * value, (x_BTD, context.head[0]), gradient)
    return x_BTD, d_matrix, ExitLosses(objective, value)


def exit_with_recomputed_logits(
    context: ExitContext, weight: jax.Array, x_BTD: jax.Array, d_matrix: nnx.Param
) -> tuple[jax.Array, nnx.Param, ExitLosses]:
    """Compute an exit's loss and the gradient of the head's matrix in the forward pass, the rest in the backward pass.

    Returns what `exit_with_saved_gradients` returns. The backward pass adds the exit's gradient to this ``x``.
    """

    def on(x_BTD: jax.Array, d_matrix: nnx.Param) -> Any:
        head, labels = context.gathered_head, context.labels
        value, _, (_, exit_d_matrix) = context.loss.value_and_gradients(head, x_BTD, labels, weight)
        return value, add_resharded(d_matrix, exit_d_matrix)

    def off(x_BTD: jax.Array, d_matrix: nnx.Param) -> Any:
        return jnp.zeros(()), d_matrix

    value, d_matrix = jax.lax.cond(weight > 0, on, off, jax.lax.stop_gradient(x_BTD), d_matrix)
    frozen = weight, context.gathered_head[1], context.labels
    x_BTD, value = attach_recomputed_gradient(context.loss, x_BTD, context.head[0], value, frozen)
    return x_BTD, d_matrix, ExitLosses(weight * value, jax.lax.stop_gradient(value))


def add_resharded(total: nnx.Param, d_matrix: nnx.Param) -> nnx.Param:
    """Reshard a gradient of the head's matrix like the parameter, and add it to ``total``."""
    axes = total.get_metadata()["axes"]
    return jax.tree.map(lambda a, b: a + constrain(b, *axes), total, d_matrix)


@jax.custom_vjp
def attach_gradient(value: jax.Array, at: Any, gradient: Any) -> jax.Array:
    """Return ``value``, and add ``gradient`` to its derivative with respect to ``at``.

    So a gradient that the forward pass computed counts as if JAX had differentiated the loss.
    """
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

    It adds the first one to the cotangent of ``x``. ``x`` passes through here so that the addition happens inside the
    conditional: an exit that is off then needs no array of zeros. ``frozen`` is the exit's weight, the head's matrix
    and the labels, which receive no gradient here. The weight only switches the exit on or off: the caller multiplies
    ``value`` by it, so the cotangent of ``value`` contains it.
    """
    return x_BTD, value


def _attach_forward(loss: ChunkedLoss, x_BTD: jax.Array, norm_D: nnx.Param, value: jax.Array, frozen: Any) -> Any:
    return (x_BTD, value), (x_BTD, norm_D, frozen)


def _attach_backward(loss: ChunkedLoss, residuals: Any, cotangents: tuple[jax.Array, jax.Array]) -> Any:
    x_BTD, norm_D, (weight, matrix, labels) = residuals
    d_x_BTD, d_value = cotangents

    def on(d_x_BTD: jax.Array) -> Any:
        _, exit_d_x_BTD, (d_norm_D, _) = loss.value_and_gradients((norm_D, matrix), x_BTD, labels, d_value)
        return d_x_BTD + exit_d_x_BTD, d_norm_D

    def off(d_x_BTD: jax.Array) -> Any:
        return d_x_BTD, jax.tree.map(jnp.zeros_like, norm_D)

    with jax.named_scope(INNER_EXIT):
        d_x_BTD, d_norm_D = jax.lax.cond(weight > 0, on, off, d_x_BTD)
    return d_x_BTD, d_norm_D, d_value, None


attach_recomputed_gradient.defvjp(_attach_forward, _attach_backward)
