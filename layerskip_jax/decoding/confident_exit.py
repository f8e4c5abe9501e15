"""Early exit by confidence: lossy. Each token leaves at the first exit that is sure of it; not the full model's text.

This is not in the LayerSkip paper; it follows CALM (arXiv 2207.07061): softmax confidence, and for the blocks that a
token did not run, keys and values from the hidden state with which it left.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layerskip_jax.attention import LayerCache
from layerskip_jax.checks import require
from layerskip_jax.config import ModelConfig
from layerskip_jax.decoding.conditional import run_if
from layerskip_jax.decoding.rounds import finish_round, no_drafts
from layerskip_jax.decoding.sampling import Sampler
from layerskip_jax.decoding.state import DecodeState
from layerskip_jax.model import Block, Positions, Transformer, run_layers


@dataclasses.dataclass(frozen=True)
class ConfidentExit:
    """Run blocks until the likeliest next token has a probability of ``threshold`` or more at one of ``exits``.

    The last of ``exits`` is L, where every token leaves that has not before: all do, if the threshold is above 1. Rows
    of a batch leave each for itself; the blocks run as long as one row is left.
    """

    sampler: Sampler
    exits: Sequence[int]
    threshold: float
    draft_length: int = 0

    def __post_init__(self) -> None:
        require(self.threshold >= 0, f"threshold must not be negative, but is {self.threshold}")

    def start(self, model: ModelConfig) -> Any:
        last = max(self.exits, default=0)
        require(last == model.num_layers, f"the last exit must be {model.num_layers}, the last layer, and not {last}")
        return ()

    def __call__(self, model: Transformer, state: DecodeState) -> DecodeState:
        token_B, position_B = state.last_token()
        position = model.positions(position_B[:, None])
        key, draw_key = jax.random.split(state.key)
        # Whoever has left, and rows that were done before, only pass their keys and values on.
        nowhere_B = jnp.full_like(token_B, len(self.exits))
        way = _Way(model.embed(token_B[:, None]), state.cache.layers, state.done_B, token_B, nowhere_B)
        for index, (first, last) in enumerate(zip((0, *self.exits), self.exits, strict=False)):
            all_left = jnp.all(way.left_B)
            blocks = partial(self._run, model, position, first, last, index, jax.random.fold_in(draw_key, index))
            way = run_if(all_left, partial(_pass_on, model, position, first, last), way)
            way = run_if(~all_left, blocks, way)
        state = dataclasses.replace(state, key=key, cache=dataclasses.replace(state.cache, layers=way.layers))
        return finish_round(state, *no_drafts(state), way.next_B, way.exit_B)

    def _run(
        self,
        model: Transformer,
        position: Positions,
        first: int,
        last: int,
        index: int,
        key: jax.Array,
        way: "_Way",
    ) -> "_Way":
        """Run blocks [first, last) for the rows that are left, and let those go that are sure of their token."""

        def step(block: Block, x_B1D: jax.Array, layer: LayerCache) -> tuple[jax.Array, LayerCache]:
            delta_B1D, written = block(x_B1D, position, cache=layer)
            assert written is not None
            return jnp.where(way.left_B[:, None, None], x_B1D, x_B1D + delta_B1D), written

        x_B1D, written = run_layers(model.blocks, way.x_B1D, step, way.layers[first:last], first, last)
        logits_BV = model.unembed(x_B1D)[:, 0]
        sure_B = jnp.max(jax.nn.softmax(logits_BV), axis=-1) >= self.threshold
        leaves_B = ~way.left_B & (sure_B if last < model.config.num_layers else True)
        drawn_B = self.sampler.draw(logits_BV, key).astype(jnp.int32)
        return _Way(
            x_B1D,
            [*way.layers[:first], *written, *way.layers[last:]],
            way.left_B | leaves_B,
            jnp.where(leaves_B, drawn_B, way.next_B),
            jnp.where(leaves_B, index, way.exit_B),
        )


class _Way(NamedTuple):
    """How far the tokens of a round have come."""

    x_B1D: jax.Array
    layers: list[LayerCache]
    left_B: jax.Array
    next_B: jax.Array
    exit_B: jax.Array  # index of the exit at which a row left


def _pass_on(model: Transformer, position: Positions, first: int, last: int, way: _Way) -> _Way:
    """Write the keys and values of blocks [first, last) and run nothing else of them."""
    blocks = zip(model.blocks[first:last], way.layers[first:last], strict=True)
    written = [block.propagate(way.x_B1D, position, layer) for block, layer in blocks]
    return way._replace(layers=[*way.layers[:first], *written, *way.layers[last:]])
