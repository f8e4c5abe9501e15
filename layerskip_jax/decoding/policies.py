"""Draft policies: small pure objects that say from which exit the next round drafts, and for how long.

A policy is hashable (it is static under jit) and remembers nothing itself: what it learns is its *memory*, a pytree
that the loop carries. To make one, subclass `Fixed` and override what differs. None of them can change the tokens that
come out: every draft is verified.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from layerskip_jax.checks import check_type, require
from layerskip_jax.config import ModelConfig
from layerskip_jax.decoding.cost import NO_OVERHEAD, Overhead, head_share, round_cost


class Plan(NamedTuple):
    """What the next round does. Python numbers are compiled in; arrays are decided while the program runs."""

    exit_index: int | jax.Array  # into `DraftPolicy.exits`
    draft_length: int | jax.Array  # tokens to draft, 0 to `DraftPolicy.draft_length`


class Outcome(NamedTuple):
    """What the round showed. X candidate exits."""

    plan: Plan
    active_B: jax.Array  # rows that were not done
    drafted_B: jax.Array
    accepted_B: jax.Array
    probed: jax.Array  # whether all candidate exits were compared with the full model
    agreed_XQ: (
        jax.Array
    )  # rows whose first q+1 tokens each exit drafts rightly, summed over active rows; 0 unless probed
    reached_XQ: jax.Array  # rows whose first q it drafts rightly, and of which the next was compared


class DraftPolicy(Protocol):
    """What `rounds.SelfSpeculative` asks of a policy."""

    @property
    def exits(self) -> Sequence[int]:
        """Candidate exit layers, rising, each in 1..L."""

    @property
    def draft_length(self) -> int:
        """d: the most tokens a round drafts."""

    @property
    def verify_widths(self) -> Sequence[int]:
        """How many positions a verification is compiled for, rising to d+1; the narrowest that fits runs.

        Width 1, a round that drafts nothing, is added or left out as `plan` needs it.
        """

    def start(self, model: ModelConfig) -> Any:
        """Return the memory before the first round."""

    def plan(self, memory: Any) -> Plan: ...

    def probes(self, memory: Any) -> bool | jax.Array:
        """Say whether this round compares all candidate exits with the full model (the head runs once for each)."""

    def goes_on(self, memory: Any, token_B: jax.Array, logits_BV: jax.Array) -> jax.Array:
        """Say which rows draft another token after ``token_B``, drawn from the exit's logits at temperature 1."""

    def learn(self, memory: Any, outcome: Outcome) -> Any:
        """Return the memory after a round."""


@dataclasses.dataclass(frozen=True)
class Fixed:
    """Always the same exit and the same number of drafts."""

    exit_layer: int
    draft_length: int

    def __post_init__(self) -> None:
        for name, value in (("exit_layer", self.exit_layer), ("draft_length", self.draft_length)):
            check_type(value, int, name)
            require(value >= 1, f"{name} must be at least 1, not {value}")

    @property
    def exits(self) -> Sequence[int]:
        return (self.exit_layer,)

    @property
    def verify_widths(self) -> Sequence[int]:
        return (self.draft_length + 1,)

    def start(self, model: ModelConfig) -> Any:
        return ()

    def plan(self, memory: Any) -> Plan:
        return Plan(0, self.draft_length)

    def probes(self, memory: Any) -> bool | jax.Array:
        return False

    def goes_on(self, memory: Any, token_B: jax.Array, logits_BV: jax.Array) -> jax.Array:
        return jnp.ones_like(token_B, bool)

    def learn(self, memory: Any, outcome: Outcome) -> Any:
        return memory


def checked_plan(policy: DraftPolicy, memory: Any) -> tuple[Plan, Sequence[int]]:
    """Return the policy's plan, kept within what it declares, and the widths to compile a verification for.

    Plans and widths that are wrong before the program runs raise `UserError`. So no policy can change the text: where a
    plan may be of no draft at all, there is a verification that starts from the embedding.
    """
    plan, d, widths = policy.plan(memory), policy.draft_length, tuple(policy.verify_widths)
    rising = list(widths) == sorted(set(widths)) and widths[-1:] == (d + 1,) and widths[0] >= 1
    require(rising, f"verify_widths must rise to draft_length + 1 = {d + 1}, not {widths}")

    def within(value: int | jax.Array, most: int, name: str) -> int | jax.Array:
        if isinstance(value, int):
            require(0 <= value <= most, f"a plan's {name} must be in 0..{most}, not {value}")
            return value
        return jnp.clip(value, 0, most)

    length = within(plan.draft_length, d, "draft_length")
    wider = tuple(width for width in widths if width > 1)
    drafts_always = isinstance(length, int) and length > 0
    exit_index = within(plan.exit_index, len(policy.exits) - 1, "exit_index")
    return Plan(exit_index, length), wider if drafts_always else (1, *wider)


