"""The loss of an exit in chunks of positions, with its gradients computed right after the logits of each chunk.

So the logits exist for one chunk at a time, and are computed once: 6 D V FLOPs per token and exit, and 2 D V for the
logits of a teacher. An exit that teaches the last one shares its loop over chunks (`TwoExits`), so that the logits of
both are computed once. C is the number of positions of each sequence in a chunk on a device.
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
from layerskip_jax.recipe.distillation import Taught
from layerskip_jax.recipe.early_exit import ExitLoss, Unembed
from layerskip_jax.sharding import constrain, mesh_size, on_each_device, sum_over

INNER_EXIT, LAST_EXIT, TWO_EXITS = "inner_exit_loss", "last_exit_loss", "two_exits_loss"
"""Named scopes of the conditionals that turn exits on or off, to find them in the text of a compiled program."""

TOKENS, REPLICATED = ("batch", "length"), ()
"""Logical axes of arrays with a value for each token, and of arrays that are whole on every device."""

Labels = tuple[jax.Array, jax.Array, Any]
"""``(targets_BT, mask_BT, teacher)``, or one chunk of each."""

Hidden = Any
"""The hidden state ``x_BTD`` that an exit reads, or ``(x_L, x_E)`` for the two exits of `TwoExits`."""


@dataclasses.dataclass(frozen=True)
class ChunkedLoss:
    """The loss of an exit, summed over the counted positions of a batch [nats]; static under jit.

    Each device loops over chunks of its own positions, and the sums over devices follow the loop. Without
    `on_each_device` the partitioner would sum the head's gradient over the devices after every chunk.
    """

    config: ModelConfig
    loss: ExitLoss
    chunk: int
    """Positions of each sequence in a chunk, over all devices; a multiple of ``mesh.sequence``."""

    def value(self, head: Head, x_BTD: jax.Array, labels: Labels) -> jax.Array:
        """Return the loss."""

        def local_value(x_BTD: jax.Array, labels: Labels, *head: nnx.Param) -> jax.Array:
            def add_chunk(total: jax.Array, chunk: tuple[jax.Array, Labels]) -> tuple[jax.Array, None]:
                x_BCD, labels = chunk
                return total + self._chunk_value(labels, x_BCD, *head), None

            total, _ = jax.lax.scan(add_chunk, jnp.zeros(()), self._split((x_BTD, labels)))
            return sum_over(TOKENS, total)

        on_devices = on_each_device(local_value, [TOKENS, TOKENS, REPLICATED, REPLICATED], REPLICATED, along=TOKENS)
        return on_devices(x_BTD, labels, *head)

    def value_and_gradients(
        self, head: Head, x_BTD: Hidden, labels: Labels, cotangent: jax.Array
    ) -> tuple[jax.Array, Hidden, Head]:
        """Return the loss, and the gradients ``d_x_BTD`` and ``d_head`` of ``cotangent`` times the loss.

        With `TwoExits`, x is ``(x_L, x_E)``, and the loss and the cotangent have a value for each of the two.
        """

        def local_gradients(x_BTD: Hidden, labels: Labels, cotangent: jax.Array, *head: nnx.Param) -> Any:
            def add_chunk(sums: Any, chunk: tuple[Hidden, Labels]) -> tuple[Any, Hidden]:
                x_BCD, labels = chunk
                value, pullback = jax.vjp(partial(self._chunk_value, labels), x_BCD, *head)
                d_x_BCD, *d_head = pullback(cotangent)
                value, d_norm_D, d_matrix = jax.tree.map(jnp.add, sums, (value, *d_head))
                return (value, d_norm_D, gather(d_matrix)), d_x_BCD

            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), head)
            sums, d_x = jax.lax.scan(add_chunk, (jnp.zeros_like(cotangent), *zeros), self._split((x_BTD, labels)))
            return *sum_over(TOKENS, sums), jax.tree.map(join_chunks, d_x)

        inputs = [TOKENS, TOKENS, REPLICATED, REPLICATED, REPLICATED]
        on_devices = on_each_device(local_gradients, inputs, [REPLICATED, REPLICATED, REPLICATED, TOKENS], along=TOKENS)
        value, d_norm_D, d_matrix, d_x_BTD = on_devices(x_BTD, labels, cotangent, *head)
        return value, d_x_BTD, (d_norm_D, d_matrix)

    def _chunk_value(self, labels: Labels, x_BCD: Hidden, norm_D: nnx.Param, matrix: nnx.Param) -> jax.Array:
        # `ExitContext.create` has gathered the matrix, so this constraint moves no data. Without it, the partitioner
        # may shard the matrix again and gather it in every chunk.
        g = partial(unembed, self.config, (norm_D, gather(matrix)))
        return self.loss(g, x_BCD, *labels)

    def _split(self, arrays: Any) -> Any:
        C = max(1, self.chunk // mesh_size("length"))
        return jax.tree.map(partial(split_chunks, chunk=C), arrays)


def split_chunks(array: jax.Array, chunk: int) -> jax.Array:
    """[B, T, ...] -> [T/C, B, C, ...]; C is ``chunk``, or T if that is less."""
    B, T = array.shape[:2]
    C = min(chunk, T)
    return jnp.moveaxis(array.reshape(B, T // C, C, *array.shape[2:]), 1, 0)


def join_chunks(chunks: jax.Array) -> jax.Array:
    """[T/C, B, C, D] -> [B, T, D]: the inverse of `split_chunks`."""
    count, B, C, D = chunks.shape
    return jnp.moveaxis(chunks, 0, 1).reshape(B, count * C, D)


def gather(matrix: nnx.Param) -> nnx.Param:
    """Gather the head's matrix on every device, except along a vocabulary split by tensor parallelism."""
    axes = [axis if axis == "vocab" else None for axis in matrix.get_metadata()["axes"]]
    return jax.tree.map(lambda leaf: constrain(leaf, *axes), matrix)


