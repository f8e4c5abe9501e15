"""Generation on token ids: prefill the cache, then run rounds in one jitted `lax.while_loop`."""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layerskip_jax.checks import require
from layerskip_jax.compiler_options import rounds_options
from layerskip_jax.config import ModelConfig
from layerskip_jax.decoding.request import Generation, HostText, Request, check_request, fetch_text, round_up
from layerskip_jax.decoding.rounds import Strategy
from layerskip_jax.decoding.state import DecodeState, KVQCache, Statistics
from layerskip_jax.model import Transformer, compute_dtype, empty_cache, weight_count
from layerskip_jax.sharding import constrain, target_device_kind, target_platform

OnRounds = Callable[[HostText], Sequence[bool]]
"""Reads the text so far, and returns which rows to end now."""


@functools.partial(jax.jit, static_argnames=("strategy", "width"))
def prefill(strategy: Strategy, model: Transformer, request: Request, width: int) -> DecodeState:
    """Run the first ``width`` tokens through all blocks to fill the cache; return the state before the first round.

    The head does not run: the last token of a prompt goes through the model in the first round. Slots past the end of
    a prompt shorter than ``width`` are overwritten before any query sees them.
    """
    B, S = request.tokens_BS.shape
    layers = empty_cache(model.config, B, S)
    if width:
        rotary = model.rotary_tables(jnp.tile(jnp.arange(width), (B, 1)))
        x_BPD = model.embed(request.tokens_BS[:, :width])
        _, layers = model.run_cached(x_BPD, rotary, layers, 0, model.config.num_layers, filled=width)
    query_BQD = jnp.zeros((B, strategy.draft_length + 1, model.config.dim), compute_dtype(model.config))
    zero_X = jnp.zeros(max(1, len(strategy.exits)), jnp.int32)
    return DecodeState(
        tokens_BS=request.tokens_BS,
        drafted_BS=jnp.zeros((B, S), bool),
        length_B=request.length_B,
        limit_B=request.limit_B,
        done_B=request.length_B >= request.limit_B,
        eos=request.eos,
        cache=KVQCache(layers, [query_BQD for _ in strategy.exits]),
        policy_state=strategy.init_policy_state(model.config),
        key=request.key,
        statistics=Statistics(jnp.int32(0), zero_X, zero_X, jnp.zeros(strategy.draft_length + 1, jnp.int32), zero_X),
    )


def run_rounds(strategy: Strategy, model: Transformer, state: DecodeState, until: jax.Array) -> DecodeState:
    """Run rounds until every row is done or `Statistics.rounds` reaches ``until``. ``state`` is donated."""
    return rounds_program(model.config)(strategy, model, state, until)


def rounds_program(config: ModelConfig) -> Any:
    """Return the jitted form of `run_rounds`, with the `program_options` of the model."""
    return _jit_rounds(tuple(program_options(config).items()))


def program_options(config: ModelConfig) -> dict[str, str | bool]:
    """Return the compiler's options for decoding with a model on the current platform."""
    dtype = compute_dtype(config)
    return rounds_options(target_platform(), target_device_kind(), dtype.name, weight_count(config) * dtype.itemsize)


@functools.cache
def _jit_rounds(options: tuple[tuple[str, str | bool], ...]) -> Any:
    return jax.jit(_run_rounds, static_argnums=0, donate_argnums=2, compiler_options=dict(options))


def _run_rounds(strategy: Strategy, model: Transformer, state: DecodeState, until: jax.Array) -> DecodeState:
    def unfinished(state: DecodeState) -> jax.Array:
        return jnp.any(~state.done_B) & (state.statistics.rounds < until)

    state = jax.lax.while_loop(unfinished, lambda state: strategy(model, state), state)
    # On a mesh, replicate everything but the cache, so that every process can read the result.
    small = dataclasses.replace(state, cache=KVQCache([], []))
    return dataclasses.replace(jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), small), cache=state.cache)


