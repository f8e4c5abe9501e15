"""Prompt lookup: draft the tokens that followed the last earlier occurrence of the text's ending.

It needs no early exits and no training, so it is the baseline for self-speculation. It is lossless too.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from layerskip_jax.checks import require_positive
from layerskip_jax.config import ModelConfig
from layerskip_jax.decoding.conditional import run_if
from layerskip_jax.decoding.rounds import Autoregressive, finish_round
from layerskip_jax.decoding.sampling import Drafts, Sampler
from layerskip_jax.decoding.state import DecodeState
from layerskip_jax.model import Transformer


def look_up(
    tokens_BS: jax.Array, length_B: jax.Array, max_ngram: int, draft_length: int
) -> tuple[jax.Array, jax.Array]:
    """Return ``draft_Bd``, the tokens that followed an earlier match of the text's last tokens, and ``match_B``.

    ``match_B`` is the number of tokens that match, at most ``max_ngram``; 0 means no match, and then no draft. The
    longest match wins; among equally long ones, the latest. A draft that reaches the end of the text repeats from its
    own beginning, as periodic text does.

    >>> tokens = jnp.array([[5, 1, 2, 3, 4, 1, 2, 0]])
    >>> [a.tolist() for a in look_up(tokens, jnp.array([7]), max_ngram=3, draft_length=3)]
    [[[3, 4, 1]], [2]]
    """
    slot_1S, length_B1 = jnp.arange(tokens_BS.shape[1])[None], length_B[:, None]
    matches_BS = (slot_1S >= 1) & (slot_1S < length_B1)  # slots that can follow a match
    score_BS = jnp.zeros(tokens_BS.shape, jnp.int32)  # length of the match that ends before each slot
    for back in range(1, max_ngram + 1):
        end_B1 = jnp.take_along_axis(tokens_BS, jnp.maximum(length_B1 - back, 0), axis=1)
        matches_BS &= (jnp.roll(tokens_BS, back, axis=1) == end_B1) & (slot_1S >= back)
        score_BS += matches_BS
    best_B1 = jnp.argmax(score_BS * tokens_BS.shape[1] + slot_1S, axis=1)[:, None]
    match_B1 = jnp.take_along_axis(score_BS, best_B1, axis=1)
    slot_Bd = best_B1 + jnp.arange(draft_length)[None] % jnp.where(match_B1 > 0, length_B1 - best_B1, 1)
    return jnp.take_along_axis(tokens_BS, slot_Bd, axis=1), match_B1[:, 0]


@dataclasses.dataclass(frozen=True)
class PromptLookup:
    """Draft by `look_up`, and verify with all blocks in one pass. If no row has a match, decode plainly."""

    sampler: Sampler
    draft_length: int
    max_ngram: int = 3
    exits: Sequence[int] = dataclasses.field(init=False, default=())

    def __post_init__(self) -> None:
        require_positive("draft_length", self.draft_length)
        require_positive("max_ngram", self.max_ngram)

    def init_policy_state(self, model: ModelConfig) -> Any:
        return ()

    def __call__(self, model: Transformer, state: DecodeState) -> DecodeState:
        draft_Bd, match_B = self.look_up(state)
        found = jnp.any((match_B > 0) & ~state.done_B)
        state = run_if(found, lambda state: self.verify(model, state, draft_Bd, match_B), state)
        return run_if(~found, lambda state: Autoregressive(self.sampler)(model, state), state)

    def look_up(self, state: DecodeState) -> tuple[jax.Array, jax.Array]:
        """Return `look_up` of the text of each row."""
        return look_up(state.tokens_BS, state.length_B, self.max_ngram, self.draft_length)

    def verify(
        self, model: Transformer, state: DecodeState, draft_Bd: jax.Array, match_B: jax.Array, exit_index: int = 0
    ) -> DecodeState:
        """Run a round with the result of `look_up`; ``exit_index`` selects the statistics, as in `finish_round`."""
        key, verify_key = jax.random.split(state.key)
        token_B, position_B = state.last_token()
        probs = self.sampler.deterministic_draft_probs(draft_Bd, model.config.vocab_size)
        drafts = Drafts(draft_Bd, jnp.where(state.done_B | (match_B == 0), 0, self.draft_length), probs)
        token_BQ = jnp.concatenate([token_B[:, None], draft_Bd], axis=1)
        rotary = model.rotary_tables(position_B[:, None] + jnp.arange(self.draft_length + 1)[None])
        x_BQD, layers = model.run_cached(model.embed(token_BQ), rotary, state.cache.layers, 0, model.config.num_layers)
        verdict = self.sampler.verify(model.unembed(x_BQD), drafts, verify_key)
        state = dataclasses.replace(state, key=key, cache=dataclasses.replace(state.cache, layers=layers))
        return finish_round(state, drafts, verdict, exit_index)
