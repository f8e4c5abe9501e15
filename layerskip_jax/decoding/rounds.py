"""The ways to go one round further: plain (one token), and speculative (draft, verify, accept, roll back).

A round is a pure function ``(model, state) -> state`` on an `unstacked` model. It keeps what `state.py` promises.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from layerskip_jax.config import ModelConfig
from layerskip_jax.decoding.conditional import run_blocks_if, run_if
from layerskip_jax.decoding.policies import DraftPolicy, Outcome, Plan, checked_plan
from layerskip_jax.decoding.sampling import Sampler
from layerskip_jax.decoding.state import DecodeState, KVQCache, Statistics, emit
from layerskip_jax.model import Positions, Transformer


class Round(Protocol):
    """One round of generation; hashable, since it is static under jit."""

    @property
    def draft_length(self) -> int:
        """d: the most tokens a round drafts; a round emits d+1 at most."""

    @property
    def exits(self) -> Sequence[int]:
        """The exits whose hidden states the KVQ cache keeps."""

    def start(self, model: ModelConfig) -> Any:
        """Return `DecodeState.memory` before the first round."""

    def __call__(self, model: Transformer, state: DecodeState) -> DecodeState: ...


class Verdict(NamedTuple):
    """What a verification says of the drafts, and (if it probed) of the exits; see `policies.Outcome`."""

    accepted_B: jax.Array
    next_B: jax.Array
    probed: jax.Array
    agreed_XQ: jax.Array
    reached_XQ: jax.Array


@dataclasses.dataclass(frozen=True)
class Autoregressive:
    """Run all blocks for one token, and emit the next. On `first_layers` of a model this is early exit (lossy)."""

    sampler: Sampler
    draft_length: int = 0
    exits: Sequence[int] = ()

    def start(self, model: ModelConfig) -> Any:
        return ()

    def __call__(self, model: Transformer, state: DecodeState) -> DecodeState:
        token_B, position_B = state.last_token()
        key, draw_key = jax.random.split(state.key)
        position, depth = model.positions(position_B[:, None]), model.config.num_layers
        x_B1D, layers = model.run_cached(model.embed(token_B[:, None]), position, state.cache.layers, 0, depth)
        next_B = self.sampler.draw(model.unembed(x_B1D)[:, 0], draw_key)
        state = dataclasses.replace(state, key=key, cache=dataclasses.replace(state.cache, layers=layers))
        return finish_round(state, *no_drafts(state), next_B)


@dataclasses.dataclass(frozen=True)
class SelfSpeculative:
    """Blocks [0, E) draft up to d tokens, blocks [E, L) verify them in one pass (LayerSkip section 4.3).

    The policy plans E and d of each round; the blocks between two candidate exits run under a condition.
    """

    sampler: Sampler
    policy: DraftPolicy

    @property
    def draft_length(self) -> int:
        return self.policy.draft_length

    @property
    def exits(self) -> Sequence[int]:
        return self.policy.exits

    def start(self, model: ModelConfig) -> Any:
        return self.policy.start(model)

    def __call__(self, model: Transformer, state: DecodeState) -> DecodeState:
        key, draft_key, verify_key = jax.random.split(state.key, 3)
        plan, widths = checked_plan(self.policy, state.memory)
        cache, draft_Bd, evidence, drafted_B = self._draft(model, state, plan, draft_key)

        # The narrowest verification that holds every row's drafts and the token they follow.
        needed, narrower = jnp.max(drafted_B) + 1, 0
        position = model.positions(state.last_token()[1][:, None] + jnp.arange(self.draft_length + 1)[None])
        none_B, none_XQ = jnp.zeros_like(state.length_B), jnp.zeros((len(self.exits), self.draft_length + 1))
        verdict = Verdict(none_B, none_B, jnp.bool(False), none_XQ, none_XQ)
        for width in widths:
            verify = partial(
                self._verify, model, state, plan, verify_key, position.first(width), draft_Bd, evidence, drafted_B
            )
            runs = (narrower < needed) & (needed <= width) if len(widths) > 1 else True
            cache, verdict = run_if(runs, verify, (cache, verdict))
            narrower = width

        outcome = Outcome(plan, ~state.done_B, drafted_B, verdict.accepted_B, *verdict[2:])
        state = dataclasses.replace(state, key=key, memory=self.policy.learn(state.memory, outcome), cache=cache)
        # Accept the agreeing prefix and the full model's own token after it; the length that results is the rollback.
        return finish_round(state, draft_Bd, drafted_B, *verdict[:2], plan.exit_index, jnp.any(drafted_B > 0))

    def _draft(
        self, model: Transformer, state: DecodeState, plan: Plan, key: jax.Array
    ) -> tuple[KVQCache, jax.Array, Any, jax.Array]:
        """Draft until every row has its tokens or an EOS, and take each last draft through the early blocks too."""
        start_token_B, start_B = state.last_token()
        B, d = start_token_B.shape[0], self.draft_length

        def early_blocks(token_B: jax.Array, slot: jax.Array, cache: KVQCache) -> tuple[jax.Array, KVQCache]:
            position = model.positions((start_B + slot)[:, None])
            hidden, queries = (model.embed(token_B[:, None]), cache.layers), []
            for index, blocks in enumerate(zip((0, *self.exits), self.exits, strict=False)):
                hidden = run_blocks_if(index == 0 or plan.exit_index >= index, model, position, blocks, hidden)
                queries.append(jax.lax.dynamic_update_slice(cache.exit_query_BQD[index], hidden[0], (0, slot, 0)))
            return hidden[0], KVQCache(hidden[1], queries)

        def one_pass(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            slot, _, cache, drafting_B, *drafts = carry
            x_B1D, cache = early_blocks(drafts[0], slot, cache)

            def propose(drafting_B: jax.Array, *drafts: Any) -> tuple[Any, ...]:
                _, draft_Bd, evidence, drafted_B = drafts
                logits_BV = model.unembed(x_B1D)[:, 0]
                token_B, new_evidence = self.sampler.propose(logits_BV, jax.random.fold_in(key, slot))
                put = lambda all_Bd, one_B: jax.lax.dynamic_update_index_in_dim(all_Bd, one_B, slot, axis=1)  # noqa: E731
                goes_on_B = (token_B != state.eos) & self.policy.goes_on(state.memory, token_B, logits_BV)
                evidence = jax.tree.map(put, evidence, new_evidence)
                return drafting_B & goes_on_B, token_B, put(draft_Bd, token_B), evidence, drafted_B + drafting_B

            drafts_more = (slot < plan.draft_length) & jnp.any(drafting_B)
            carry = jax.lax.cond(drafts_more, propose, lambda *same: same, drafting_B, *drafts)
            return slot + 1, drafts_more, cache, *carry

        logits = jax.ShapeDtypeStruct((B, model.config.vocab_size), jnp.float32)
        _, evidence_shapes = jax.eval_shape(self.sampler.propose, logits, key)
        evidence = jax.tree.map(lambda s: jnp.zeros((B, d, *s.shape[1:]), s.dtype), evidence_shapes)
        drafts = (start_token_B, jnp.zeros((B, d), jnp.int32), evidence, jnp.zeros(B, jnp.int32))
        carry = (jnp.int32(0), jnp.asarray(plan.draft_length > 0), state.cache, ~state.done_B, *drafts)
        _, _, cache, _, _, draft_Bd, evidence, drafted_B = jax.lax.while_loop(lambda carry: carry[1], one_pass, carry)
        return cache, draft_Bd, evidence, drafted_B

    def _verify(
        self,
        model: Transformer,
        state: DecodeState,
        plan: Plan,
        key: jax.Array,
        position: Positions,
        draft_Bd: jax.Array,
        evidence: Any,
        drafted_B: jax.Array,
        before: tuple[KVQCache, "Verdict"],
    ) -> tuple[KVQCache, "Verdict"]:
        """Take the exit queries of W positions through the remaining blocks at once, and judge the drafts."""
        cache, width = before[0], position.index_BT.shape[1]
        query_BWD, layers = [query_BQD[:, :width] for query_BQD in cache.exit_query_BQD], cache.layers
        plain = width == 1  # nothing was drafted, so no block has run: this is a round of plain decoding
        x_BWD = model.embed(state.last_token()[0][:, None]) if plain else query_BWD[0]
        for index, blocks in enumerate(zip((0, *self.exits), self.exits, strict=False)):
            runs = plain or (index > 0 and plan.exit_index < index)
            x_BWD, layers = run_blocks_if(runs, model, position, blocks, (x_BWD, layers))
            query_BWD[index] = x_BWD = x_BWD if plain else jnp.where(runs, x_BWD, query_BWD[index])
        x_BWD, layers = model.run_cached(x_BWD, position, layers, self.exits[-1], model.config.num_layers)
        logits_BWV = model.unembed(x_BWD)
        draft_Bw, evidence = draft_Bd[:, : width - 1], jax.tree.map(lambda e: e[:, : width - 1], evidence)
        accepted_B, next_B = self.sampler.verify(logits_BWV, draft_Bw, evidence, drafted_B, key)

        # The context of a position is the full model's own up to the first draft that it refused.
        valid_BW = (jnp.arange(width)[None] <= accepted_B[:, None]) & ~state.done_B[:, None]

        def compare(verdict: Verdict) -> Verdict:
            agreed, reached = [], []
            for x_BWD in query_BWD:
                agrees_BW = self.sampler.agreement(model.unembed(x_BWD), logits_BWV) * valid_BW
                all_agree_BW = jnp.cumprod(agrees_BW, axis=1)
                agreed.append(jnp.sum(all_agree_BW, axis=0))
                before_BW = jnp.pad(all_agree_BW[:, :-1], ((0, 0), (1, 0)), constant_values=1)
                reached.append(jnp.sum(before_BW * valid_BW, axis=0))
            fill = lambda sums: jnp.pad(jnp.stack(sums), ((0, 0), (0, self.draft_length + 1 - width)))  # noqa: E731
            return verdict._replace(probed=jnp.bool(True), agreed_XQ=fill(agreed), reached_XQ=fill(reached))

        verdict = before[1]._replace(accepted_B=accepted_B, next_B=next_B.astype(jnp.int32))
        # A condition proper: out of a loop of one turn or none, XLA would take the heads, and run them in every round.
        probes = self.policy.probes(state.memory)
        verdict = jax.lax.cond(probes, compare, lambda same: same, verdict) if probes is not False else verdict
        return dataclasses.replace(cache, layers=layers), verdict


def no_drafts(state: DecodeState) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return ``draft_Bd, drafted_B, accepted_B`` of a round that drafts nothing."""
    none_B = jnp.zeros_like(state.length_B)
    return none_B[:, None][:, :0], none_B, none_B


def finish_round(
    state: DecodeState,
    draft_Bd: jax.Array,
    drafted_B: jax.Array,
    accepted_B: jax.Array,
    next_B: jax.Array,
    exit_index: int | jax.Array = 0,
    counts: bool | jax.Array = True,
) -> DecodeState:
    """Emit each row's accepted drafts and the token after them, and count: for the exit if it ``counts`` there."""
    active_B, old = ~state.done_B, state.statistics
    counted_BQ = jax.nn.one_hot(accepted_B, draft_Bd.shape[1] + 1, dtype=jnp.int32) * active_B[:, None]
    statistics = Statistics(
        rounds=old.rounds + 1,
        drafted_X=old.drafted_X.at[exit_index].add(jnp.sum(drafted_B * active_B)),
        accepted_histogram_Q=old.accepted_histogram_Q + jnp.sum(counted_BQ, axis=0),
        exit_rounds_X=old.exit_rounds_X.at[exit_index].add(jnp.int32(counts)),
    )
    return dataclasses.replace(emit(state, draft_Bd, accepted_B, next_B), statistics=statistics)