def begin(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    strategy: Strategy,
    *,
    eos: int | Sequence[int] = -1,
    seed: int = 0,
    max_length: int | None = None,
) -> DecodeState:
    """Check the request and prefill; return the state before the first round.

    ``model`` is an `unstacked` one. ``max_length`` bounds prompt + new tokens of a row; the default just fits. Raises
    `UserError` as `check_request` does.
    """
    max_length = check_request(model, prompts, max_new_tokens, max_length, strategy, eos, seed)
    # d+1 extra slots: a round writes d+1 tokens after the known ones, even where the row's limit cuts most of them off.
    capacity = round_up(max_length + strategy.draft_length + 1)
    width = round_up(max(map(len, prompts)) - 1)  # fits the capacity, because max_length exceeds the longest prompt
    tokens_BS = np.zeros((len(prompts), capacity), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BS[row, : len(prompt)] = prompt
    length_B = np.array([len(prompt) for prompt in prompts], np.int32)
    limit_B = np.minimum(length_B.astype(np.int64) + max_new_tokens, max_length).astype(np.int32)
    tokens, length, limit, end = map(jnp.asarray, (tokens_BS, length_B, limit_B, np.array(eos, np.int32, ndmin=1)))
    return prefill(strategy, model, Request(tokens, length, limit, end, jax.random.key(seed)), width)


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    strategy: Strategy,
    *,
    eos: int | Sequence[int] = -1,
    seed: int = 0,
    max_length: int | None = None,
    on_rounds: OnRounds | None = None,
    rounds_per_call: int = 1,
) -> Generation:
    """Continue ``prompts`` (token ids, of any lengths) by up to ``max_new_tokens`` each, in one jitted loop.

    A row ends at its first end token. ``eos`` is one token id, several, or -1 for none.

    With ``on_rounds``, the loop returns to the host after every ``rounds_per_call`` rounds and calls it, for streaming
    and stop strings. Raises `UserError` as `begin` does, for ``rounds_per_call`` below 1, and if the logits of a row
    are not finite.

    >>> from flax import nnx
    >>> from layerskip_jax.config import ModelConfig
    >>> from layerskip_jax.decoding.policies import Fixed
    >>> from layerskip_jax.decoding.rounds import SelfSpeculative
    >>> from layerskip_jax.decoding.sampling import Greedy
    >>> config = ModelConfig(num_layers=2, dim=16, num_heads=2, num_kv_heads=1, ffn_dim=32, vocab_size=32)
    >>> model = Transformer(config, rngs=nnx.Rngs(0)).unstacked()
    >>> result = generate(model, [[1, 2, 3], [4]], 8, SelfSpeculative(Greedy(), Fixed(1, 2)))
    >>> [len(row) for row in result.tokens]
    [8, 8]
    """
    require(rounds_per_call >= 1, f"rounds_per_call must be at least 1, not {rounds_per_call}")
    began = time.perf_counter()
    state = begin(model, prompts, max_new_tokens, strategy, eos=eos, seed=seed, max_length=max_length)
    # Compile by a call that runs no round, so that `Generation.seconds` excludes it. Unlike `lower().compile()`,
    # this costs nothing if jit's cache has the program.
    state = jax.block_until_ready(run_rounds(strategy, model, state, jnp.int32(0)))
    prefilled, most = time.perf_counter(), np.iinfo(np.int32).max
    if on_rounds is None:
        state = run_rounds(strategy, model, state, jnp.int32(most))
    else:
        for calls in itertools.count(1):
            state = run_rounds(strategy, model, state, jnp.int32(min(calls * rounds_per_call, most)))
            text = fetch_text(state)
            # In numpy, since a jnp operation would compile here, in the timed part.
            done_B = text.done_B | np.asarray(on_rounds(text))
            # Keep the sharding, and whether it is committed: jit recompiles if either changes.
            sharding = state.done_B.sharding if state.done_B.committed else None
            state = dataclasses.replace(state, done_B=jax.device_put(done_B, sharding))
            if done_B.all():
                break
    state = jax.block_until_ready(state)
    seconds, exits = time.perf_counter() - prefilled, strategy.exits or (model.config.num_layers,)
    return Generation.from_state(state, prompts, exits, seconds=seconds, prefill_seconds=prefilled - began)
