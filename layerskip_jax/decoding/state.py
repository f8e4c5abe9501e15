"""The state of a generation: one frozen struct that the jitted loop carries from round to round.

What holds between rounds, for every row on its own:
    tokens[:length]     the prompt and what has been emitted
    cache[: length-1]   keys and values of all blocks; the last known token has not been through the model yet
Slots at and after length-1 may hold what a rolled-back draft or a padded prompt left. Nothing sees them: a query at
position i sees slots up to i, and slot i is written when position i is processed. So rolling back is setting `length`.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from layerskip_jax.attention import LayerCache
from layerskip_jax.decoding.sampling import NO_TOKEN


@flax.struct.dataclass
class KVQCache:
    """The one cache of both stages (LayerSkip section 4.3.3): keys and values of all blocks, and the exit queries.

    ``exit_query_BQD`` holds x_E of the Q = d+1 positions of the running round, for each exit E that may draft: the
    verification starts from it.
    """

    layers: list[LayerCache]
    exit_query_BQD: list[jax.Array]


@flax.struct.dataclass
class Statistics:
    """What a generation counts, over the rows that were not done."""

    rounds: jax.Array  # of the loop
    drafted_X: jax.Array  # tokens that each exit that may draft has proposed
    accepted_histogram_Q: jax.Array  # rounds of a row in which exactly 0..d drafts were accepted
    exit_rounds_X: jax.Array  # rounds of the loop that drafted at each exit (or tokens that left there)


@flax.struct.dataclass
class DecodeState:
    """See the module's docstring for what holds between rounds. S is the capacity, past every row's ``limit_B``."""

    tokens_BS: jax.Array
    drafted_BS: jax.Array  # which of the known tokens were drafts
    length_B: jax.Array  # known tokens
    limit_B: jax.Array  # known tokens at which a row is done
    done_B: jax.Array
    eos: jax.Array  # the token that ends a row; -1 is none
    cache: KVQCache
    memory: Any  # what a draft policy remembers from round to round
    key: jax.Array
    statistics: Statistics

    def last_token(self) -> tuple[jax.Array, jax.Array]:
        """Return every row's last known token and its position: where the next round starts."""
        position_B = self.length_B - 1
        return jnp.take_along_axis(self.tokens_BS, position_B[:, None], axis=1)[:, 0], position_B


def emit(state: DecodeState, draft_Bd: jax.Array, accepted_B: jax.Array, next_B: jax.Array) -> DecodeState:
    """Append each row's accepted drafts and the token after them, ending a row after EOS, `NO_TOKEN` or at its limit.

    Rows that were done get nothing. All Q = d+1 slots are written and ``length_B`` says how many are known: the
    capacity leaves room for them.
    """
    slot_BQ = jnp.arange(draft_Bd.shape[1] + 1)[None]
    is_draft_BQ = slot_BQ < accepted_B[:, None]
    new_BQ = jnp.where(is_draft_BQ, jnp.pad(draft_Bd, ((0, 0), (0, 1))), next_B[:, None])
    is_eos_BQ = ((new_BQ == state.eos) | (new_BQ == NO_TOKEN)) & (slot_BQ <= accepted_B[:, None])
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
