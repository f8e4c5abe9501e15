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
from layerskip_jax.decoding.cost import (
    NO_OVERHEAD,
    Overhead,
    checked_overhead,
    expected_tokens,
    round_cost,
    round_overhead,
)
from layerskip_jax.decoding.prompt_lookup import PromptLookup
from layerskip_jax.decoding.rounds import Autoregressive, SelfSpeculative
from layerskip_jax.decoding.sampling import Sampler
from layerskip_jax.decoding.state import DecodeState
from layerskip_jax.model import Transformer


class Gains(NamedTuple):
    """Discounted sums over past rounds."""

    tokens: jax.Array
    """Tokens that rounds of the exit emitted."""
    cost: jax.Array
    """Cost of these rounds, counted once per active row [passes of the full model for one token]."""
    agreed_M: jax.Array
    """Looked-up tokens that agreed with the text, by the length of the match, 1 to M."""
    compared_M: jax.Array
    """Looked-up tokens that were compared with the text: those that agree, and the first that does not."""


@dataclasses.dataclass(frozen=True)
class Hybrid:
    """Run the round with the most expected tokens per cost: a lookup, a round of ``speculation``, or plain decoding.

    All rows of the batch run the same kind of round.

    - A round of ``speculation`` is expected to emit as many tokens per cost as its past rounds did.
    - Let a be the acceptance of earlier lookups whose match was as long as that of a row. The row is expected to get
      1 + a + ... + a^d tokens from a lookup of d drafts, or one token if it has no match. The mean over the active
      rows, divided by the cost, is the lookup's estimate. Every round compares the lookup's drafts with the tokens that
      it emits, even if it did not use them. So lookups are used as soon as the text begins to repeat itself.
    - Plain decoding emits one token for a cost of one.

    Each sum decays to its `prior`, and weighs about the last ``horizon`` rounds. A lookup costs one pass of the full
    model, plus the overhead. The statistics count it under layer L.
    """

    lookup: PromptLookup
    speculation: SelfSpeculative
    num_layers: int
    overhead: Overhead = NO_OVERHEAD
    horizon: float = 60.0

    def __post_init__(self) -> None:
        require(self.lookup.sampler == self.speculation.sampler, "lookup and speculation must have the same sampler")
        require(1 < self.horizon < math.inf, f"horizon must be above 1 and finite, not {self.horizon}")
        object.__setattr__(self, "overhead", checked_overhead(self.overhead))

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
        """Return the gains, and the state of the exit's own policy; raises `UserError` for another depth."""
        require(self.num_layers == model.num_layers, f"num_layers {self.num_layers} must be {model.num_layers}")
        return prior(self.lookup.max_ngram), self.speculation.init_policy_state(model)

    def __call__(self, model: Transformer, state: DecodeState) -> DecodeState:
        (gains, _), active_B = state.policy_state, ~state.done_B
        draft_Bd, match_B = self.lookup.look_up(state)
        lookup_cost = 1 + round_overhead(self.lookup.draft_length, self.overhead)
        tokens_B = jnp.where(match_B > 0, self.lookup_tokens(gains)[match_B - 1], 1)
        lookup_rate = jnp.sum(tokens_B * active_B) / jnp.maximum(jnp.sum(active_B), 1) / lookup_cost
        exit_rate = gains.tokens / gains.cost
        looks_up = (lookup_rate >= exit_rate) & (lookup_rate > 1)
        speculates = ~looks_up & (exit_rate > 1)

        def look_up(state: DecodeState) -> DecodeState:
            return self.lookup.verify(model, state, draft_Bd, match_B, exit_index=len(self.exits) - 1)

        after = run_if(looks_up, look_up, state)
        after = run_if(speculates, partial(self.speculate, model), after)
        after = run_if(~looks_up & ~speculates, partial(self.plain, model), after)

        exit_tokens = speculates * jnp.sum(after.length_B - state.length_B)
        exit_cost = speculates * jnp.sum(active_B) * self.exit_cost(model.config, state, after)
        new = Gains(exit_tokens, exit_cost, *self.compare(draft_Bd, match_B, state, after))
        return dataclasses.replace(after, policy_state=(self.discounted(gains, new), after.policy_state[1]))

    def lookup_tokens(self, gains: Gains) -> jax.Array:
        """Return the expected tokens of a lookup by the length of its match, 1 to M."""
        return expected_tokens(gains.agreed_M / gains.compared_M, self.lookup.draft_length)[:, -1]

    def compare(
        self, draft_Bd: jax.Array, match_B: jax.Array, before: DecodeState, after: DecodeState
    ) -> tuple[jax.Array, jax.Array]:
        """Compare the lookup's drafts with the tokens that a round of any kind emitted.

        Returns the ``agreed_M`` and ``compared_M`` of `Gains` for this round.
        """
        d, tokens_BS = self.lookup.draft_length, after.tokens_BS
        known_B1 = jnp.minimum(after.length_B - before.length_B, d)[:, None]
        slot_Bd = jnp.minimum(before.length_B[:, None] + jnp.arange(d)[None], tokens_BS.shape[1] - 1)
        agrees_Bd = (jnp.take_along_axis(tokens_BS, slot_Bd, axis=1) == draft_Bd) & (jnp.arange(d)[None] < known_B1)
        agreed_B = jnp.sum(jnp.cumprod(agrees_Bd, axis=1), axis=1)
        match_BM = jax.nn.one_hot(match_B - 1, self.lookup.max_ngram)  # zeros without a match
        return agreed_B @ match_BM, jnp.minimum(agreed_B + 1, known_B1[:, 0]) @ match_BM

    def speculate(self, model: Transformer, state: DecodeState) -> DecodeState:
        """Run a round of ``speculation`` with its own policy state and the exit queries that it needs."""
        gains, own = state.policy_state
        queries, exits, Q = state.cache.exit_query_BQD, len(self.speculation.exits), self.speculation.draft_length + 1
        cache = dataclasses.replace(state.cache, exit_query_BQD=[query_BQD[:, :Q] for query_BQD in queries[:exits]])
        after = self.speculation(model, dataclasses.replace(state, cache=cache, policy_state=own))
        # Put the arrays of full size back: the loop carry must keep its shapes, and no later round reads the queries.
        cache = dataclasses.replace(after.cache, exit_query_BQD=queries)
        return dataclasses.replace(after, cache=cache, policy_state=(gains, after.policy_state))

    def plain(self, model: Transformer, state: DecodeState) -> DecodeState:
        """Run a round of plain decoding, which counts for no exit."""
        after = Autoregressive(self.sampler)(model, state)
        statistics = dataclasses.replace(after.statistics, exit_rounds_X=state.statistics.exit_rounds_X)
        return dataclasses.replace(after, statistics=statistics)

    def exit_cost(self, config: ModelConfig, before: DecodeState, after: DecodeState) -> jax.Array:
        """Return the cost of the round between two states, from its drafts per active row and their mean exit."""
        exits_X = jnp.array(self.speculation.exits)
        drafted_X = (after.statistics.drafted_X - before.statistics.drafted_X)[: len(exits_X)]
        drafted = jnp.sum(drafted_X) / jnp.maximum(jnp.sum(~before.done_B), 1)
        mean_exit = drafted_X @ exits_X / jnp.maximum(jnp.sum(drafted_X), 1)
        return round_cost(config, mean_exit, drafted, self.overhead)

    def discounted(self, gains: Gains, new: Gains) -> Gains:
        """Decay ``gains`` towards `prior`, and add the sums ``new`` of one round."""
        keep = 1 - 1 / self.horizon
        return jax.tree.map(lambda p, old, add: p + keep * (old - p) + add, prior(self.lookup.max_ngram), gains, new)


def prior(max_ngram: int) -> Gains:
    """Return the gains before the first round: the exit emitted two tokens for the cost of one full pass, and 1.6 of
    2 looked-up tokens agreed.

    Most texts gain less, so both sources are tried. `Hybrid.discounted` decays the sums towards these values instead of
    0, so an exit that has not been used for long is tried again.
    """
    lookups = [jnp.full(max_ngram, count, jnp.float32) for count in (1.6, 2.0)]
    return Gains(jnp.float32(2.0), jnp.float32(1.0), *lookups)