class ExitContext(NamedTuple):
    """What an exit needs besides its hidden state."""

    chunked: ChunkedLoss
    labels: Labels
    gathered_matrix: nnx.Param
    """The head's matrix in the compute dtype, gathered once for all exits; no gradient passes through it."""

    @classmethod
    def create(cls, model: Transformer, batch: Batch, chunked: ChunkedLoss, teacher: Any) -> "ExitContext":
        """Gather the head of ``model`` and collect the labels of ``batch``."""
        _, matrix = model.head()
        dtype = compute_dtype(model.config)
        gathered_matrix = jax.lax.stop_gradient(gather(jax.tree.map(lambda leaf: leaf.astype(dtype), matrix)))
        return cls(chunked, (batch.targets_BT, batch.mask_BT, teacher), gathered_matrix)

    def taught_by_last(self, exit_loss: ExitLoss, share: ArrayLike) -> "ExitContext":
        """Return a copy with another loss, whose teacher is ``(x_L, share)``."""
        return self._taught(exit_loss, LastExit(self._by_token(share)))

    def taught_by(self, exit_loss: ExitLoss, x_BTD: jax.Array, share: ArrayLike) -> "ExitContext":
        """Return a copy with another loss, whose teacher is ``(x, share)``."""
        return self._taught(exit_loss, (x_BTD, self._by_token(share)))

    def _taught(self, exit_loss: ExitLoss, teacher: Any) -> "ExitContext":
        targets_BT, mask_BT, _ = self.labels
        chunked = dataclasses.replace(self.chunked, loss=Taught(exit_loss))
        return self._replace(chunked=chunked, labels=(targets_BT, mask_BT, teacher))

    def _by_token(self, share: ArrayLike) -> jax.Array:
        return jnp.broadcast_to(jnp.asarray(share, jnp.float32), self.labels[1].shape)

    def with_last(self, last: "ExitContext") -> "ExitContext":
        """Return the context of this inner exit and of the ``last`` exit, which it teaches, in one loop over chunks."""
        chunked = dataclasses.replace(self.chunked, loss=TwoExits(last.chunked.loss, self.chunked.loss))
        targets_BT, mask_BT, teacher = self.labels
        _, share_BT = last.labels[-1]
        return self._replace(chunked=chunked, labels=(targets_BT, mask_BT, (share_BT, teacher)))


class LastExit(NamedTuple):
    """A placeholder for the teacher ``(x_L, share)``: the forward pass reaches an inner exit before x_L exists."""

    share_BT: jax.Array


