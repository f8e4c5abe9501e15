"""Samplers: small pure objects that draw tokens and verify drafts without changing the full model's output.

A sampler must be hashable, because it is static under jit. `Greedy` reproduces greedy decoding token for token.
`Stochastic` reproduces the sampling distribution (Leviathan et al., arXiv 2211.17192, Algorithm 1). To write another
sampler, override `Stochastic.probabilities`.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from layerskip_jax.checks import require
from layerskip_jax.decoding.top_p import smallest_kept

NO_TOKEN = -1
"""A sampler returns this if the largest logit is not finite, because weights or activations hold NaN or infinity."""


class Drafts(NamedTuple):
    """The tokens that a round drafted, d slots per row."""

    tokens_Bd: jax.Array
    count_B: jax.Array  # a row drafted the first ``count_B`` of its slots; the others hold no draft
    probs: Any  # draft distributions q: what `Sampler.propose` returned, stacked to [B, d, ...]

    def put(self, slot: jax.Array, token_B: jax.Array, probs: Any, drafting_B: jax.Array) -> "Drafts":
        """Write one draft per row into ``slot``, and count it in the rows that are still ``drafting_B``."""
        write = lambda all_Bd, new_B: jax.lax.dynamic_update_index_in_dim(all_Bd, new_B, slot, axis=1)  # noqa: E731
        probs = jax.tree.map(write, self.probs, probs)
        return Drafts(write(self.tokens_Bd, token_B), self.count_B + drafting_B, probs)

    def first(self, slots: int) -> "Drafts":
        """Return the first ``slots`` slots of each row."""
        return Drafts(self.tokens_Bd[:, :slots], self.count_B, jax.tree.map(lambda p: p[:, :slots], self.probs))


class Verdict(NamedTuple):
    """The result of verifying each row's drafts."""

    accepted_B: jax.Array  # length of the accepted prefix, at most ``Drafts.count_B``
    next_B: jax.Array  # the full model's own token after that prefix: the correction, or the bonus token