def doubling_widths(draft_length: int) -> Sequence[int]:
    """Return 1, 2, 3, 5, 9, ... and d+1: positions to compile a verification for, where rounds differ in length.

    >>> doubling_widths(6), doubling_widths(1)
    ((1, 2, 3, 5, 7), (1, 2))
    """
    drafts = [1 << doublings for doublings in range(draft_length.bit_length()) if 1 << doublings < draft_length]
    return (1, *(1 + draft for draft in drafts), 1 + draft_length)


@dataclasses.dataclass(frozen=True)
class ConfidenceStop(Fixed):
    """Stop drafting after a token that the exit gave a probability below ``threshold``."""

    threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.threshold <= 1, f"threshold must be in [0, 1], not {self.threshold}")

    @property
    def verify_widths(self) -> Sequence[int]:
        return doubling_widths(self.draft_length)

    def goes_on(self, memory: Any, token_B: jax.Array, logits_BV: jax.Array) -> jax.Array:
        probability_BV = jax.nn.softmax(logits_BV)
        return jnp.take_along_axis(probability_BV, token_B[:, None], axis=1)[:, 0] >= self.threshold


class Acceptance(NamedTuple):
    """The memory of `Adaptive`: discounted counts as in `Outcome`, what follows from them, and the constant costs."""

    agreed_Xd: jax.Array
    reached_Xd: jax.Array
    best: Plan
    spent: jax.Array  # since the last probe
    probe_after: jax.Array  # how much is spent between two probes
    cost_XQ: jax.Array  # costs are in passes of the full model for one token


