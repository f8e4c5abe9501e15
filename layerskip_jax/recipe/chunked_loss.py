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
        """Return the loss, and its gradients ``d_x_BTD`` and ``d_head`` times ``cotangent``."""

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
    """What an exit needs besides its hidden state."""

    loss: ChunkedLoss
    labels: Labels
    norm_D: nnx.Param
    """The head's norm, which receives gradients."""
    gathered_matrix: nnx.Param
    """The head's matrix in the compute dtype, gathered once for all exits; no gradient passes through it."""

    @classmethod
    def create(cls, model: Transformer, batch: Batch, loss: ChunkedLoss, teacher: Any) -> "ExitContext":
        """Gather the head of ``model`` and collect the labels of ``batch``."""
        norm_D, matrix = model.head()
        dtype = compute_dtype(model.config)
        gathered_matrix = gather(jax.tree.map(lambda leaf: leaf.astype(dtype), matrix))
        labels = batch.targets_BT, batch.mask_BT, teacher
        return cls(loss, jax.lax.stop_gradient(labels), norm_D, jax.lax.stop_gradient(gathered_matrix))

    @property
    def head(self) -> Head:
        return self.norm_D, self.gathered_matrix

    def taught_by(self, loss: ExitLoss, x_BTD: jax.Array | None, share: ArrayLike) -> "ExitContext":
        """Return a copy that uses ``loss`` with the detached teacher ``(x, share)``; without ``x``, with x_L."""
        targets_BT, mask_BT, _ = self.labels
        share_BT = jnp.broadcast_to(jnp.asarray(share, jnp.float32), mask_BT.shape)
        teacher = jax.lax.stop_gradient(LastExit(share_BT) if x_BTD is None else (x_BTD, share_BT))
        return self._replace(loss=dataclasses.replace(self.loss, loss=loss), labels=(targets_BT, mask_BT, teacher))


class LastExit(NamedTuple):
    """The teacher ``(x_L, share)`` of an inner exit, without x_L, which only the backward pass knows."""

    share_BT: jax.Array


class Passed(NamedTuple):
    """What passes through the exits: values in the forward pass, cotangents in the backward pass."""

    x_BTD: jax.Array
    """The hidden state. Its cotangent is the gradient of the later exits, to which each exit adds its own."""
    matrix: nnx.Param
    """The head's matrix. Its cotangent accumulates the gradients of all exits."""
    last_x_BTD: jax.Array | None
    """Zeros. The cotangent is x_L: so the backward pass brings x_L to the exits that the last exit teaches."""


def add_resharded(total: nnx.Param, d_matrix: nnx.Param) -> nnx.Param:
    """Reshard a gradient of the head's matrix like the parameter, and add it to ``total``."""
    axes = total.get_metadata()["axes"]
    return jax.tree.map(lambda a, b: a + constrain(b, *axes), total, d_matrix)


def exit_in_backward_pass(
    context: ExitContext, scope: str, weight: jax.Array, passed: Passed, loss: jax.Array
) -> Passed:
    """Return ``passed`` unchanged; in the backward pass, compute the exit's loss and add its gradients.

    The gradients are those of ``weight`` times the loss. The loss is returned as the cotangent of ``loss``, a number
    that nothing reads. The only residual is ``x``, which the next block saves anyway. An exit of weight 0 computes
    nothing. ``scope`` names the conditional.
    """
    frozen = weight, context.gathered_matrix, context.labels
    return _exit(context.loss, scope, passed, context.norm_D, loss, frozen)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _exit(chunked: ChunkedLoss, scope: str, passed: Passed, norm_D: nnx.Param, loss: jax.Array, frozen: Any) -> Passed:
    return passed


def _exit_forward(
    chunked: ChunkedLoss, scope: str, passed: Passed, norm_D: nnx.Param, loss: jax.Array, frozen: Any
) -> tuple[Passed, Any]:
    return passed, (passed.x_BTD, norm_D, frozen)


def _exit_backward(chunked: ChunkedLoss, scope: str, residuals: Any, cotangent: Passed) -> tuple[Any, ...]:
    x_BTD, norm_D, (weight, gathered_matrix, labels) = residuals

    # The additions are inside the conditional: an exit that is off then needs no arrays of zeros.
    def on(d: Passed) -> tuple[Passed, nnx.Param, jax.Array]:
        targets_BT, mask_BT, teacher = labels
        if isinstance(teacher, LastExit):
            teacher = d.last_x_BTD, teacher.share_BT
        head, labels_BT = (norm_D, gathered_matrix), (targets_BT, mask_BT, teacher)
        value, d_x_BTD, (d_norm_D, d_matrix) = chunked.value_and_gradients(head, x_BTD, labels_BT, weight)
        return Passed(d.x_BTD + d_x_BTD, add_resharded(d.matrix, d_matrix), d.last_x_BTD), d_norm_D, value

    def off(d: Passed) -> tuple[Passed, nnx.Param, jax.Array]:
        return d, jax.tree.map(jnp.zeros_like, norm_D), jnp.zeros(())

    with jax.named_scope(scope):
        return *jax.lax.cond(weight > 0, on, off, cotangent), None


_exit.defvjp(_exit_forward, _exit_backward)
