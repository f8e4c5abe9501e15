"""Samplers: small pure objects that draw tokens, and judge drafted tokens so that the full model's output is kept.

A sampler is hashable (it is static under jit). `Greedy` is exact token for token; `Stochastic` is exact in
distribution, by the rule of Leviathan et al. (arXiv 2211.17192, Algorithm 1). A variant overrides
`Stochastic.probabilities`.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from layerskip_jax.checks import require

NO_TOKEN = -1  # what a sampler returns where the largest logit is not finite: weights or activations hold NaN


class Sampler(Protocol):
    """What the rounds ask of a sampler. Q = d+1 positions are verified, d tokens were drafted."""

    def draw(self, logits_BV: jax.Array, key: jax.Array) -> jax.Array:
        """Return one token per row, ``token_B``."""

    def propose(self, logits_BV: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
        """Return a draft ``token_B`` and the evidence about it that `verify` will want (a pytree of [B, ...])."""

    def verify(
        self, logits_BQV: jax.Array, draft_Bd: jax.Array, evidence: Any, drafted_B: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Judge each row's first ``drafted_B`` drafts: return ``accepted_B`` and the full model's own next token.

        ``evidence`` is what `propose` returned, stacked to [B, d, ...].
        """

    def certainty(self, draft_Bd: jax.Array, vocabulary: int) -> Any:
        """Return the evidence of drafts that were not drawn but are certain: as if `propose` could say nothing else."""

    def agreement(self, exit_logits_BQV: jax.Array, logits_BQV: jax.Array) -> jax.Array:
        """Return the probability, at each position, that a draft from the first logits is accepted by the second."""


def likeliest(logits: jax.Array) -> jax.Array:
    """``argmax`` over the last axis in two plain reductions: XLA:CPU runs one over pairs ten times slower."""
    index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    largest = jnp.max(logits, axis=-1, keepdims=True)  # NaN, if there is one
    first = jnp.min(jnp.where(logits == largest, index, logits.shape[-1]), axis=-1)
    return jnp.where(jnp.isfinite(largest[..., 0]), first, NO_TOKEN)


def _accepted_prefix(agrees_Bd: jax.Array, drafted_B: jax.Array) -> jax.Array:
    """Return how many drafts each row accepts: those before its first disagreement, ``drafted_B`` at most."""
    slot_Bd = jnp.arange(agrees_Bd.shape[1])[None]
    return jnp.sum(jnp.cumprod(agrees_Bd & (slot_Bd < drafted_B[:, None]), axis=1), axis=1)


def _drawn(weight_BV: jax.Array, key: jax.Array) -> jax.Array:
    """Draw a token from each row of weights; `NO_TOKEN` where they are NaN."""
    return jnp.where(jnp.isnan(weight_BV[:, 0]), NO_TOKEN, jax.random.categorical(key, jnp.log(weight_BV)))


