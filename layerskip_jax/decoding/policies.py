"""Draft policies: small pure objects that choose the next round's exit and draft length.

A policy must be hashable, because it is static under jit, and it holds no state. What it learns is its *policy state*,
a pytree that the loop carries. To write a policy, subclass `Fixed` and override what differs. No policy can change the
text (with `Stochastic`: its distribution), because every draft is verified.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from layerskip_jax.checks import parse_value, require, require_positive, require_rising
from layerskip_jax.config import ModelConfig
from layerskip_jax.decoding.cost import NO_OVERHEAD, Overhead, check_overhead, head_share, round_cost


class Plan(NamedTuple):
    """A policy's choice for the next round. Python ints are fixed at compile time, arrays are chosen at run time."""

    exit_index: int | jax.Array  # into `DraftPolicy.exits`
    draft_length: int | jax.Array  # tokens to draft, at most `DraftPolicy.draft_length`


class Probe(NamedTuple):
    """How far each of X candidate exits agrees with the full model, as counts of active rows by position.

    Position q, from 0, predicts draft q. So ``agreed / reached`` estimates the acceptance of the exit's draft q if the
    drafts before it were accepted. With a stochastic sampler, the counts add up probabilities instead of 0 and 1.
    """

    done: jax.Array  # whether this round compared the exits; the counts are 0 otherwise
    agreed_XQ: jax.Array  # of the rows in reached_XQ, those in which the exit also agrees at position q
    reached_XQ: jax.Array  # rows in which the round accepted its first q drafts, and the exit agrees at 0..q-1

    @classmethod
    def none(cls, exits: int, width: int) -> "Probe":
        """Return the counts of a round that did not probe."""
        return cls(jnp.bool(False), jnp.zeros((exits, width)), jnp.zeros((exits, width)))


class Outcome(NamedTuple):
    """The result of a round, from which a policy learns."""

    plan: Plan
    active_B: jax.Array  # rows that were not done before the round
    drafted_B: jax.Array
    accepted_B: jax.Array
    probe: Probe


class DraftPolicy(Protocol):
    """The interface between `rounds.SelfSpeculative` and policies."""

    @property
    def exits(self) -> Sequence[int]:
        """Candidate exit layers, strictly increasing, each in 1..L; exactly one for `rounds.SelfSpeculative`."""

    @property
    def draft_length(self) -> int:
        """d: the most tokens that a round drafts."""

    @property
    def verify_widths(self) -> Sequence[int]:
        """Numbers of positions to compile verifications for, strictly increasing up to d+1.

        Only `adaptive.AdaptiveSpeculative` reads them, and runs the narrowest that fits. It adds width 1, a round
        without a draft, if `plan` can ask for such a round, and drops it otherwise.
        """

    def init_state(self, model: ModelConfig) -> Any:
        """Return the policy state before the first round."""

    def plan(self, policy_state: Any) -> Plan:
        """Return the exit and the draft length of the next round."""

    def probes(self, policy_state: Any) -> bool | jax.Array:
        """Return whether this round probes the candidate exits, which costs a run of the head for each of them.

        Only `adaptive.AdaptiveSpeculative` calls this.
        """

    def keep_drafting(self, policy_state: Any, token_B: jax.Array, logits_BV: jax.Array) -> jax.Array:
        """Return which rows draft another token after ``token_B``, which was drawn from the exit's ``logits_BV``."""

    def update(self, policy_state: Any, outcome: Outcome) -> Any:
        """Return the policy state after a round."""


@dataclasses.dataclass(frozen=True)
class Fixed:
    """Always the same exit and the same draft length."""

    exit_layer: int
    draft_length: int

    def __post_init__(self) -> None:
        require_positive("exit_layer", self.exit_layer)
        require_positive("draft_length", self.draft_length)

    @property
    def exits(self) -> Sequence[int]:
        return (self.exit_layer,)

    @property
    def verify_widths(self) -> Sequence[int]:
        return (self.draft_length + 1,)

    def init_state(self, model: ModelConfig) -> Any:
        return ()

    def plan(self, policy_state: Any) -> Plan:
        return Plan(0, self.draft_length)

    def probes(self, policy_state: Any) -> bool | jax.Array:
        return False

    def keep_drafting(self, policy_state: Any, token_B: jax.Array, logits_BV: jax.Array) -> jax.Array:
        return jnp.ones_like(token_B, bool)

    def update(self, policy_state: Any, outcome: Outcome) -> Any:
        return policy_state


def checked_plan(policy: DraftPolicy, policy_state: Any, least: int) -> Plan:
    """Return the policy's plan, clipped to its exits and to ``least``..d drafts.

    Clipping ensures that a bad plan cannot change the text or its distribution. Raises `UserError` for a plan of Python
    ints that is out of range.
    """
    plan, exits, d = policy.plan(policy_state), len(policy.exits), policy.draft_length

    def clip(value: int | jax.Array, least: int, most: int, name: str) -> int | jax.Array:
        if isinstance(value, int):
            require(least <= value <= most, f"a plan's {name} must be in {least}..{most}, not {value}")
            return value
        return jnp.clip(value, least, most)

    return Plan(clip(plan.exit_index, 0, exits - 1, "exit_index"), clip(plan.draft_length, least, d, "draft_length"))


