"""Draft policies: small pure objects that choose the next round's exit and draft length, and may stop earlier.

A policy must be hashable, because it is static under jit, and it holds no state. What it learns is its *policy state*,
a pytree that the loop carries. To write a policy, subclass `Fixed` and override what differs. No policy can change the
text (with `Stochastic`: its distribution), because every draft is verified.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from layerskip_jax.checks import require, require_positive
from layerskip_jax.config import ModelConfig
from layerskip_jax.model import negative_log_likelihood


class Plan(NamedTuple):
    """A policy's choice for the next round. Python ints are fixed at compile time, arrays are chosen at run time."""

    exit_index: int | jax.Array  # into `DraftPolicy.exits`
    draft_length: int | jax.Array  # the most tokens to draft, at most `DraftPolicy.draft_length`


class Probe(NamedTuple):
    """How far each of X candidate exits agrees with the full model, counted over the positions of the active rows.

    ``agreed / reached`` estimates the probability that a draft of the exit is accepted if the drafts before it were.
    With a stochastic sampler, the counts add up probabilities instead of 0 and 1.
    """

    done: jax.Array  # whether this round compared the exits; the counts are 0 otherwise
    agreed_X: jax.Array  # of the positions in reached_X, those at which the exit agrees
    reached_X: jax.Array  # positions before which the round accepted every draft and the exit agreed at each

    @classmethod
    def none(cls, exits: int) -> "Probe":
        """Return the counts of a round that did not probe."""
        return cls(jnp.bool(False), jnp.zeros(exits), jnp.zeros(exits))


class Outcome(NamedTuple):
    """The result of a round, from which a policy learns."""

    plan: Plan
    drafted_B: jax.Array  # 0 in rows that were done before the round
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

    def init_notes(self, active_B: jax.Array) -> Any:
        """Return the notes before the first draft of a round: a pytree, empty if the policy needs none."""

    def keep_drafting(
        self, policy_state: Any, notes: Any, token_B: jax.Array, logits_BV: jax.Array
    ) -> tuple[jax.Array, Any]:
        """Return which rows draft another token after ``token_B``, and the notes with this draft added.

        ``token_B`` was drawn from the exit's ``logits_BV``. It stays a draft, whatever the answer: dropping a token
        because of its value would change the distribution of the text. The answer is ignored for rows that are done or
        have stopped, and their tokens mean nothing.
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

    def init_notes(self, active_B: jax.Array) -> Any:
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


def spaced_widths(draft_length: int) -> Sequence[int]:
    """Return ``DraftPolicy.verify_widths``, from 1 to d+1, for a policy that varies the draft length.

    Each width is four fifths of the next, rounded down. So a round verifies few positions that it does not need, which
    take time on a CPU, and the number of compiled verifications grows with the logarithm of d.

    >>> spaced_widths(6), spaced_widths(1), spaced_widths(15)
    ((1, 2, 3, 4, 5, 7), (1, 2), (1, 2, 3, 4, 5, 7, 9, 12, 16))
    """
    widths = [draft_length + 1]
    while widths[-1] > 1:
        widths.append(widths[-1] - math.ceil(widths[-1] / 5))
    return tuple(reversed(widths))


def log_probability(token_B: jax.Array, logits_BV: jax.Array) -> jax.Array:
    """Return the logarithm of the exit's probability of each draft, before temperature, top-k and top-p."""
    return -negative_log_likelihood(logits_BV[:, None], token_B[:, None])[:, 0]


@dataclasses.dataclass(frozen=True)
class ConfidenceStop(Fixed):
    """Stop drafting after a token to which the exit gave a probability below ``threshold``."""

    threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.threshold <= 1, f"threshold must be in [0, 1], not {self.threshold}")

    @property
    def verify_widths(self) -> Sequence[int]:
        return spaced_widths(self.draft_length)

    def keep_drafting(
        self, policy_state: Any, notes: Any, token_B: jax.Array, logits_BV: jax.Array
    ) -> tuple[jax.Array, Any]:
        return jnp.exp(log_probability(token_B, logits_BV)) >= self.threshold, notes
