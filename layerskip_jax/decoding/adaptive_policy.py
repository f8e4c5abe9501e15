"""The adaptive policy: it learns how often drafts are accepted, chooses an exit, and stops when no more drafts pay."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layerskip_jax.checks import parse_value, require, require_positive, require_rising
from layerskip_jax.config import ModelConfig
from layerskip_jax.decoding.cost import (
    NO_OVERHEAD,
    Overhead,
    checked_overhead,
    expected_tokens,
    head_share,
    round_cost,
    round_overhead,
)
from layerskip_jax.decoding.policies import Outcome, Plan, log_probability, spaced_widths

PRIOR_ACCEPTANCE = 0.8
"""The acceptance that `Adaptive` assumes of an exit before the first round. It is optimistic: the first rounds draft
long, and so learn more."""

PRIOR_WEIGHT = 2.0
"""How many drafts a prior counts for."""

BINS = 4
"""`Adaptive` has four bins for the exit's probability of a draft: below 1/8, from 1/8, from 1/4, and from 1/2."""


class Counts(NamedTuple):
    """Discounted counts for X exits and K bins of the exit's probability.

    ``reached`` counts the drafts (in a probe: positions) before which the round accepted every draft. ``agreed`` counts
    those of them that were accepted too.
    """

    agreed_X: jax.Array  # drafts of a round, or its probe in their place
    reached_X: jax.Array
    agreed_XK: jax.Array  # drafts alone
    reached_XK: jax.Array

    @classmethod
    def none(cls, exits: int) -> "Counts":
        return cls(jnp.zeros(exits), jnp.zeros(exits), jnp.zeros((exits, BINS)), jnp.zeros((exits, BINS)))

    def add(self, new: "Counts", horizon: float) -> "Counts":
        """Add the counts of a round; each observation of an exit discounts the older ones of that exit."""
        keep_X = jnp.exp(-new.reached_X / horizon)
        keep_X1 = jnp.exp(-jnp.sum(new.reached_XK, axis=1, keepdims=True) / horizon)  # a probe adds nothing to the bins
        keep = (keep_X, keep_X, keep_X1, keep_X1)
        return Counts(*(old * kept + added for old, kept, added in zip(self, keep, new, strict=True)))


class Decision(NamedTuple):
    """What `Adaptive` decides before a round."""

    plan: Plan
    acceptance_K: jax.Array  # of a draft in each bin of the exit's probability
    least_chance_Q: jax.Array  # after n drafts, stop if the chance that all are accepted is below the entry n


class AdaptiveState(NamedTuple):
    """The policy state of `Adaptive`."""

    counts: Counts
    decision: Decision  # follows from the counts
    spent: jax.Array  # cost of the rounds since the last probe
    probe_after: jax.Array  # the next probe is due when ``spent`` reaches this
    cost_XQ: jax.Array  # of a round from each exit with 0..d drafts [passes of the full model for one token]


class DraftNotes(NamedTuple):
    """The notes of `Adaptive` about the drafts of a round."""

    slot: jax.Array  # of the next draft
    chance_B: jax.Array  # estimated probability that all drafts so far are accepted, divided by the active rows
    bin_Bd: jax.Array  # of each draft, by the exit's probability