def doubling_widths(draft_length: int) -> Sequence[int]:
    """Return ``DraftPolicy.verify_widths`` for a policy that varies the draft length: 1, 2, 3, 5, 9, ... and d+1.

    >>> doubling_widths(6), doubling_widths(1)
    ((1, 2, 3, 5, 7), (1, 2))
    """
    drafts = [1 << doublings for doublings in range(draft_length.bit_length()) if 1 << doublings < draft_length]
    return (1, *(1 + draft for draft in drafts), 1 + draft_length)


@dataclasses.dataclass(frozen=True)
class ConfidenceStop(Fixed):
    """Stop drafting after a token to which the exit gave a probability below ``threshold``."""

    threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.threshold <= 1, f"threshold must be in [0, 1], not {self.threshold}")

    @property
    def verify_widths(self) -> Sequence[int]:
        return doubling_widths(self.draft_length)

    def keep_drafting(self, policy_state: Any, token_B: jax.Array, logits_BV: jax.Array) -> jax.Array:
        probability_BV = jax.nn.softmax(logits_BV)
        return jnp.take_along_axis(probability_BV, token_B[:, None], axis=1)[:, 0] >= self.threshold


PRIOR_RATE = 0.8
"""The acceptance that `Adaptive` assumes of an exit before the first round."""


class Acceptance(NamedTuple):
    """The policy state of `Adaptive`. Costs are in passes of the full model for one token."""

    agreed_Xd: jax.Array  # discounted counts, as in `Probe`
    reached_Xd: jax.Array
    best: Plan  # the plan that follows from the counts
    spent: jax.Array  # cost of the rounds since the last probe
    probe_after: jax.Array  # the next probe is due when ``spent`` reaches this
    cost_XQ: jax.Array  # cost of a round from each exit with 0..d drafts