@dataclasses.dataclass(frozen=True)
class Adaptive(Fixed):
    """Before each round, choose the exit E and the draft length that promise the most tokens for their cost.

    In the manner of DEL (arXiv 2504.05598), inside the loop and without recompiling:

        E, n = argmax (1 + s_E(1) + ... + s_E(n)) / cost(E, n),    s_E(n) = a_E(1) ... a_E(n)

    a_E(i) is the chance that draft i is accepted after i-1 were, estimated from the last ``horizon`` positions, about.
    The exit in use shows it in every round; now and then all candidates are compared with the full model at the
    positions just verified, for one run of the head each: as often as ``probe_share`` of the time allows. n = 0 is
    plain decoding; the costs are those of `cost.round_cost`. ``exit_layer`` is the only candidate if there are no
    ``candidates``.
    """

    candidates: tuple[int, ...] = ()
    probe_share: float = 0.05
    horizon: float = 100.0
    overhead: Overhead = NO_OVERHEAD

    def __post_init__(self) -> None:
        super().__post_init__()
        rising = list(self.exits) == sorted(set(self.exits)) and self.exits[0] >= 1
        require(rising, f"candidate exits must rise from 1 on, not {self.candidates}")
        require(0 < self.probe_share <= 1, f"probe_share must be in (0, 1], not {self.probe_share}")
        require(0 < self.horizon < math.inf, f"horizon must be positive and finite, not {self.horizon}")
        bounded = all(0 <= cost < math.inf for cost in self.overhead)
        require(bounded, f"overhead must not be negative or infinite: {self.overhead}")

    @property
    def exits(self) -> Sequence[int]:
        return self.candidates or (self.exit_layer,)

    @property
    def verify_widths(self) -> Sequence[int]:
        return doubling_widths(self.draft_length)

    def start(self, model: ModelConfig) -> Any:
        # A verification costs the width that is compiled, not the one that is wanted.
        wide = [next(w for w in self.verify_widths if w > d) - 1 for d in range(self.draft_length + 1)]
        wider = [self.overhead.width_cost * (wide[d] - d) for d in range(self.draft_length + 1)]
        cost_XQ = np.array([
            [round_cost(model, exit, d, self.overhead) + more for d, more in enumerate(wider)] for exit in self.exits
        ], np.float32)  # fmt: skip
        none_Xd = jnp.zeros((len(self.exits), self.draft_length))
        probe_after = jnp.float32(len(self.exits) * head_share(model) / self.probe_share)
        best = self.most_promising(none_Xd, none_Xd, jnp.asarray(cost_XQ))
        return Acceptance(none_Xd, none_Xd, best, probe_after, probe_after, jnp.asarray(cost_XQ))

    def most_promising(self, agreed_Xd: jax.Array, reached_Xd: jax.Array, cost_XQ: jax.Array) -> Plan:
        """Return the plan with the most expected tokens for its cost."""
        # Where little was seen, a guess stands in: of an exit a half, of its i-th draft what the exit does in general.
        rate_X1 = (jnp.sum(agreed_Xd, 1, keepdims=True) + 1) / (jnp.sum(reached_Xd, 1, keepdims=True) + 2)
        rate_Xd = (agreed_Xd + 2 * rate_X1) / (reached_Xd + 2)
        tokens_XQ = 1 + jnp.pad(jnp.cumsum(jnp.cumprod(rate_Xd, axis=1), axis=1), ((0, 0), (1, 0)))
        best = jnp.argmax(tokens_XQ / cost_XQ).astype(jnp.int32)
        return Plan(best // tokens_XQ.shape[1], best % tokens_XQ.shape[1])

    def plan(self, memory: Any) -> Plan:
        return memory.best

    def probes(self, memory: Any) -> bool | jax.Array:
        return memory.spent >= memory.probe_after

    def learn(self, memory: Any, outcome: Outcome) -> Any:
        plan, d = outcome.plan, self.draft_length
        spent = jnp.where(outcome.probed, 0.0, memory.spent) + memory.cost_XQ[plan.exit_index, plan.draft_length]

        def count(agreed_Xd: jax.Array, reached_Xd: jax.Array, best: Plan) -> tuple[jax.Array, jax.Array, Plan]:
            # Without a probe, the round itself: drafts before the accepted count agreed, and the one at it was refused.
            draft_Bd = jnp.arange(d)[None]
            accepted_B1, drafted_B1 = outcome.accepted_B[:, None], outcome.drafted_B[:, None]
            seen_Bd = (draft_Bd <= accepted_B1) & (draft_Bd < drafted_B1) & outcome.active_B[:, None]
            is_used_X1 = (jnp.arange(len(self.exits)) == plan.exit_index)[:, None]
            of_round = [
                is_used_X1 * jnp.sum(seen_Bd & other_Bd, axis=0)[None] for other_Bd in (draft_Bd < accepted_B1, seen_Bd)
            ]
            of_probe = (outcome.agreed_XQ[:, :d], outcome.reached_XQ[:, :d])
            new_agreed_Xd, new_reached_Xd = (
                jnp.where(outcome.probed, probe, used) for probe, used in zip(of_probe, of_round, strict=True)
            )
            keep_X1 = jnp.exp(-jnp.sum(new_reached_Xd, axis=1, keepdims=True) / self.horizon)
            agreed_Xd, reached_Xd = agreed_Xd * keep_X1 + new_agreed_Xd, reached_Xd * keep_X1 + new_reached_Xd
            return agreed_Xd, reached_Xd, self.most_promising(agreed_Xd, reached_Xd, memory.cost_XQ)

        # A round of plain decoding shows nothing, and should cost nothing more.
        shows = outcome.probed | (plan.draft_length > 0)
        agreed_Xd, reached_Xd, best = jax.lax.cond(shows, count, lambda *same: same, *memory[:3])
        return memory._replace(agreed_Xd=agreed_Xd, reached_Xd=reached_Xd, best=best, spent=spent)


def default_candidates(num_layers: int) -> tuple[int, ...]:
    """Return the exits that `Adaptive` chooses among where nothing else is said: an eighth, a quarter, half of L.

    >>> default_candidates(16), default_candidates(4)
    ((2, 4, 8), (1, 2))
    """
    return tuple(sorted({max(1, num_layers // part) for part in (8, 4, 2)}))