@dataclasses.dataclass(frozen=True)
class Adaptive:
    """Choose the exit before each round, and after each draft whether another one pays.

    Let a_E be the probability that a draft of exit E is accepted if the drafts before it were. The best rate, in tokens
    per pass of the full model, and its exit are

        r = max (1 + a_E + ... + a_E^n) / cost(E, n)    over E and n = 0..d,

    with the costs of `cost.round_cost`; n = 0 is plain decoding. During a round, let s be the estimated probability
    that all n drafts so far are accepted, in the mean over the active rows, which draft together. A row that drafted an
    EOS still counts, because the policy does not see that. The round stops when the expected tokens of m more drafts
    are worth less than their cost at the rate r, for every m:

        s (a_E + ... + a_E^m) < r (cost(E, n + m) - cost(E, n))

    s is the product of one learned acceptance per draft: that of the bin that holds the exit's probability for it. A
    threshold on this probability would stop too early where an exit is right more often than its probabilities say.
    DEL (arXiv 2504.05598) also chooses exits and lengths by acceptance.

    All acceptances come from about the last ``horizon`` drafts. Every round measures the exit that it uses. To measure
    the others, a probe runs the head at all of ``exits``; ``probe_share`` is the share of the cost of this policy's
    rounds to spend on probes. Use it with `adaptive.AdaptiveSpeculative`; `rounds.SelfSpeculative` never probes.
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
        object.__setattr__(self, "overhead", checked_overhead(self.overhead))

    @property
    def verify_widths(self) -> Sequence[int]:
        return spaced_widths(self.draft_length)

    def init_state(self, model: ModelConfig) -> Any:
        # A round pays the overhead of the width that it runs, which can be wider than its drafts need.
        width_Q = [next(width for width in self.verify_widths if width > n) for n in range(self.draft_length + 1)]
        overhead_Q = [round_overhead(width - 1, self.overhead) for width in width_Q]
        cost_XQ = jnp.array([
            [round_cost(model, exit_layer, n) + overhead for n, overhead in enumerate(overhead_Q)]
            for exit_layer in self.exits
        ])  # fmt: skip
        counts = Counts.none(len(self.exits))
        probe_after = jnp.float32(len(self.exits) * head_share(model) / self.probe_share)
        # A probe is due in the first round.
        return AdaptiveState(counts, self.choose(counts, cost_XQ), probe_after, probe_after, cost_XQ)

    def choose(self, counts: Counts, cost_XQ: jax.Array) -> Decision:
        """Return the exit with the best rate, and when to stop drafting from it."""
        acceptance_X = (counts.agreed_X + PRIOR_WEIGHT * PRIOR_ACCEPTANCE) / (counts.reached_X + PRIOR_WEIGHT)
        # A bin of which little is known has the acceptance of its exit.
        prior_X1 = PRIOR_WEIGHT * acceptance_X[:, None]
        acceptance_XK = (counts.agreed_XK + prior_X1) / (counts.reached_XK + PRIOR_WEIGHT)
        length_Q = np.arange(self.draft_length + 1)
        tokens_XQ = expected_tokens(acceptance_X, self.draft_length)
        rate_XQ = tokens_XQ / cost_XQ
        exit_index = (jnp.argmax(rate_XQ) // len(length_Q)).astype(jnp.int32)

        # Entry [n, m] is about m more drafts after n.
        after_n_QQ = np.minimum(length_Q[:, None] + length_Q[None], self.draft_length)
        possible_QQ = (length_Q[None] > 0) & (length_Q[:, None] + length_Q[None] <= self.draft_length)
        cost_Q = cost_XQ[exit_index]
        more_cost_QQ, more_tokens_Q = cost_Q[after_n_QQ] - cost_Q[:, None], tokens_XQ[exit_index] - 1
        least_chance_QQ = jnp.max(rate_XQ) * more_cost_QQ / more_tokens_Q[None]
        least_chance_Q = jnp.min(jnp.where(possible_QQ, least_chance_QQ, jnp.inf), axis=1)
        # Before the first draft, the chance is 1. A round that drafts plans d drafts; `keep_drafting` ends it earlier.
        plan = Plan(exit_index, jnp.where(least_chance_Q[0] <= 1, self.draft_length, 0))
        return Decision(plan, acceptance_XK[exit_index], least_chance_Q)

    def plan(self, policy_state: Any) -> Plan:
        return policy_state.decision.plan

    def probes(self, policy_state: Any) -> bool | jax.Array:
        due = policy_state.spent >= policy_state.probe_after
        # A round that drafts measures its own exit, so a single candidate needs a probe only in rounds without a draft.
        return due if len(self.exits) > 1 else due & (self.plan(policy_state).draft_length == 0)

    def init_notes(self, active_B: jax.Array) -> Any:
        chance_B = active_B / jnp.maximum(jnp.sum(active_B), 1)  # so that the sum is the mean over the active rows
        return DraftNotes(jnp.int32(0), chance_B, jnp.zeros((len(active_B), self.draft_length), jnp.int32))

    def keep_drafting(
        self, policy_state: Any, notes: Any, token_B: jax.Array, logits_BV: jax.Array
    ) -> tuple[jax.Array, Any]:
        log2_B = jnp.floor(log_probability(token_B, logits_BV) / math.log(2)).astype(jnp.int32)
        bin_B = jnp.clip(BINS + log2_B, 0, BINS - 1)
        chance_B = notes.chance_B * policy_state.decision.acceptance_K[bin_B]
        bin_Bd = jax.lax.dynamic_update_index_in_dim(notes.bin_Bd, bin_B, notes.slot, axis=1)
        # Decide for all rows together: while one row drafts, a pass takes as long as if all did.
        keep = jnp.sum(chance_B) >= policy_state.decision.least_chance_Q[notes.slot + 1]
        return jnp.broadcast_to(keep, token_B.shape), DraftNotes(notes.slot + 1, chance_B, bin_Bd)

    def update(self, policy_state: Any, outcome: Outcome) -> Any:
        before, probe, drafts = policy_state, outcome.probe, jnp.max(outcome.drafted_B)
        spent = jnp.where(probe.done, 0.0, before.spent) + before.cost_XQ[outcome.plan.exit_index, drafts]

        def learn(counts: Counts, decision: Decision) -> tuple[Counts, Decision]:
            counts = counts.add(self.round_counts(outcome), self.horizon)
            return counts, self.choose(counts, before.cost_XQ)

        # A plain round gives no evidence about the exits, so skip the update.
        has_evidence = probe.done | (drafts > 0)
        counts, decision = jax.lax.cond(has_evidence, learn, lambda *same: same, before.counts, before.decision)
        return before._replace(counts=counts, decision=decision, spent=spent)

    def round_counts(self, outcome: Outcome) -> Counts:
        """Return the counts of a round: by exit those of its probe, or else of its drafts; by bin always of its drafts.

        The accepted drafts agreed. The draft after them was reached and rejected.
        """
        slot_Bd = jnp.arange(self.draft_length)[None]
        accepted_B1, drafted_B1 = outcome.accepted_B[:, None], outcome.drafted_B[:, None]
        reached_Bd = (slot_Bd <= accepted_B1) & (slot_Bd < drafted_B1)
        agreed_Bd = reached_Bd & (slot_Bd < accepted_B1)
        is_used_X1 = (jnp.arange(len(self.exits)) == outcome.plan.exit_index)[:, None]
        in_bin_BdK = outcome.notes.bin_Bd[..., None] == jnp.arange(BINS)[None, None]

        def by_bin(counted_Bd: jax.Array) -> jax.Array:
            return is_used_X1 * jnp.sum(in_bin_BdK & counted_Bd[..., None], axis=(0, 1))[None]

        agreed_XK, reached_XK, probe = by_bin(agreed_Bd), by_bin(reached_Bd), outcome.probe
        agreed_X = jnp.where(probe.done, probe.agreed_X, jnp.sum(agreed_XK, axis=1))
        reached_X = jnp.where(probe.done, probe.reached_X, jnp.sum(reached_XK, axis=1))
        return Counts(agreed_X, reached_X, agreed_XK, reached_XK)


def default_candidates(num_layers: int) -> tuple[int, ...]:
    """Return the default candidate exits of `Adaptive`: L/8, L/4 and L/2.

    >>> default_candidates(16), default_candidates(4)
    ((2, 4, 8), (1, 2))
    """
    return tuple(sorted({max(1, num_layers // part) for part in (8, 4, 2)}))
