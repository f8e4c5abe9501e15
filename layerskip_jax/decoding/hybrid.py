"""Hybrid drafts: each round drafts from an early exit or from the text so far, or not at all."""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layerskip_jax.checks import require
from layerskip_jax.config import ModelConfig
from layerskip_jax.decoding.conditional import run_if
from layerskip_jax.decoding.cost import NO_OVERHEAD, Overhead, check_overhead, round_cost
from layerskip_jax.decoding.prompt_lookup import PromptLookup
from layerskip_jax.decoding.rounds import Autoregressive, SelfSpeculative
from layerskip_jax.decoding.sampling import Sampler
from layerskip_jax.decoding.state import DecodeState
from layerskip_jax.model import Transformer


class Gains(NamedTuple):
    """Discounted sums over past rounds, by source of the drafts: 0 is the exit, m a lookup that matched m tokens."""

    tokens_M: jax.Array  # emitted tokens
    cost_M: jax.Array  # in passes of the full model for one token


@dataclasses.dataclass(frozen=True)
class Hybrid:
    """Run the round that is expected to emit the most tokens for its cost: of ``lookup``, of ``speculation``, or plain.

    The expectation is the rate of past rounds: of the exit, and of lookups whose match had the same length. Plain
    decoding emits one token for a cost of one. About the last ``horizon`` rounds count. The rate of a source that has
    not been used for so long returns to `PRIOR`, so that it is tried again. A lookup costs one pass of the full model,
    plus the overhead. The statistics count it under layer L.
    """

    lookup: PromptLookup
    speculation: SelfSpeculative
    num_layers: int
    overhead: Overhead = NO_OVERHEAD
    horizon: float = 100.0

    def __post_init__(self) -> None:
        require(self.lookup.sampler == self.speculation.sampler, "lookup and speculation must have the same sampler")
        require(1 < self.horizon < math.inf, f"horizon must be above 1 and finite, not {self.horizon}")
        check_overhead(self.overhead)

    @property
    def sampler(self) -> Sampler:
        return self.lookup.sampler

    @property
    def draft_length(self) -> int:
        return max(self.lookup.draft_length, self.speculation.draft_length)

    @property
    def exits(self) -> Sequence[int]:
        return tuple(sorted({*self.speculation.exits, self.num_layers}))

    def init_policy_state(self, model: ModelConfig) -> Any:
        """Return the gains, and the state of the exit's own policy."""
        return prior(self.lookup.max_ngram), self.speculation.init_policy_state(model)

    def __call__(self, model: Transformer, state: DecodeState) -> DecodeState:
        (gains, _), active_B = state.policy_state, ~state.done_B
        draft_Bd, match_B = self.lookup.look_up(state)
        rate_M = gains.tokens_M / gains.cost_M
        lookup_cost = 1 + self.overhead.per_round + self.overhead.per_draft * self.lookup.draft_length
        # A row without a match gets one token from a lookup.
        rate_B = jnp.where(match_B > 0, rate_M[match_B], 1 / lookup_cost)
        lookup_rate, exit_rate = jnp.sum(rate_B * active_B) / jnp.maximum(jnp.sum(active_B), 1), rate_M[0]
        looks_up = (lookup_rate >= exit_rate) & (lookup_rate > 1)
        speculates = ~looks_up & (exit_rate > 1)

        def look_up(state: DecodeState) -> DecodeState:
            return self.lookup.verify(model, state, draft_Bd, match_B, exit_index=len(self.exits) - 1)

        after = run_if(looks_up, look_up, state)
        after = run_if(speculates, partial(self.speculate, model), after)
        after = run_if(~looks_up & ~speculates, partial(self.plain, model), after)

        cost = jnp.where(looks_up, lookup_cost, self.exit_cost(model.config, state, after))
        source_B = jnp.where(looks_up, match_B, 0)
        counted_BM = jax.nn.one_hot(source_B, len(rate_M)) * (active_B & ((source_B > 0) | speculates))[:, None]
        gains = self.discounted(gains, (after.length_B - state.length_B) @ counted_BM, cost * jnp.sum(counted_BM, 0))
        return dataclasses.replace(after, policy_state=(gains, after.policy_state[1]))

    def speculate(self, model: Transformer, state: DecodeState) -> DecodeState:
        """Run a round of ``speculation`` with its own policy state and the exit queries that it needs."""
        gains, own = state.policy_state
        queries, exits, Q = state.cache.exit_query_BQD, len(self.speculation.exits), self.speculation.draft_length + 1
        cache = dataclasses.replace(state.cache, exit_query_BQD=[query_BQD[:, :Q] for query_BQD in queries[:exits]])
        after = self.speculation(model, dataclasses.replace(state, cache=cache, policy_state=own))
        # No later round reads these exit queries, so the carry of the loop keeps the old ones.
        cache = dataclasses.replace(after.cache, exit_query_BQD=queries)
        return dataclasses.replace(after, cache=cache, policy_state=(gains, after.policy_state))

    def plain(self, model: Transformer, state: DecodeState) -> DecodeState:
        """Run a round of plain decoding, which counts for no exit."""
        after = Autoregressive(self.sampler)(model, state)
        statistics = dataclasses.replace(after.statistics, exit_rounds_X=state.statistics.exit_rounds_X)
        return dataclasses.replace(after, statistics=statistics)

    def exit_cost(self, config: ModelConfig, before: DecodeState, after: DecodeState) -> jax.Array:
        """Return the cost of the round between two states, by the drafts of each exit for an active row."""
        exits_X = jnp.array(self.speculation.exits)
        drafted_X = (after.statistics.drafted_X - before.statistics.drafted_X)[: len(exits_X)]
        drafted = jnp.sum(drafted_X) / jnp.maximum(jnp.sum(~before.done_B), 1)
        mean_exit = drafted_X @ exits_X / jnp.maximum(jnp.sum(drafted_X), 1)
        return round_cost(config, mean_exit, drafted, self.overhead)

    def discounted(self, gains: Gains, tokens_M: jax.Array, cost_M: jax.Array) -> Gains:
        """Return the gains after a round with these tokens and costs."""
        keep, start = 1 - 1 / self.horizon, prior(self.lookup.max_ngram)
        tokens_M = start.tokens_M + keep * (gains.tokens_M - start.tokens_M) + tokens_M
        return Gains(tokens_M, start.cost_M + keep * (gains.cost_M - start.cost_M) + cost_M)


PRIOR = 2.0
"""Tokens for a pass that `Hybrid` expects of each source before its first round, with the weight of one pass."""


def prior(max_ngram: int) -> Gains:
    """Return the gains before the first round."""
    return Gains(jnp.full(max_ngram + 1, PRIOR), jnp.ones(max_ngram + 1))
