"""Generation on token ids: prefill the cache, then run rounds in one jitted `lax.while_loop`."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from layerskip_jax.decoding.request import Generation, check_request, round_up
from layerskip_jax.decoding.rounds import Round
from layerskip_jax.decoding.state import DecodeState, KVQCache, Statistics
from layerskip_jax.model import Transformer, compute_dtype, empty_cache
from layerskip_jax.sharding import constrain

Look = Callable[[DecodeState], Sequence[bool]]
"""Sees the state between rounds; returns which rows to end now."""


@partial(jax.jit, static_argnames=("step", "width"))
def prefill(
    step: Round,
    model: Transformer,
    tokens_BS: jax.Array,
    length_B: jax.Array,
    limit_B: jax.Array,
    eos: jax.Array,
    key: jax.Array,
    width: int,
) -> DecodeState:
    """Run the first ``width`` tokens through all blocks to fill the cache; return the state before the first round.

    The head is not run: the last token of a prompt goes through the model in the first round. What a prompt shorter
    than ``width`` leaves in later slots is overwritten before it is seen.
    """
    B, S = tokens_BS.shape
    layers = empty_cache(model.config, B, S)
    if width:
        position = model.positions(jnp.tile(jnp.arange(width)[None], (B, 1)))
        x_BPD = model.embed(tokens_BS[:, :width])
        _, layers = model.run_cached(x_BPD, position, layers, 0, model.config.num_layers, filled=width)
    query_BQD = jnp.zeros((B, step.draft_length + 1, model.config.dim), compute_dtype(model.config))
    return DecodeState(
        tokens_BS=tokens_BS,
        drafted_BS=jnp.zeros((B, S), bool),
        length_B=length_B,
        limit_B=limit_B,
        done_B=length_B >= limit_B,
        eos=eos,
        cache=KVQCache(layers, [query_BQD for _ in step.exits]),
        memory=step.start(model.config),
        key=key,
        statistics=Statistics(
            rounds=jnp.int32(0),
            drafted_X=jnp.zeros(max(1, len(step.exits)), jnp.int32),
            accepted_histogram_Q=jnp.zeros(step.draft_length + 1, jnp.int32),
            exit_rounds_X=jnp.zeros(max(1, len(step.exits)), jnp.int32),
        ),
    )


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def run_rounds(step: Round, model: Transformer, state: DecodeState, until: jax.Array) -> DecodeState:
    """Run rounds until every row is done, or ``until`` rounds have been run in all."""

    def unfinished(state: DecodeState) -> jax.Array:
        return jnp.any(~state.done_B) & (state.statistics.rounds < until)

    state = jax.lax.while_loop(unfinished, lambda state: step(model, state), state)
    # All but the cache whole on every device of a mesh, so that every process of a run can read it.
    small = dataclasses.replace(state, cache=KVQCache([], []))
    return dataclasses.replace(jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), small), cache=state.cache)


def start(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    step: Round,
    *,
    eos: int = -1,
    seed: int = 0,
    max_length: int | None = None,
) -> DecodeState:
    """Check the request and prefill. ``max_length`` bounds prompt + new tokens of a row; the default just fits.

    ``model`` is an `unstacked` one. Raises `UserError` for what `check_request` refuses.
    """
    max_length = check_request(model, prompts, max_new_tokens, max_length, step, eos, seed)
    # The slack lets a round write d+1 tokens from any length without reaching the end of the cache.
    capacity = round_up(max_length + step.draft_length + 1)
    width = min(round_up(max(map(len, prompts)) - 1), capacity)
    tokens_BS = np.zeros((len(prompts), capacity), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BS[row, : len(prompt)] = prompt
    length_B = np.array([len(prompt) for prompt in prompts], np.int32)
    limit_B = np.minimum(length_B.astype(np.int64) + max_new_tokens, max_length).astype(np.int32)
    arrays = map(jnp.asarray, (tokens_BS, length_B, limit_B, np.int32(eos)))
    return prefill(step, model, *arrays, jax.random.key(seed), width)


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    step: Round,
    *,
    eos: int = -1,
    seed: int = 0,
    max_length: int | None = None,
    look: Look | None = None,
    look_every: int = 1,
) -> Generation:
    """Continue ``prompts`` (token ids, of any lengths) by up to ``max_new_tokens`` each, in one jitted loop.

    With ``look`` the loop comes back to the host after each ``look_every`` rounds, for streaming and stop strings.
    Raises `UserError` as `start` does, and where a row came to logits that are not finite.

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
    began = time.perf_counter()
    state = start(model, prompts, max_new_tokens, step, eos=eos, seed=seed, max_length=max_length)
    state = jax.block_until_ready(run_rounds(step, model, state, jnp.int32(0)))  # compiles; runs no round
    prefilled = time.perf_counter()
    if look is None:
        state = run_rounds(step, model, state, jnp.int32(jnp.iinfo(jnp.int32).max))
    else:
        for looks in itertools.count(1):
            state = run_rounds(step, model, state, jnp.int32(looks * look_every))
            done_B = np.asarray(jax.device_get(state.done_B)) | np.asarray(look(state))  # on the host: compiles nothing
            place = state.done_B.sharding if state.done_B.committed else None  # elsewhere, rounds are compiled anew
            state = dataclasses.replace(state, done_B=jax.device_put(done_B, place))
            if done_B.all():
                break
    state = jax.block_until_ready(state)
    seconds, exits = time.perf_counter() - prefilled, step.exits or (model.config.num_layers,)
    return Generation.of(state, prompts, exits, seconds=seconds, prefill_seconds=prefilled - began)
