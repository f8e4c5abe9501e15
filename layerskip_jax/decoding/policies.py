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
    """How far each of X candidate exits agrees with the full model, counted over the positions of the active rows.

    ``agreed / reached`` estimates the probability that a draft of the exit is accepted if the drafts before it were.
    With a stochastic sampler, the counts add up probabilities instead of 0 and 1.
    """

    done: jax.Array  # whether this round compared the exits; the counts are 0 otherwise
    agreed_X: jax.Array  # of the positions in reached_X, those at which the exit agrees
    reached_X: jax.Array  # positions before which the round accepted all drafts, and the exit agreed

    @classmethod
    def none(cls, exits: int) -> "Probe":
        """Return the counts of a round that did not probe."""
        return cls(jnp.bool(False), jnp.zeros(exits), jnp.zeros(exits))


class Outcome(NamedTuple):
    """The result of a round, from which a policy learns."""

    plan: Plan
    active_B: jax.Array  # rows that were not done before the round
    drafted_B: jax.Array
    accepted_B: jax.Array
    probe: Probe
    notes: Any  # what `DraftPolicy.keep_drafting` noted about the drafts


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

    def init_notes(self, rows: int) -> Any:
        """Return the notes before the first draft of a round: a pytree, empty if the policy needs none."""

    def keep_drafting(
        self, policy_state: Any, notes: Any, token_B: jax.Array, logits_BV: jax.Array
    ) -> tuple[jax.Array, Any]:
        """Return which rows draft another token after ``token_B``, and the notes with this draft added.

        ``token_B`` was drawn from the exit's ``logits_BV``. It stays a draft, whatever the answer: dropping a token
        because of its value would change the distribution of the text.
        """

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

    def init_notes(self, rows: int) -> Any:
        return ()

    def keep_drafting(
        self, policy_state: Any, notes: Any, token_B: jax.Array, logits_BV: jax.Array
    ) -> tuple[jax.Array, Any]:
        return jnp.ones_like(token_B, bool), notes

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


def log_confidence(token_B: jax.Array, logits_BV: jax.Array) -> jax.Array:
    """Return the logarithm of the probability that the exit gives to its draft, without temperature or cuts."""
    return jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits_BV, axis=1)


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

    def keep_drafting(
        self, policy_state: Any, notes: Any, token_B: jax.Array, logits_BV: jax.Array
    ) -> tuple[jax.Array, Any]:
        return jnp.exp(log_confidence(token_B, logits_BV)) >= self.threshold, notes


PRIOR_RATE = 0.8
"""The acceptance that `Adaptive` assumes of an exit before the first round. It is optimistic: the first rounds draft
long, and so learn more."""

PRIOR_WEIGHT = 2.0
"""How many observations a prior counts for."""

BINS = 4
"""`Adaptive` tells drafts apart by their probability at the exit: at most 1/8, up to 1/4, up to 1/2, and above."""


class Choice(NamedTuple):
    """What `Adaptive` decides before a round."""

    plan: Plan
    rate_K: jax.Array  # acceptance of a draft in each bin of the exit's confidence
    least_chance: jax.Array  # stop drafting if all drafts so far are accepted with a lower probability


class Acceptance(NamedTuple):
    """The policy state of `Adaptive`: discounted counts for X exits and K bins, and what follows from them."""

    agreed_X: jax.Array  # as in `Probe`
    reached_X: jax.Array
    agreed_XK: jax.Array  # drafts alone, without probes
    reached_XK: jax.Array
    choice: Choice
    spent: jax.Array  # cost of the rounds since the last probe
    probe_after: jax.Array  # the next probe is due when ``spent`` reaches this
    round_cost_XQ: jax.Array  # of a round from each exit with 0..d drafts [passes of the full model for one token]
    draft_cost_X: jax.Array  # of one more draft