class Sampler(Protocol):
    """The interface between rounds and samplers. A round drafts d tokens and verifies Q = d+1 positions."""

    def draw(self, logits_BV: jax.Array, key: jax.Array) -> jax.Array:
        """Return one token per row, ``token_B``."""

    def propose(self, logits_BV: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
        """Return a draft ``token_B`` and its ``draft_probs``, a pytree of [B, ...] that `verify` needs."""

    def verify(self, logits_BQV: jax.Array, drafts: Drafts, key: jax.Array) -> Verdict:
        """Accept a prefix of each row's drafts, given the full model's logits at the Q positions."""

    def deterministic_draft_probs(self, draft_Bd: jax.Array, vocabulary: int) -> Any:
        """Return `Drafts.probs` of copied drafts, as in prompt lookup: one-hot, or () if `verify` needs none."""

    def agreement(self, exit_logits_BQV: jax.Array, logits_BQV: jax.Array) -> jax.Array:
        """Return, per position, the probability that a draft from the exit's logits is accepted."""


def argmax(logits: jax.Array) -> jax.Array:
    """``argmax`` over the last axis; `NO_TOKEN` where the largest logit is not finite.

    Two plain reductions, because XLA:CPU runs a reduction over (value, index) pairs ten times slower.
    """
    index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    largest = jnp.max(logits, axis=-1, keepdims=True)  # NaN if any logit is NaN
    first = jnp.min(jnp.where(logits == largest, index, logits.shape[-1]), axis=-1)
    return jnp.where(jnp.isfinite(largest[..., 0]), first, NO_TOKEN)


def _accepted_prefix(agrees_Bd: jax.Array, count_B: jax.Array) -> jax.Array:
    """Return how many drafts of each row come before its first disagreement, at most ``count_B``."""
    slot_Bd = jnp.arange(agrees_Bd.shape[1])[None]
    return jnp.sum(jnp.cumprod(agrees_Bd & (slot_Bd < count_B[:, None]), axis=1), axis=1)


def draw_from(probs_BV: jax.Array, key: jax.Array) -> jax.Array:
    """Draw a token from each row of unnormalized probabilities; `NO_TOKEN` where they are NaN."""
    return jnp.where(jnp.isnan(probs_BV[:, 0]), NO_TOKEN, jax.random.categorical(key, jnp.log(probs_BV)))


@dataclasses.dataclass(frozen=True)
class Greedy:
    """Always the most likely token; the first one if several are equal."""

    def draw(self, logits_BV: jax.Array, key: jax.Array) -> jax.Array:
        return argmax(logits_BV)

    def propose(self, logits_BV: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
        return self.draw(logits_BV, key), ()

    def verify(self, logits_BQV: jax.Array, drafts: Drafts, key: jax.Array) -> Verdict:
        """Accept drafts while they equal the full model's argmax."""
        full_BQ = argmax(logits_BQV)
        accepted_B = _accepted_prefix(drafts.tokens_Bd == full_BQ[:, :-1], drafts.count_B)
        return Verdict(accepted_B, jnp.take_along_axis(full_BQ, accepted_B[:, None], axis=1)[:, 0])

    def deterministic_draft_probs(self, draft_Bd: jax.Array, vocabulary: int) -> Any:
        return ()

    def agreement(self, exit_logits_BQV: jax.Array, logits_BQV: jax.Array) -> jax.Array:
        return (argmax(exit_logits_BQV) == argmax(logits_BQV)).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Stochastic:
    """Sample from ``softmax(logits / temperature)``, restricted to the ``top_k`` and then to the ``top_p`` tokens."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        require(1e-6 <= self.temperature <= 1e6, f"temperature must be in [1e-6, 1e6], not {self.temperature}")
        require(self.top_k >= 0, f"top_k must be 0 (off) or positive, not {self.top_k}")
        require(0 < self.top_p <= 1, f"top_p must be in (0, 1], not {self.top_p}")

    def probabilities(self, logits: jax.Array) -> jax.Array:
        """Return the distribution over the last axis, after temperature, top-k and top-p, in this order.

        ``top_p`` keeps the smallest set of most likely tokens whose probability reaches it (arXiv 1904.09751 eq. 3).
        Both cuts keep all tokens that tie at the threshold.
        """
        logits = logits.astype(jnp.float32)
        # Subtract the maximum, so that a small temperature does not overflow. A maximum that is not finite gives NaN,
        # which `draw_from` reports as `NO_TOKEN`.
        logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            least = jax.lax.top_k(logits, self.top_k)[0][..., -1:]
            logits = jnp.where(logits >= least, logits, -jnp.inf)
        if self.top_p < 1:
            p = jax.nn.softmax(logits, axis=-1)
            logits = jnp.where(p >= smallest_kept(p, self.top_p), logits, -jnp.inf)
        return jax.nn.softmax(logits, axis=-1)

    def draw(self, logits_BV: jax.Array, key: jax.Array) -> jax.Array:
        return draw_from(self.probabilities(logits_BV), key)

    def propose(self, logits_BV: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
        q_BV = self.probabilities(logits_BV)
        return draw_from(q_BV, key), q_BV

    def verify(self, logits_BQV: jax.Array, drafts: Drafts, key: jax.Array) -> Verdict:
        """Accept draft x with probability ``min(1, p(x)/q(x))``; else draw from ``max(0, p - q)``, renormalized."""
        accept_key, draw_key = jax.random.split(key)
        p_BQV, q_BdV = self.probabilities(logits_BQV), drafts.probs
        p_Bd = jnp.take_along_axis(p_BQV[:, :-1], drafts.tokens_Bd[..., None], axis=-1)[..., 0]
        q_Bd = jnp.take_along_axis(q_BdV, drafts.tokens_Bd[..., None], axis=-1)[..., 0]
        agrees_Bd = jax.random.uniform(accept_key, p_Bd.shape) * q_Bd < p_Bd
        accepted_B = _accepted_prefix(agrees_Bd, drafts.count_B)

        # If all drafts were accepted, there is no q to subtract: the bonus token comes from p.
        q_BQV = jnp.pad(q_BdV, ((0, 0), (0, 1), (0, 0)))
        p_BV = jnp.take_along_axis(p_BQV, accepted_B[:, None, None], axis=1)[:, 0]
        q_BV = jnp.take_along_axis(q_BQV, accepted_B[:, None, None], axis=1)[:, 0]
        q_BV = jnp.where((accepted_B < drafts.count_B)[:, None], q_BV, 0)
        residual_probs_BV = jnp.maximum(p_BV - q_BV, 0)
        # If p and q differ only by rounding, a rejection can leave no positive residual. Then draw from p.
        has_residual_B1 = jnp.sum(residual_probs_BV, axis=-1, keepdims=True) > 0
        return Verdict(accepted_B, draw_from(jnp.where(has_residual_B1, residual_probs_BV, p_BV), draw_key))

    def deterministic_draft_probs(self, draft_Bd: jax.Array, vocabulary: int) -> Any:
        return jax.nn.one_hot(draft_Bd, vocabulary)

    def agreement(self, exit_logits_BQV: jax.Array, logits_BQV: jax.Array) -> jax.Array:
        """``sum_x min(p(x), q(x))``: the expected acceptance of a draft (arXiv 2211.17192, Theorem 3.5)."""
        return jnp.sum(jnp.minimum(self.probabilities(exit_logits_BQV), self.probabilities(logits_BQV)), axis=-1)