@dataclasses.dataclass(frozen=True)
class Adaptive:
    """Before each round, choose the exit E and the draft length n with the most expected tokens for their cost.

    Similar to DEL (arXiv 2504.05598), but inside the compiled loop:

        E, n = argmax (1 + s_E(1) + ... + s_E(n)) / cost(E, n),    s_E(n) = a_E(1) ... a_E(n)

    a_E(i) estimates the probability that draft i is accepted if drafts 1..i-1 were, from about the last ``horizon``
    positions. n = 0 is plain decoding. `cost.round_cost` gives the costs. Every round measures the exit that it uses.
    To measure the others, a probe runs the head at all of ``exits``; ``probe_share`` is the share of the decoding time
    to spend on probes. Needs `adaptive.AdaptiveSpeculative`.
    """

    exits: Sequence[int]
    draft_length: int
    probe_share: float = 0.05
    horizon: float = 100.0
    overhead: Overhead = NO_OVERHEAD

    def __post_init__(self) -> None:
        object.__setattr__(self, "exits", parse_value(tuple[int, ...], self.exits, "exits"))  # a list is not hashable
        require(len(self.exits) > 0, "exits must name at least one exit")
        require_rising("exits", self.exits)
        require_positive("draft_length", self.draft_length)
        require(0 < self.probe_share <= 1, f"probe_share must be in (0, 1], not {self.probe_share}")
        require(0 < self.horizon < math.inf, f"horizon must be positive and finite, not {self.horizon}")
        check_overhead(self.overhead)

    @property
    def verify_widths(self) -> Sequence[int]:
        return doubling_widths(self.draft_length)

    def init_state(self, model: ModelConfig) -> Any:
        d_Q = range(self.draft_length + 1)
        # A round pays for the compiled width that it runs, which can be wider than its drafts need.
        width_Q = [next(width for width in self.verify_widths if width > d) for d in d_Q]
        extra_Q = [self.overhead.per_draft * (width_Q[d] - 1 - d) for d in d_Q]
        cost_XQ = np.array([
            [round_cost(model, exit, d, self.overhead) + extra_Q[d] for d in d_Q] for exit in self.exits
        ], np.float32)  # fmt: skip
        none_Xd = jnp.zeros((len(self.exits), self.draft_length))
        probe_after = jnp.float32(len(self.exits) * head_share(model) / self.probe_share)
        best = self.best_plan(none_Xd, none_Xd, jnp.asarray(cost_XQ))
        return Acceptance(none_Xd, none_Xd, best, probe_after, probe_after, jnp.asarray(cost_XQ))

    def best_plan(self, agreed_Xd: jax.Array, reached_Xd: jax.Array, cost_XQ: jax.Array) -> Plan:
        """Return the plan with the most expected tokens for its cost."""
        # Shrink the rate of each exit towards `PRIOR_RATE`, then the rate of each draft towards its exit's, each with
        # the weight of two observations. The prior is optimistic: the first rounds draft long, and so learn more.
        weight = 2.0
        agreed_X1, reached_X1 = (jnp.sum(counts_Xd, axis=1, keepdims=True) for counts_Xd in (agreed_Xd, reached_Xd))
        rate_X1 = (agreed_X1 + weight * PRIOR_RATE) / (reached_X1 + weight)
        rate_Xd = (agreed_Xd + weight * rate_X1) / (reached_Xd + weight)
        # Multiply by a triangle of ones for cumulative sums: XLA:CPU runs far fewer operations than for cumsum.
        upper_dd = np.triu(np.ones((self.draft_length,) * 2, np.float32))
        cumulate = partial(jnp.matmul, b=upper_dd, precision=jax.lax.Precision.HIGHEST)
        survival_Xd = jnp.exp(cumulate(jnp.log(rate_Xd)))
        tokens_XQ = 1 + jnp.pad(cumulate(survival_Xd), ((0, 0), (1, 0)))
        best = jnp.argmax(tokens_XQ / cost_XQ).astype(jnp.int32)
        return Plan(best // tokens_XQ.shape[1], best % tokens_XQ.shape[1])

    def plan(self, policy_state: Any) -> Plan:
        return policy_state.best

    def probes(self, policy_state: Any) -> bool | jax.Array:
        due = policy_state.spent >= policy_state.probe_after
        # A round that drafts measures its own exit, so a single candidate needs a probe only in rounds without a draft.
        return due if len(self.exits) > 1 else due & (policy_state.best.draft_length == 0)

    def keep_drafting(self, policy_state: Any, token_B: jax.Array, logits_BV: jax.Array) -> jax.Array:
        return jnp.ones_like(token_B, bool)

    def update(self, policy_state: Any, outcome: Outcome) -> Any:
        plan, probe, before = outcome.plan, outcome.probe, policy_state
        spent = jnp.where(probe.done, 0.0, before.spent) + before.cost_XQ[plan.exit_index, plan.draft_length]

        def count(agreed_Xd: jax.Array, reached_Xd: jax.Array, best: Plan) -> tuple[jax.Array, jax.Array, Plan]:
            round_agreed_Xd, round_reached_Xd = self._round_counts(outcome)
            new_agreed_Xd = jnp.where(probe.done, probe.agreed_XQ[:, : self.draft_length], round_agreed_Xd)
            new_reached_Xd = jnp.where(probe.done, probe.reached_XQ[:, : self.draft_length], round_reached_Xd)
            keep_X1 = jnp.exp(-jnp.sum(new_reached_Xd, axis=1, keepdims=True) / self.horizon)
            agreed_Xd, reached_Xd = agreed_Xd * keep_X1 + new_agreed_Xd, reached_Xd * keep_X1 + new_reached_Xd
            return agreed_Xd, reached_Xd, self.best_plan(agreed_Xd, reached_Xd, before.cost_XQ)

        # A plain round gives no evidence about the exits, so skip the update.
        has_evidence = probe.done | (plan.draft_length > 0)
        counts = before.agreed_Xd, before.reached_Xd, before.best
        agreed_Xd, reached_Xd, best = jax.lax.cond(has_evidence, count, lambda *same: same, *counts)
        return before._replace(agreed_Xd=agreed_Xd, reached_Xd=reached_Xd, best=best, spent=spent)

    def _round_counts(self, outcome: Outcome) -> tuple[jax.Array, jax.Array]:
        """Return ``agreed_Xd, reached_Xd`` of a round without a probe: 0 except for the exit that it used.

        The accepted drafts agreed. The draft after them was reached and rejected.
        """
        draft_Bd = jnp.arange(self.draft_length)[None]
        accepted_B1, drafted_B1 = outcome.accepted_B[:, None], outcome.drafted_B[:, None]
        reached_Bd = (draft_Bd <= accepted_B1) & (draft_Bd < drafted_B1) & outcome.active_B[:, None]
        agreed_Bd = reached_Bd & (draft_Bd < accepted_B1)
        is_used_X1 = (jnp.arange(len(self.exits)) == outcome.plan.exit_index)[:, None]
        agreed_Xd, reached_Xd = (is_used_X1 * jnp.sum(one, axis=0)[None] for one in (agreed_Bd, reached_Bd))
        return agreed_Xd, reached_Xd


def default_candidates(num_layers: int) -> tuple[int, ...]:
    """Return the default candidate exits of `Adaptive`: L/8, L/4 and L/2.

    >>> default_candidates(16), default_candidates(4)
    ((2, 4, 8), (1, 2))
    """
    return tuple(sorted({max(1, num_layers // part) for part in (8, 4, 2)}))