@dataclasses.dataclass(frozen=True)
class Greedy:
    """Always the likeliest token; of equals, the first."""

    def draw(self, logits_BV: jax.Array, key: jax.Array) -> jax.Array:
        return likeliest(logits_BV)

    def propose(self, logits_BV: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
        return self.draw(logits_BV, key), ()

    def verify(
        self, logits_BQV: jax.Array, draft_Bd: jax.Array, evidence: Any, drafted_B: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        full_BQ = likeliest(logits_BQV)
        accepted_B = _accepted_prefix(draft_Bd == full_BQ[:, :-1], drafted_B)
        return accepted_B, jnp.take_along_axis(full_BQ, accepted_B[:, None], axis=1)[:, 0]

    def certainty(self, draft_Bd: jax.Array, vocabulary: int) -> Any:
        return ()

    def agreement(self, exit_logits_BQV: jax.Array, logits_BQV: jax.Array) -> jax.Array:
        return (likeliest(exit_logits_BQV) == likeliest(logits_BQV)).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Stochastic:
    """Sample from softmax(logits / temperature), cut to the ``top_k`` likeliest, then to the nucleus ``top_p``."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        require(1e-6 <= self.temperature <= 1e6, f"temperature must be in [1e-6, 1e6], not {self.temperature}")
        require(self.top_k >= 0, f"top_k must be 0 (off) or positive, not {self.top_k}")
        require(0 < self.top_p <= 1, f"top_p must be in (0, 1], not {self.top_p}")

    def probabilities(self, logits: jax.Array) -> jax.Array:
        """Return the distribution over the last axis, after temperature, top-k and top-p, in this order.

        ``top_p`` keeps the smallest set of likeliest tokens whose probability reaches it (arXiv 1904.09751 eq. 3).
        Ties at the edge of either cut are all kept.
        """
        logits = logits.astype(jnp.float32)
        # Less the largest, so that a small temperature does not overflow; all NaN if the largest is not finite.
        logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            least = jax.lax.top_k(logits, self.top_k)[0][..., -1:]
            logits = jnp.where(logits >= least, logits, -jnp.inf)
        if self.top_p < 1:
            ordered = jnp.sort(logits, axis=-1, descending=True)
            before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
            least = jnp.min(jnp.where(before < self.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
            logits = jnp.where(logits >= least, logits, -jnp.inf)
        return jax.nn.softmax(logits, axis=-1)

    def draw(self, logits_BV: jax.Array, key: jax.Array) -> jax.Array:
        return _drawn(self.probabilities(logits_BV), key)

    def propose(self, logits_BV: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
        q_BV = self.probabilities(logits_BV)
        return _drawn(q_BV, key), q_BV

    def verify(
        self, logits_BQV: jax.Array, draft_Bd: jax.Array, evidence: Any, drafted_B: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Accept draft x with probability ``min(1, p(x)/q(x))``; else draw from ``max(0, p - q)``, renormalised."""
        accept_key, draw_key = jax.random.split(key)
        p_BQV, q_BdV = self.probabilities(logits_BQV), evidence
        p_Bd = jnp.take_along_axis(p_BQV[:, :-1], draft_Bd[..., None], axis=-1)[..., 0]
        q_Bd = jnp.take_along_axis(q_BdV, draft_Bd[..., None], axis=-1)[..., 0]
        agrees_Bd = jax.random.uniform(accept_key, p_Bd.shape) * q_Bd < p_Bd
        accepted_B = _accepted_prefix(agrees_Bd, drafted_B)

        # Where all drafts were accepted there is no q to subtract, and the bonus token comes from p itself.
        q_BQV = jnp.pad(q_BdV, ((0, 0), (0, 1), (0, 0)))
        p_BV = jnp.take_along_axis(p_BQV, accepted_B[:, None, None], axis=1)[:, 0]
        q_BV = jnp.take_along_axis(q_BQV, accepted_B[:, None, None], axis=1)[:, 0]
        q_BV = jnp.where((accepted_B < drafted_B)[:, None], q_BV, 0)
        rest_BV = jnp.maximum(p_BV - q_BV, 0)
        # Rounding can leave nothing of p - q where p equals q; then p itself is the right distribution.
        rest_BV = jnp.where(jnp.sum(rest_BV, axis=-1, keepdims=True) > 0, rest_BV, p_BV)
        return accepted_B, _drawn(rest_BV, draw_key)

    def certainty(self, draft_Bd: jax.Array, vocabulary: int) -> Any:
        return jax.nn.one_hot(draft_Bd, vocabulary)

    def agreement(self, exit_logits_BQV: jax.Array, logits_BQV: jax.Array) -> jax.Array:
        """``sum_x min(p(x), q(x))``: the mean of the acceptance rule over drafts (arXiv 2211.17192, Theorem 3.5)."""
        return jnp.sum(jnp.minimum(self.probabilities(exit_logits_BQV), self.probabilities(logits_BQV)), axis=-1)
