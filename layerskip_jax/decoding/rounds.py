"""The two ways to go one round further: plain (one token), and self-speculative (draft, verify, accept, roll back).

A round is a pure function ``(model, state) -> state`` on an `unstacked` model. It keeps what `state.py` promises.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from layerskip_jax.decoding.sampling import Sampler
from layerskip_jax.decoding.state import DecodeState, KVQCache, emit
from layerskip_jax.model import Transformer


class Round(Protocol):
    """One round of generation; hashable, since it is static under jit."""

    @property
    def draft_length(self) -> int:
        """d: the most tokens a round drafts; a round emits d+1 at most."""

    def __call__(self, model: Transformer, state: DecodeState) -> DecodeState: ...


@dataclasses.dataclass(frozen=True)
class Autoregressive:
    """Run all blocks for one token, and emit the next. On `first_layers` of a model this is early exit (lossy)."""

    sampler: Sampler
    draft_length: int = 0

    def __call__(self, model: Transformer, state: DecodeState) -> DecodeState:
        token_B, position_B = state.last_token()
        key, draw_key = jax.random.split(state.key)
        x_B1D = model.embed(token_B[:, None])
        x_B1D, layers = model.run_cached(x_B1D, position_B[:, None], state.cache.layers, 0, model.config.num_layers)
        next_B = self.sampler.draw(model.unembed(x_B1D)[:, 0], draw_key)
        state = dataclasses.replace(state, key=key, cache=dataclasses.replace(state.cache, layers=layers))
        none_B = jnp.zeros_like(state.length_B)
        return _finish(state, next_B[:, None], drafted_B=none_B, accepted_B=none_B)


@dataclasses.dataclass(frozen=True)
class SelfSpeculative:
    """Blocks [0, E) draft up to d tokens, blocks [E, L) verify them in one pass (LayerSkip section 4.3)."""

    sampler: Sampler
    exit_layer: int
    draft_length: int

    def __call__(self, model: Transformer, state: DecodeState) -> DecodeState:
        key, draft_key, verify_key = jax.random.split(state.key, 3)
        _, start_B = state.last_token()
        cache, draft_Bd, evidence, drafted_B = self._draft(model, state, draft_key)

        # Verify: the exit queries of all d+1 positions go through the remaining blocks at once.
        position_BQ = start_B[:, None] + jnp.arange(self.draft_length + 1)[None]
        x_BQD, layers = model.run_cached(
            cache.exit_query_BQD, position_BQ, cache.layers, self.exit_layer, model.config.num_layers
        )
        accepted_B, next_B = self.sampler.verify(model.unembed(x_BQD), draft_Bd, evidence, drafted_B, verify_key)

        # Accept the agreeing prefix and the full model's own token after it; the length that results is the rollback.
        slot_BQ = jnp.arange(self.draft_length + 1)[None]
        drafts_BQ = jnp.pad(draft_Bd, ((0, 0), (0, 1)))
        new_BQ = jnp.where(slot_BQ < accepted_B[:, None], drafts_BQ, next_B[:, None])
        state = dataclasses.replace(state, key=key, cache=dataclasses.replace(cache, layers=layers))
        return _finish(state, new_BQ, drafted_B, accepted_B)

    def _draft(
        self, model: Transformer, state: DecodeState, key: jax.Array
    ) -> tuple[KVQCache, jax.Array, Any, jax.Array]:
        """Draft until every row has d tokens or an EOS; then take each last draft through the early blocks too."""
        token_B, start_B = state.last_token()
        B, d = token_B.shape[0], self.draft_length

        def early_blocks(token_B: jax.Array, slot: jax.Array, cache: KVQCache) -> tuple[jax.Array, KVQCache]:
            position_B1 = (start_B + slot)[:, None]
            x_B1D, layers = model.run_cached(
                model.embed(token_B[:, None]), position_B1, cache.layers, 0, self.exit_layer
            )
            query_BQD = jax.lax.dynamic_update_slice(cache.exit_query_BQD, x_B1D, (0, slot, 0))
            return x_B1D, KVQCache(layers, query_BQD)

        def go_on(carry: tuple[Any, ...]) -> jax.Array:
            slot, _, _, _, _, _, drafting_B = carry
            return (slot < d) & jnp.any(drafting_B)

        def draft_one(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            slot, token_B, cache, draft_Bd, evidence, drafted_B, drafting_B = carry
            x_B1D, cache = early_blocks(token_B, slot, cache)
            token_B, new_evidence = self.sampler.propose(model.unembed(x_B1D)[:, 0], jax.random.fold_in(key, slot))
            put = lambda all_Bd, one_B: jax.lax.dynamic_update_index_in_dim(all_Bd, one_B, slot, axis=1)  # noqa: E731
            drafted_B = drafted_B + drafting_B
            drafting_B = drafting_B & (token_B != state.eos)
            evidence = jax.tree.map(put, evidence, new_evidence)
            return slot + 1, token_B, cache, put(draft_Bd, token_B), evidence, drafted_B, drafting_B

        logits = jax.ShapeDtypeStruct((B, model.config.vocab_size), jnp.float32)
        _, evidence_shapes = jax.eval_shape(self.sampler.propose, logits, key)
        evidence = jax.tree.map(lambda s: jnp.zeros((B, d, *s.shape[1:]), s.dtype), evidence_shapes)
        none_B = jnp.zeros(B, jnp.int32)
        carry = (jnp.int32(0), token_B, state.cache, jnp.zeros((B, d), jnp.int32), evidence, none_B, ~state.done_B)
        slot, token_B, cache, draft_Bd, evidence, drafted_B, _ = jax.lax.while_loop(go_on, draft_one, carry)
        _, cache = early_blocks(token_B, slot, cache)
        return cache, draft_Bd, evidence, drafted_B


def _finish(state: DecodeState, new_BQ: jax.Array, drafted_B: jax.Array, accepted_B: jax.Array) -> DecodeState:
    """Emit each row's accepted drafts and the token after them, and count."""
    active_B = ~state.done_B
    state, emitted_B = emit(state, new_BQ, accepted_B + 1)
    old = state.statistics
    buckets_Q = old.accepted_histogram_Q.shape[0]
    counted_BQ = jax.nn.one_hot(accepted_B, buckets_Q, dtype=jnp.int32) * active_B[:, None]
    statistics = dataclasses.replace(
        old,
        rounds=old.rounds + 1,
        drafted=old.drafted + jnp.sum(drafted_B * active_B),
        accepted_histogram_Q=old.accepted_histogram_Q + jnp.sum(counted_BQ, axis=0),
        accepted_B=jnp.minimum(accepted_B, emitted_B),
        emitted_B=emitted_B,
    )
    return dataclasses.replace(state, statistics=statistics)
