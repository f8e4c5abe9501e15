"""Early exit by confidence (lossy): each token exits at the first exit that is confident of it.

This is not in the LayerSkip paper; it follows CALM (arXiv 2207.07061). The confidence is the largest probability.
Blocks after a token's exit compute its keys and values from the hidden state at that exit.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layerskip_jax.cache import LayerCache
from layerskip_jax.checks import require
from layerskip_jax.config import ModelConfig
from layerskip_jax.decoding.conditional import run_if
from layerskip_jax.decoding.rounds import finish_round, no_drafts
from layerskip_jax.decoding.sampling import Sampler
from layerskip_jax.decoding.state import DecodeState
from layerskip_jax.model import Block, Transformer, run_layers
from layerskip_jax.rope import RotaryTables


class _Tokens(NamedTuple):
    """The tokens of a round, one per row, on their way through the blocks."""

    x_B1D: jax.Array
    layers: list[LayerCache]
    exited_B: jax.Array
    next_B: jax.Array
    exit_B: jax.Array  # index of the exit at which a row exited


@dataclasses.dataclass(frozen=True)
class ConfidentExit:
    """Run blocks until the most likely next token has a probability of at least ``threshold`` at one of ``exits``.

    The last of ``exits`` is L, where all remaining tokens exit; with a threshold above 1 all tokens reach it. The rows
    of a batch exit independently, and the blocks run until the last row has exited.
    """

    sampler: Sampler
    exits: Sequence[int]
    threshold: float
    draft_length: int = dataclasses.field(init=False, default=0)

    def __post_init__(self) -> None:
        require(self.threshold >= 0, f"threshold must be at least 0, not {self.threshold}")

    def init_policy_state(self, model: ModelConfig) -> Any:
        last = max(self.exits, default=0)
        require(last == model.num_layers, f"the last exit must be {model.num_layers}, the last layer, not {last}")
        return ()

    def __call__(self, model: Transformer, state: DecodeState) -> DecodeState:
        token_B, position_B = state.last_token()
        rotary = model.rotary_tables(position_B[:, None])
        key, draw_key = jax.random.split(state.key)
        # Rows that are done count as exited. Their exit index is out of range, so `finish_round` does not count them.
        no_exit_B = jnp.full_like(token_B, len(self.exits))
        tokens = _Tokens(model.embed(token_B[:, None]), state.cache.layers, state.done_B, token_B, no_exit_B)
        for index, blocks in enumerate(itertools.pairwise((0, *self.exits))):
            all_exited = jnp.all(tokens.exited_B)
            run = partial(self._run, model, rotary, blocks, index, jax.random.fold_in(draw_key, index))
            tokens = run_if(all_exited, partial(_propagate, model, rotary, blocks), tokens)
            tokens = run_if(~all_exited, run, tokens)
        state = dataclasses.replace(state, key=key, cache=dataclasses.replace(state.cache, layers=tokens.layers))
        return finish_round(state, *no_drafts(tokens.next_B), tokens.exit_B)

    def _run(
        self,
        model: Transformer,
        rotary: RotaryTables,
        blocks: tuple[int, int],
        index: int,
        key: jax.Array,
        tokens: _Tokens,
    ) -> _Tokens:
        """Run blocks [first, last) for the rows that have not exited; those that are confident exit here."""
        first, last = blocks

        def block_fn(block: Block, x_B1D: jax.Array, layer: LayerCache) -> tuple[jax.Array, LayerCache]:
            delta_B1D, written = block(x_B1D, rotary, cache=layer)
            assert written is not None
            return jnp.where(tokens.exited_B[:, None, None], x_B1D, x_B1D + delta_B1D), written

        x_B1D, written = run_layers(model.blocks, tokens.x_B1D, block_fn, tokens.layers[first:last], first, last)
        logits_BV = model.unembed(x_B1D)[:, 0]
        confident_B = jnp.max(jax.nn.softmax(logits_BV), axis=-1) >= self.threshold
        exits_B = ~tokens.exited_B & (confident_B if last < model.config.num_layers else True)
        drawn_B = self.sampler.draw(logits_BV, key).astype(jnp.int32)
        return _Tokens(
            x_B1D,
            [*tokens.layers[:first], *written, *tokens.layers[last:]],
            tokens.exited_B | exits_B,
            jnp.where(exits_B, drawn_B, tokens.next_B),
            jnp.where(exits_B, index, tokens.exit_B),
        )


def _propagate(model: Transformer, rotary: RotaryTables, blocks: tuple[int, int], tokens: _Tokens) -> _Tokens:
    """Write the keys and values of blocks [first, last) without running them."""
    first, last = blocks
    skipped = zip(model.blocks[first:last], tokens.layers[first:last], strict=True)
    written = [block.propagate(tokens.x_B1D, rotary, layer) for block, layer in skipped]
    return tokens._replace(layers=[*tokens.layers[:first], *written, *tokens.layers[last:]])
