"""Decoding strategies: plain decoding, and self-speculation (draft, verify, accept, roll back) from one exit.

A strategy runs one round: a pure function ``(model, state) -> state`` on an `unstacked` model, which keeps the
invariants of `state.py`. `adaptive.AdaptiveSpeculative` builds on `SelfSpeculative`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from layerskip_jax.cache import LayerCache
from layerskip_jax.checks import require
from layerskip_jax.config import ModelConfig
from layerskip_jax.decoding.policies import DraftPolicy, Outcome, Plan, Probe, checked_plan
from layerskip_jax.decoding.sampling import Drafts, Sampler, Verdict
from layerskip_jax.decoding.state import DecodeState, KVQCache, Statistics, emit
from layerskip_jax.model import Transformer
from layerskip_jax.rope import RotaryTables


class Strategy(Protocol):
    """The interface of a decoding strategy for `engine.generate`. It is hashable, because it is static under jit."""

    @property
    def draft_length(self) -> int:
        """d: the most tokens that a round drafts; a round emits at most d+1 tokens."""

    @property
    def exits(self) -> Sequence[int]:
        """The exits that the statistics tell apart; the KVQ cache has an exit query for each."""

    def init_policy_state(self, model: ModelConfig) -> Any:
        """Return `DecodeState.policy_state` before the first round."""

    def __call__(self, model: Transformer, state: DecodeState) -> DecodeState:
        """Run one round."""


@dataclasses.dataclass(frozen=True)
class Autoregressive:
    """Plain decoding: run all blocks for one token. On `Transformer.first_layers` it is early exit, which is lossy."""

    sampler: Sampler
    draft_length: int = dataclasses.field(init=False, default=0)
    exits: Sequence[int] = dataclasses.field(init=False, default=())

    def init_policy_state(self, model: ModelConfig) -> Any:
        return ()

    def __call__(self, model: Transformer, state: DecodeState) -> DecodeState:
        token_B, position_B = state.last_token()
        key, draw_key = jax.random.split(state.key)
        rotary, depth = model.rotary_tables(position_B[:, None]), model.config.num_layers
        x_B1D, layers = model.run_cached(model.embed(token_B[:, None]), rotary, state.cache.layers, 0, depth)
        next_B = self.sampler.draw(model.unembed(x_B1D)[:, 0], draw_key)
        state = dataclasses.replace(state, key=key, cache=dataclasses.replace(state.cache, layers=layers))
        return finish_round(state, *no_drafts(next_B))


@dataclasses.dataclass(frozen=True)
class SelfSpeculative:
    """Blocks [0, E) draft up to d tokens, then blocks [E, L) verify them in one pass (LayerSkip section 4.3).

    E is the policy's only exit. A round drafts at least one token; the policy's plan and `DraftPolicy.keep_drafting`
    limit the number. The verification always has d+1 positions.
    """

    sampler: Sampler
    policy: DraftPolicy

    def __post_init__(self) -> None:
        exits, name = " ".join(map(str, self.policy.exits)), type(self.policy).__name__
        require(
            len(self.policy.exits) == 1,
            f"{name} has the candidate exits {exits}, but SelfSpeculative drafts from one: use AdaptiveSpeculative",
        )

    @property
    def draft_length(self) -> int:
        return self.policy.draft_length

    @property
    def exits(self) -> Sequence[int]:
        return self.policy.exits

    def init_policy_state(self, model: ModelConfig) -> Any:
        return self.policy.init_state(model)

    def __call__(self, model: Transformer, state: DecodeState) -> DecodeState:
        key, draft_key, verify_key = jax.random.split(state.key, 3)
        plan = checked_plan(self.policy, state.policy_state, least=1)
        cache, drafts, notes = self.draft(model, state, plan, draft_key)
        cache, verdict = self.verify(model, state, cache, drafts, verify_key)
        outcome = Outcome(plan, drafts.count_B, verdict.accepted_B, Probe.none(1), notes)
        policy_state = self.policy.update(state.policy_state, outcome)
        state = dataclasses.replace(state, key=key, cache=cache, policy_state=policy_state)
        # Accept the drafts up to the first that is wrong, and the full model's own token after them. The new length is
        # also the rollback: positions past it are masked, and later rounds overwrite them.
        return finish_round(state, drafts, verdict)

    def draft(self, model: Transformer, state: DecodeState, plan: Plan, key: jax.Array) -> tuple[KVQCache, Drafts, Any]:
        """Draft one token per pass, and store the exit query of every position.

        A row stops drafting at the planned length, at an EOS, or when the policy says so. After the last draft, one
        more pass runs the early blocks without the head, to store that draft's exit query. Returns the cache, the
        drafts, and the policy's notes about them.
        """
        start_token_B, start_B = state.last_token()

        def draft_token(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            slot, _, cache, *drafted = carry
            drafting_B, token_B, *_ = drafted
            rotary = model.rotary_tables((start_B + slot)[:, None])
            queries, layers = self.early_blocks(model, plan, rotary, model.embed(token_B[:, None]), cache.layers)
            pairs = zip(cache.exit_query_BQD, queries, strict=True)
            cache = KVQCache(layers, [jax.lax.dynamic_update_slice(q_BQD, x, (0, slot, 0)) for q_BQD, x in pairs])

            def propose(drafting_B: jax.Array, token_B: jax.Array, drafts: Drafts, notes: Any) -> tuple[Any, ...]:
                logits_BV = model.unembed(queries[-1])[:, 0]
                token_B, probs = self.sampler.propose(logits_BV, jax.random.fold_in(key, slot))
                keep_B, notes = self.policy.keep_drafting(state.policy_state, notes, token_B, logits_BV)
                drafts = drafts.put(slot, token_B, probs, drafting_B)
                return drafting_B & keep_B & ~jnp.isin(token_B, state.eos), token_B, drafts, notes

            more = (slot < plan.draft_length) & jnp.any(drafting_B)
            return slot + 1, more, cache, *jax.lax.cond(more, propose, lambda *same: same, *drafted)

        drafts = empty_drafts(self.sampler, state, self.draft_length, model.config.vocab_size)
        notes = self.policy.init_notes(~state.done_B)
        # The carry: next slot, whether to continue, cache, rows that still draft, their last token, drafts, and notes.
        drafted = (~state.done_B, start_token_B, drafts, notes)
        carry = (jnp.int32(0), jnp.asarray(plan.draft_length > 0), state.cache, *drafted)
        _, _, cache, _, _, drafts, notes = jax.lax.while_loop(lambda carry: carry[1], draft_token, carry)
        return cache, drafts, notes

    def early_blocks(
        self, model: Transformer, plan: Plan, rotary: RotaryTables, x_B1D: jax.Array, layers: list[LayerCache]
    ) -> tuple[list[jax.Array], list[LayerCache]]:
        """Run the blocks that draft; return the hidden state at each exit, and the caches."""
        x_B1D, layers = model.run_cached(x_B1D, rotary, layers, 0, self.exits[0])
        return [x_B1D], layers

    def verify(
        self, model: Transformer, state: DecodeState, cache: KVQCache, drafts: Drafts, key: jax.Array
    ) -> tuple[KVQCache, Verdict]:
        """Run all d+1 positions through blocks [E, L) in one pass, from their exit queries, and judge the drafts."""
        _, start_B = state.last_token()
        rotary = model.rotary_tables(start_B[:, None] + jnp.arange(self.draft_length + 1)[None])
        query_BQD, first, last = cache.exit_query_BQD[0], self.exits[0], model.config.num_layers
        x_BQD, layers = model.run_cached(query_BQD, rotary, cache.layers, first, last)
        verdict = self.sampler.verify(model.unembed(x_BQD), drafts, key)
        return dataclasses.replace(cache, layers=layers), verdict


def empty_drafts(sampler: Sampler, state: DecodeState, draft_length: int, vocabulary: int) -> Drafts:
    """Return d empty slots per row, with `Drafts.probs` of the shapes that ``sampler.propose`` returns."""
    rows = state.done_B.shape[0]
    logits = jax.ShapeDtypeStruct((rows, vocabulary), jnp.float32)
    _, shapes = jax.eval_shape(sampler.propose, logits, state.key)
    probs = jax.tree.map(lambda s: jnp.zeros((rows, draft_length, *s.shape[1:]), s.dtype), shapes)
    return Drafts(jnp.zeros((rows, draft_length), jnp.int32), jnp.zeros(rows, jnp.int32), probs)


def no_drafts(next_B: jax.Array) -> tuple[Drafts, Verdict]:
    """Return the drafts (d = 0) and the verdict of a round that emits only ``next_B``."""
    none_B = jnp.zeros_like(next_B)
    return Drafts(none_B[:, None][:, :0], none_B, ()), Verdict(none_B, next_B)


def finish_round(
    state: DecodeState,
    drafts: Drafts,
    verdict: Verdict,
    exit_index: int | jax.Array = 0,
    used_exit: bool | jax.Array = True,
) -> DecodeState:
    """Emit each row's accepted drafts and its next token, and update the statistics.

    ``exit_index`` selects the entry of `Strategy.exits` that this round counts for. With ``used_exit`` false, the round
    counts for no exit. `ConfidentExit` drafts nothing and passes an index per row: each row counts for its own exit, or
    for none if its index is out of range.
    """
    active_B, old = ~state.done_B, state.statistics
    counts = len(old.accepted_histogram_Q)
    counted_BQ = jax.nn.one_hot(verdict.accepted_B, counts, dtype=jnp.int32) * active_B[:, None]
    statistics = Statistics(
        rounds=old.rounds + 1,
        drafted_X=old.drafted_X.at[exit_index].add(jnp.sum(drafts.count_B * active_B)),
        accepted_X=old.accepted_X.at[exit_index].add(jnp.sum(verdict.accepted_B * active_B)),
        accepted_histogram_Q=old.accepted_histogram_Q + jnp.sum(counted_BQ, axis=0),
        exit_rounds_X=old.exit_rounds_X.at[exit_index].add(jnp.int32(used_exit)),
    )
    state = emit(state, drafts.tokens_Bd, verdict.accepted_B, verdict.next_B)
    return dataclasses.replace(state, statistics=statistics)
