"""The state of a generation: one frozen struct that the jitted loop carries from round to round.

Invariants between rounds, per row:
    tokens[:length]     the prompt and the emitted tokens
    cache[: length-1]   keys and values of all blocks; the last known token has not run through the model yet
Slots from length-1 on may hold leftovers of a rejected draft or of a padded prompt. No query sees them: a query at
position i sees slots up to i, and slot i is written when position i runs. So a rollback only sets `length`.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from layerskip_jax.cache import LayerCache
from layerskip_jax.decoding.sampling import NO_TOKEN


@flax.struct.dataclass
class KVQCache:
    """One cache for drafting and verification (LayerSkip section 4.3.3): keys and values, and the exit queries.

    ``exit_query_BQD`` has one array per exit of the strategy: the hidden states at that exit, for the Q = d+1 positions
    of the current round. The verification starts from them. Arrays of exits after the one that drafted hold a copy of
    its hidden states. `Branching`, and strategies that do not draft by early exit, leave all arrays zero.
    """

    layers: list[LayerCache]
    exit_query_BQD: list[jax.Array]


@flax.struct.dataclass
class Statistics:
    """Counts over a generation. Rows that are done no longer count.

    X is the number of the strategy's exits. For a strategy without exits X is 1, and that entry counts all rounds and
    drafts.
    """

    rounds: jax.Array  # of the loop, which all rows share
    drafted_X: jax.Array  # tokens drafted at each exit, added up over rows
    accepted_X: jax.Array  # of those, the accepted ones
    accepted_histogram_Q: jax.Array  # how often a row accepted exactly 0..d drafts in a round
    exit_rounds_X: jax.Array  # rounds of the loop that drafted at each exit (`ConfidentExit`: tokens that exited there)


@flax.struct.dataclass
class DecodeState:
    """The state between rounds; its invariants are at the top of the file. The capacity S exceeds every ``limit_B``."""

    tokens_BS: jax.Array
    drafted_BS: jax.Array  # whether a known token was an accepted draft
    length_B: jax.Array  # known tokens
    limit_B: jax.Array  # number of known tokens at which a row is done
    done_B: jax.Array
    eos: jax.Array  # the tokens that end a row: one or several; -1 for none
    cache: KVQCache
    policy_state: Any  # what the draft policy has learned
    key: jax.Array
    statistics: Statistics

    def last_token(self) -> tuple[jax.Array, jax.Array]:
        """Return every row's last known token and its position, where the next round starts."""
        position_B = self.length_B - 1
        return jnp.take_along_axis(self.tokens_BS, position_B[:, None], axis=1)[:, 0], position_B


def emit(state: DecodeState, draft_Bd: jax.Array, accepted_B: jax.Array, next_B: jax.Array) -> DecodeState:
    """Append each row's accepted drafts and the token after them; end a row after an EOS, `NO_TOKEN` or at its limit.

    Every row overwrites Q = d+1 slots; the capacity has room for them. ``length_B`` grows by the number of emitted
    tokens, and does not change in a row that was done before.
    """
    slot_BQ = jnp.arange(draft_Bd.shape[1] + 1)[None]
    is_draft_BQ = slot_BQ < accepted_B[:, None]
    new_BQ = jnp.where(is_draft_BQ, jnp.pad(draft_Bd, ((0, 0), (0, 1))), next_B[:, None])
    is_eos_BQ = (jnp.isin(new_BQ, state.eos) | (new_BQ == NO_TOKEN)) & (slot_BQ <= accepted_B[:, None])
    has_eos_B = jnp.any(is_eos_BQ, axis=1)
    count_B = jnp.where(has_eos_B, jnp.argmax(is_eos_BQ, axis=1), accepted_B) + 1
    room_B = state.limit_B - state.length_B
    ends_with_eos_B = has_eos_B & (count_B <= room_B)
    length_B = state.length_B + jnp.where(state.done_B, 0, jnp.minimum(count_B, room_B))

    write_row = jax.vmap(lambda row_S, new_Q, start: jax.lax.dynamic_update_slice(row_S, new_Q, (start,)))
    return dataclasses.replace(
        state,
        tokens_BS=write_row(state.tokens_BS, new_BQ, state.length_B),
        drafted_BS=write_row(state.drafted_BS, is_draft_BQ, state.length_B),
        length_B=length_B,
        done_B=state.done_B | ends_with_eos_B | (length_B >= state.limit_B),
    )