class Drafted(NamedTuple):
    """The notes of `Adaptive` about the drafts of a round."""

    slot: jax.Array
    chance_B: jax.Array  # estimated probability that all drafts so far are accepted
    bin_Bd: jax.Array


@dataclasses.dataclass(frozen=True)
class Adaptive:
    """Choose the exit before each round, and after each draft whether another one pays.

    Let a_E be the probability that a draft of exit E is accepted if the drafts before it were. The best rate, in tokens
    per pass of the full model, and its exit are

        r = max (1 + a_E + ... + a_E^n) / cost(E, n)    over E and n = 0..d,

    with the costs of `cost.round_cost`; n = 0 is plain decoding. A round then drafts until all its drafts are accepted
    with a probability s that is too low for another draft (optimal stopping):

        s a_E < r (cost(E, n + 1) - cost(E, n))

    s is a product of acceptances that depend on the exit's confidence, its probability of the draft, in `BINS` bins:
    confidence alone would not do, because small models are right more often than their probabilities say. DEL
    (arXiv 2504.05598) chooses E and n by acceptance before a round, and stops by a threshold of confidence.

    All acceptances are estimated from about the last ``horizon`` drafts. Every round measures the exit that it uses. To
    measure the others, a probe runs the head at all of ``exits``; ``probe_share`` is the share of the decoding time to
    spend on probes. Needs `adaptive.AdaptiveSpeculative`.
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
        cost = partial(round_cost, model, overhead=self.overhead)
        costs = [[cost(exit, drafted=drafts) for drafts in range(self.draft_length + 1)] for exit in self.exits]
        round_cost_XQ, draft_cost_X = (
            jnp.array(costs),
            jnp.array([cost(e, drafted=2) - cost(e, drafted=1) for e in self.exits]),
        )
        none_X, none_XK = jnp.zeros(len(self.exits)), jnp.zeros((len(self.exits), BINS))
        choice = self.choose(none_X, none_X, none_XK, none_XK, round_cost_XQ, draft_cost_X)
        due = jnp.float32(len(self.exits) * head_share(model) / self.probe_share)
        return Acceptance(none_X, none_X, none_XK, none_XK, choice, due, due, round_cost_XQ, draft_cost_X)

    def choose(
        self,
        agreed_X: jax.Array,
        reached_X: jax.Array,
        agreed_XK: jax.Array,
        reached_XK: jax.Array,
        round_cost_XQ: jax.Array,
        draft_cost_X: jax.Array,
    ) -> Choice:
        """Return the exit with the best rate, and when to stop drafting from it."""
        rate_X = (agreed_X + PRIOR_WEIGHT * PRIOR_RATE) / (reached_X + PRIOR_WEIGHT)
        # A bin of which little is known has the acceptance of its exit.
        rate_XK = (agreed_XK + PRIOR_WEIGHT * rate_X[:, None]) / (reached_XK + PRIOR_WEIGHT)
        # Element by element, and not with cumsum: XLA:CPU then runs a single operation.
        length_Q = np.arange(self.draft_length + 1)
        power_XQ = rate_X[:, None] ** length_Q[None]
        tokens_XQ = jnp.sum(power_XQ[:, None] * np.tri(len(length_Q))[None], axis=2)
        gain_XQ = tokens_XQ / round_cost_XQ
        best = jnp.argmax(gain_XQ).astype(jnp.int32)
        exit_index, drafts = best // len(length_Q), best % len(length_Q)
        least_chance = jnp.max(gain_XQ) * draft_cost_X[exit_index] / rate_X[exit_index]
        # A round that pays with some number of drafts may draft more, if the exit is confident.
        plan = Plan(exit_index, jnp.where(drafts > 0, self.draft_length, 0))
        return Choice(plan, rate_XK[exit_index], least_chance)

    def plan(self, policy_state: Any) -> Plan:
        return policy_state.choice.plan

    def probes(self, policy_state: Any) -> bool | jax.Array:
        due = policy_state.spent >= policy_state.probe_after
        # A round that drafts measures its own exit, so a single candidate needs a probe only in rounds without a draft.
        return due if len(self.exits) > 1 else due & (self.plan(policy_state).draft_length == 0)

    def init_notes(self, rows: int) -> Any:
        return Drafted(jnp.int32(0), jnp.ones(rows), jnp.zeros((rows, self.draft_length), jnp.int32))

    def keep_drafting(
        self, policy_state: Any, notes: Any, token_B: jax.Array, logits_BV: jax.Array
    ) -> tuple[jax.Array, Any]:
        halvings_B = jnp.floor(log_confidence(token_B, logits_BV) / math.log(2)).astype(jnp.int32)
        bin_B = jnp.clip(BINS + halvings_B, 0, BINS - 1)
        chance_B = notes.chance_B * policy_state.choice.rate_K[bin_B]
        bin_Bd = jax.lax.dynamic_update_index_in_dim(notes.bin_Bd, bin_B, notes.slot, axis=1)
        return chance_B >= policy_state.choice.least_chance, Drafted(notes.slot + 1, chance_B, bin_Bd)

    def update(self, policy_state: Any, outcome: Outcome) -> Any:
        before, used, probe = policy_state, outcome.plan.exit_index, outcome.probe
        drafts = jnp.max(outcome.drafted_B)
        spent = jnp.where(probe.done, 0.0, before.spent) + before.round_cost_XQ[used, drafts]

        def count(before: Acceptance) -> Acceptance:
            agreed_XK, reached_XK = self._round_counts(outcome)
            agreed_X = jnp.where(probe.done, probe.agreed_X, jnp.sum(agreed_XK, axis=1))
            reached_X = jnp.where(probe.done, probe.reached_X, jnp.sum(reached_XK, axis=1))
            keep_X = jnp.exp(-reached_X / self.horizon)
            counts = (
                before.agreed_X * keep_X + agreed_X,
                before.reached_X * keep_X + reached_X,
                before.agreed_XK * keep_X[:, None] + agreed_XK,
                before.reached_XK * keep_X[:, None] + reached_XK,
            )
            costs = before.round_cost_XQ, before.draft_cost_X
            return Acceptance(*counts, self.choose(*counts, *costs), before.spent, before.probe_after, *costs)

        # A plain round gives no evidence about the exits, so skip the update.
        after = jax.lax.cond(probe.done | (drafts > 0), count, lambda same: same, before)
        return after._replace(spent=spent)

    def _round_counts(self, outcome: Outcome) -> tuple[jax.Array, jax.Array]:
        """Return ``agreed_XK, reached_XK`` of a round: 0 except for the exit that it used.

        The accepted drafts agreed. The draft after them was reached and rejected.
        """
        slot_Bd = jnp.arange(self.draft_length)[None]
        accepted_B1, drafted_B1 = outcome.accepted_B[:, None], outcome.drafted_B[:, None]
        reached_Bd = (slot_Bd <= accepted_B1) & (slot_Bd < drafted_B1) & outcome.active_B[:, None]
        agreed_Bd = reached_Bd & (slot_Bd < accepted_B1)
        is_used_X1 = (jnp.arange(len(self.exits)) == outcome.plan.exit_index)[:, None]
        in_bin_BdK = outcome.notes.bin_Bd[..., None] == jnp.arange(BINS)[None, None]

        def by_bin(counted_Bd: jax.Array) -> jax.Array:
            return is_used_X1 * jnp.sum(in_bin_BdK & counted_Bd[..., None], axis=(0, 1))[None]

        return by_bin(agreed_Bd), by_bin(reached_Bd)


def default_candidates(num_layers: int) -> tuple[int, ...]:
    """Return the default candidate exits of `Adaptive`: L/8, L/4 and L/2.

    >>> default_candidates(16), default_candidates(4)
    ((2, 4, 8), (1, 2))
    """
    return tuple(sorted({max(1, num_layers // part) for part in (8, 4, 2)}))