@dataclasses.dataclass(frozen=True)
class TwoExits:
    """The losses of the last exit and of exit E, which teaches it: an `ExitLoss` of ``(x_L, x_E)`` with two values.

    Both losses use the same logits of the two exits: 12 D V FLOPs per token. In loops of their own they would take
    14 D V, or 16 D V if the last exit teaches exit E too.
    """

    last: ExitLoss
    inner: ExitLoss

    def __call__(self, g: Unembed, x: Hidden, targets_BC: jax.Array, mask_BC: jax.Array, teachers: Any) -> jax.Array:
        """Return ``[J_L, J_E]``; ``teachers`` is the share of exit E in J_L, and the teacher of exit E."""
        (last_x_BCD, inner_x_BCD), (share_BC, inner_teacher) = x, teachers
        last_x_detached, inner_x_detached = jax.lax.stop_gradient(x)
        if isinstance(inner_teacher, LastExit):
            inner_teacher = last_x_detached, inner_teacher.share_BT
        last_logits_BCV, inner_logits_BCV = g(last_x_BCD), g(inner_x_BCD)

        def g_once(x_BCD: jax.Array) -> jax.Array:
            """Look up the logits of these four arrays, by identity; compute those of any other array."""
            if x_BCD is last_x_BCD or x_BCD is last_x_detached:
                return last_logits_BCV
            return inner_logits_BCV if x_BCD is inner_x_BCD or x_BCD is inner_x_detached else g(x_BCD)

        last_loss = self.last(g_once, last_x_BCD, targets_BC, mask_BC, (inner_x_detached, share_BC))
        return jnp.stack([last_loss, self.inner(g_once, inner_x_BCD, targets_BC, mask_BC, inner_teacher)])


class Passed(NamedTuple):
    """The state that every exit passes on unchanged. In the backward pass, the same type holds the cotangents."""

    x_BTD: Hidden
    """The hidden state that the exit reads."""
    head: Head
    """The parameters of the head. No exit reads the matrix; each adds its gradient to the cotangent."""
    last_x_BTD: jax.Array | None
    """Zeros, or None if the inner exits do not learn from the last exit. `losses_and_gradients` sets the cotangent to
    x_L, so that the backward pass can read x_L at the inner exits."""


def exit_in_backward_pass(
    context: ExitContext, scope: str, weight: jax.Array, passed: Passed, loss_slot: jax.Array
) -> Passed:
    """Return ``passed``; the backward pass computes the exit's loss, and adds the gradients of ``weight`` times it.

    The value of ``loss_slot`` is not used, and its cotangent is the loss. If ``weight`` is not positive, the backward
    pass skips all of this. ``scope`` names the conditional. For `TwoExits`, the weight and the slot hold two values,
    and the two weights are both positive or both 0.
    """
    frozen = weight, context.gathered_matrix, context.labels
    return _exit(context.chunked, scope, passed, loss_slot, frozen)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _exit(chunked: ChunkedLoss, scope: str, passed: Passed, loss_slot: jax.Array, frozen: Any) -> Passed:
    return passed


def _exit_forward(
    chunked: ChunkedLoss, scope: str, passed: Passed, loss_slot: jax.Array, frozen: Any
) -> tuple[Passed, Any]:
    return passed, (passed.x_BTD, passed.head[0], frozen)


def _exit_backward(chunked: ChunkedLoss, scope: str, residuals: Any, d: Passed) -> tuple[Any, ...]:
    x_BTD, norm_D, (weight, gathered_matrix, labels) = residuals
    targets_BT, mask_BT, teacher = labels
    if isinstance(teacher, LastExit):
        teacher = d.last_x_BTD, teacher.share_BT

    # Add inside the conditional: an exit that is off then passes the cotangents on, without arrays of zeros.
    def on(d_x_BTD: Hidden, d_norm_D: nnx.Param, d_matrix: nnx.Param) -> tuple[Any, ...]:
        labels, head = (targets_BT, mask_BT, teacher), (norm_D, gathered_matrix)
        loss, exit_d_x_BTD, (exit_d_norm_D, exit_d_matrix) = chunked.value_and_gradients(head, x_BTD, labels, weight)
        d_norm_D = jax.tree.map(jnp.add, d_norm_D, exit_d_norm_D)
        d_x_BTD = jax.tree.map(jnp.add, d_x_BTD, exit_d_x_BTD)
        return d_x_BTD, d_norm_D, add_resharded(d_matrix, exit_d_matrix), loss

    def off(*cotangents: Any) -> tuple[Any, ...]:
        return *cotangents, jnp.zeros_like(weight)

    with jax.named_scope(scope):
        d_x_BTD, d_norm_D, d_matrix, loss = jax.lax.cond(jnp.any(weight > 0), on, off, d.x_BTD, *d.head)
    return Passed(d_x_BTD, (d_norm_D, d_matrix), d.last_x_BTD), loss, None


_exit.defvjp(_exit_forward, _exit_backward)


def add_resharded(total: nnx.Param, d_matrix: nnx.Param) -> nnx.Param:
    """Reshard a gradient of the head's matrix like the parameter, and add it to ``total``."""
    axes = total.get_metadata()["axes"]
    return jax.tree.map(lambda a, b: a + constrain(b, *axes), total, d_matrix)
