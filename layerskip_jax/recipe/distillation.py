"""Self-distillation: exits of the same forward pass teach each other (not in the LayerSkip paper).

    J_e = m D(q_e, p) + (1 - m) CE(q_e, Y)      q_e = softmax(g(x_e)),  p = softmax(g(x_L))
    J_L = a D'(p, q_E) + (1 - a) CE(p, Y)       the second argument of D and D' is detached

x_e is the hidden state at exit e, x_L at the last exit, g the shared head, and Y the next tokens of the text. E is the
exit that drafts. In J_e, the last exit teaches an early exit with weight m, the share of distillation. In J_L, exit E
teaches the last exit with weight a, the share of agreement. Where two tokens are almost equally likely, a small a makes
the last exit prefer the token that exit E predicts. That costs little loss, and speculation accepts the draft. With
``early_exit.agreement_weight``, D' is the cross-entropy with the argmax of q_E.

D and D' are pure functions of logits, each with a value for every position. Any function of the same signature can
take their place in `SelfDistillation`. Below, p is always the teacher's distribution: for D', that of exit E.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from layerskip_jax.model import negative_log_likelihood
from layerskip_jax.recipe.early_exit import ExitLoss, Unembed

ExitTeacher = tuple[jax.Array, jax.Array]
"""``(x_BCD, share_BC)``: the detached hidden state of the exit that teaches, and the share of its loss."""

DistillationLoss = Callable[[jax.Array, jax.Array], jax.Array]
"""``(logits_BCV, teacher_logits_BCV) -> loss_BC`` [nats]; the teacher's logits are detached."""

Share = Callable[[ArrayLike, int], jax.Array]
"""``(step t, total_steps T) -> share`` of the teacher in the loss of an exit, in [0, 1]: m or a."""


def kl_divergence(logits_BCV: jax.Array, teacher_logits_BCV: jax.Array) -> jax.Array:
    """``KL(p || q) = sum_v p(v) (log p(v) - log q(v))``, with the teacher's distribution p; 0 where q = p."""
    log_p, log_q = jax.nn.log_softmax(teacher_logits_BCV), jax.nn.log_softmax(logits_BCV)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def argmax_cross_entropy(logits_BCV: jax.Array, teacher_logits_BCV: jax.Array) -> jax.Array:
    """``-log q(argmax p)``, with the teacher's distribution p: greedy decoding accepts a draft if both argmax agree."""
    return negative_log_likelihood(logits_BCV, jnp.argmax(teacher_logits_BCV, axis=-1))


def negative_log_acceptance(logits_BCV: jax.Array, teacher_logits_BCV: jax.Array) -> jax.Array:
    """``-log sum_v min(p(v), q(v))``: minus the log of the probability that a sampled draft is accepted.

    Speculative sampling accepts a draft from q with probability ``sum_v min(p(v), q(v))`` (arXiv 2211.17192, theorem
    3.5). Its logarithm as a loss is from arXiv 2602.23881.
    """
    log_p, log_q = jax.nn.log_softmax(teacher_logits_BCV), jax.nn.log_softmax(logits_BCV)
    return -jax.nn.logsumexp(jnp.minimum(log_p, log_q), axis=-1)


LOSSES: dict[str, DistillationLoss] = {
    "kl": kl_divergence,
    "argmax": argmax_cross_entropy,
    "acceptance": negative_log_acceptance,
}
"""Maps values of ``early_exit.distillation`` to losses."""


@dataclasses.dataclass(frozen=True)
class ConstantShare:
    """The same share at every step."""

    share: float

    def __call__(self, step: ArrayLike, total_steps: int) -> jax.Array:
        return jnp.asarray(self.share, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Taught:
    """The loss of an exit whose teacher ``(x, share)`` is another exit: the teacher's logits get no gradient.

    ``g`` recognizes the teacher's x by identity, so the loss must pass that very array, not a copy, cast or slice.
    """

    loss: ExitLoss

    def __call__(
        self, g: Unembed, x_BCD: jax.Array, targets_BC: jax.Array, mask_BC: jax.Array, teacher: ExitTeacher
    ) -> jax.Array:
        """Sum the loss over counted positions [nats]; the caller has detached the teacher's hidden state."""
        teacher_x_BCD, _ = teacher

        def g_detached(x_BCD: jax.Array) -> jax.Array:
            logits_BCV = g(x_BCD)
            return jax.lax.stop_gradient(logits_BCV) if x_BCD is teacher_x_BCD else logits_BCV

        return self.loss(g_detached, x_BCD, targets_BC, mask_BC, teacher)


@dataclasses.dataclass(frozen=True)
class SelfDistillation:
    """The loss of an exit that learns from another: an `ExitLoss` whose teacher is ``(x, share)`` of the other exit."""

    loss: DistillationLoss

    def __call__(
        self, g: Unembed, x_BCD: jax.Array, targets_BC: jax.Array, mask_BC: jax.Array, teacher: ExitTeacher
    ) -> jax.Array:
        """Sum the loss over counted positions [nats]; ``teacher`` is ``(x, share)`` of the exit that teaches.

        `Taught` detaches the teacher's logits.
        """
        teacher_x_BCD, share_BC = teacher
        logits_BCV, teacher_logits_BCV = g(x_BCD), g(teacher_x_BCD)
        from_teacher_BC = self.loss(logits_BCV, teacher_logits_BCV)
        from_data_BC = negative_log_likelihood(logits_BCV, targets_BC)
        return jnp.sum((share_BC * from_teacher_BC + (1 - share_BC) * from_data_BC) * mask_BC)
