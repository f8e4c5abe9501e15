"""Known wrong results and crashes of XLA:CPU, in the form in which our programs could hit them, against numpy float64.

The example of each public report was run on jax 0.10.0, 0.10.1, 0.10.2, 0.11.0, 0.11.1, 0.11.2, 0.12.0 and 0.12.0.1
(x86-64). It fails on:

    jax-ml/jax#39103    wrong values               0.10.2
    jax-ml/jax#39257    crash                      0.10.2, 0.11.0
    jax-ml/jax#40412    crash                      0.10.2
    ptagwb, no issue    wrong values, NaN          0.10.2 to 0.12.0.1
    jax-ml/jax#40101    slow, correct values       0.11.1
    openxla/xla#49176   wrong values               all of them
    jax-ml/jax#40849    wrong element              0.10.0 to 0.11.2 (also openxla/xla#49121)

None of them affects our programs, so no version is excluded. Each has a test here except jax-ml/jax#40101, which only
shows in timings: it copies a whole carried array when fewer than 480 bytes of it are written. On 0.10.2, 0.11.1 and
0.12.0.1, 512 times the cache capacity doubles the time of a plain decoding round; a copy of the cache would multiply it
by a hundred.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import tiny_config, tiny_model

from layerskip_jax.cache import LayerCache, write_cache
from layerskip_jax.config import ModelConfig
from layerskip_jax.data.batch import Batch
from layerskip_jax.decoding.engine import generate, prefill, rounds_program
from layerskip_jax.decoding.policies import Fixed
from layerskip_jax.decoding.prompt_lookup import look_up
from layerskip_jax.decoding.request import Request
from layerskip_jax.decoding.rounds import Autoregressive, SelfSpeculative
from layerskip_jax.decoding.sampling import Greedy
from layerskip_jax.decoding.state import DecodeState, KVQCache, Statistics, emit
from layerskip_jax.document_attention import attend_documents
from layerskip_jax.model import Transformer, unembed
from layerskip_jax.recipe.early_exit import cross_entropy
from layerskip_jax.recipe.fused_exit_loss import FusedSettings, losses_and_gradients
from layerskip_jax.recipe.layer_dropout import DropoutMask
from layerskip_jax.recipe.skipping import apply_skipping


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def double(*arrays):
    return [np.asarray(array, np.float64) for array in arrays]


def assert_close(ours, exact):
    """Within 1e-4 of the largest value: these bugs cause errors as large as the values, or larger."""
    for a, b in zip(ours, exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max())


def softmax(x):
    weight = np.exp(x - x.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True)


@pytest.mark.parametrize(
    ("rows", "D", "V", "tied"), [(32_769, 3, 3, True), (40_000, 3, 3, False), (40_000, 6, 5, True)]
)
def test_a_loss_over_many_rows(rows, D, V, tied):
    """jax-ml/jax#39103: a float32 matmul followed by a reduction over few columns is wrong past row 32,768 (0.10.2).

    Our case: a matmul with a residual, the mean of squares in `rms_norm`, the matmul with the head, and the sums of the
    loss over the vocabulary; forward and backward. The loss or gradient of the last rows of a chunk would be wrong.
    """
    config = tiny_config(tied_embedding=tied)
    x, out = normal(0, 1, rows, D), normal(1, D, D)
    norm, head = normal(2, D), normal(3, V, D) if tied else normal(3, D, V)
    targets, mask = np.arange(rows)[None] % V, (np.arange(rows)[None] % 7 > 0).astype(np.float32)

    def loss(x, out, norm, head):
        return cross_entropy(partial(unembed, config, (nnx.Param(norm), nnx.Param(head))), x + x @ out, targets, mask)

    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(x, out, norm, head)

    x, out, norm, head = double(x[0], out, norm, head.T if tied else head)
    y = x + x @ out
    inverse = 1 / np.sqrt((y * y).mean(-1, keepdims=True) + config.norm_epsilon)
    p = softmax(y * inverse * norm @ head)
    is_target = np.arange(V) == targets[0][:, None]
    d_logits = (p - is_target) * mask[0][:, None]
    d_h = d_logits @ head.T
    d_y = d_h * norm * inverse - y * inverse**3 * (d_h * norm * y).mean(-1, keepdims=True)
    d_head = (y * inverse * norm).T @ d_logits
    exact = -(np.log(p[is_target]) * mask[0]).sum(), d_y + d_y @ out.T, x.T @ d_y, (d_h * y * inverse).sum(0)
    assert_close((value, gradients[0][0], *gradients[1:]), (*exact, d_head.T if tied else d_head))


@pytest.mark.parametrize(("B", "T", "N", "K", "H"), [(5, 60, 2, 2, 60), (2, 64, 6, 2, 16), (4, 33, 3, 1, 8)])
@pytest.mark.parametrize("constant", [False, True], ids=["cotangent", "constant cotangent"])
def test_attention_and_its_gradients(B, T, N, K, H, constant):
    """ptagwb, no issue: ``reduce(batched_dot(x, broadcast(scalar)) * y)`` is wrong, up to NaN (from 0.10.2 on).

    Our case: the backward pass of attention, ``sum_S (d_out v^T) * weights``, reduces a batched matmul like this. Its
    operand is a broadcast scalar if the objective is a plain sum. Gradients would be wrong.
    """
    q, k, v = normal(0, B, T, N, H), normal(1, B, T, K, H), normal(2, B, T, K, H)
    segments = np.sort(np.random.default_rng(3).integers(0, 3, (B, T)), axis=1)
    d_out = np.full((B, T, N, H), 0.37, np.float32) if constant else normal(4, B, T, N, H)

    def objective(q, k, v):
        out = attend_documents(q, k, v, segments, "xla")
        return 0.37 * jnp.sum(out) if constant else jnp.sum(out * d_out), out

    (_, out), gradients = jax.jit(jax.value_and_grad(objective, (0, 1, 2), has_aux=True))(q, k, v)

    q, k, v, d_out = (array.swapaxes(1, 2) for array in double(q, k, v, d_out))
    k, v = (np.repeat(array, N // K, axis=1) for array in (k, v))
    visible = np.tril(np.ones((T, T), bool)) & (segments[:, :, None] == segments[:, None])
    weights = softmax(np.where(visible[:, None], q @ k.swapaxes(2, 3) / np.sqrt(H), -np.inf))
    d_weights = d_out @ v.swapaxes(2, 3)
    d_scores = weights * (d_weights - (d_weights * weights).sum(-1, keepdims=True)) / np.sqrt(H)
    d_k, d_v = d_scores.swapaxes(2, 3) @ q, weights.swapaxes(2, 3) @ d_out
    d_k, d_v = (array.reshape(B, K, N // K, T, H).sum(2) for array in (d_k, d_v))
    assert_close((out, *gradients), (array.swapaxes(1, 2) for array in (weights @ v, d_scores @ k, d_k, d_v)))


def largest_rank(text):
    return max(shape.count(",") + 1 for shape in re.findall(r"\w\[([\d,]+)\]", text))


def test_no_array_has_seven_axes():
    """jax-ml/jax#39257, jax-ml/jax#40412: reducing arrays of 7 or 8 axes crashes the process (0.10.2, 0.11.0).

    Ours have at most 6, in a training step with exits and skipping dropout, and in rounds of self-speculation.
    """
    model, ones = jax.eval_shape(partial(tiny_model, num_layers=2)), jnp.ones((4, 8), jnp.int32)
    batch, mask = Batch(ones, ones, ones, ones), DropoutMask(jnp.ones((2, 4), bool), jnp.ones(2))

    settings = FusedSettings(chunk=4, apply_dropout=partial(apply_skipping, groups=2))
    step = jax.jit(losses_and_gradients, static_argnames="settings").lower(model, batch, jnp.ones(2), settings, mask)
    assert 4 <= largest_rank(step.compile().as_text()) <= 6

    model, strategy = jax.eval_shape(lambda model: model.unstacked(), model), SelfSpeculative(Greedy(), Fixed(1, 2))
    text_and_limits = jnp.ones((2, 16), jnp.int32), jnp.array([3, 1]), jnp.array([9, 9]), jnp.int32(-1)
    state = jax.eval_shape(
        lambda model: prefill(strategy, model, Request(*text_and_limits, jax.random.key(0)), 8), model
    )
    assert (
        4
        <= largest_rank(rounds_program(model.config).lower(strategy, model, state, jnp.int32(1)).compile().as_text())
        <= 6
    )


def write_often(cache, new_BTKH, start_B, times):
    """Write one position further in each iteration of a loop that carries the cache, as rounds do."""

    def write(carry):
        i, cache = carry
        new = new_BTKH + i.astype(jnp.float32)
        return i + 1, write_cache(cache, new, -new, start_B + i)

    return jax.lax.while_loop(lambda carry: carry[0] < times, write, (jnp.int32(0), cache))[1]


@pytest.mark.parametrize(("starts", "T"), [([125], 1), ([0, 125, 297, 253, 128], 1), ([0, 125, 295, 252, 126], 3)])
def test_cache_writes_in_a_loop(starts, T):
    """jax-ml/jax#40849, openxla/xla#49121: nested slices read the wrong place if one starts out of range (before 0.12).

    Our case: a write across two pieces of the cache, or at its very end, moves its window into each piece. Keys would
    be written to the wrong slots.
    """
    B, K, S, H, times = len(starts), 2, 300, 4, 3
    new = normal(0, B, T, K, H)
    cache = jax.jit(write_often)(LayerCache.empty(B, K, S, H, jnp.float32), new, jnp.array(starts), times)
    exact = np.zeros((B, S, K, H))
    for i in range(times):
        for row, first in enumerate(starts):
            exact[row, first + i : first + i + T] = new[row] + i
    exact = exact.swapaxes(1, 2)
    assert len(cache.k_BKSH) == 3
    assert_close((np.concatenate(pieces, axis=2) for pieces in cache), (exact, -exact))


def continuation(words, longest, count):
    """Return ``count`` words that followed the longest earlier match of the last words; the latest such match.

    A match has at most ``longest`` words. The continuation repeats if it is shorter than ``count``.
    """
    for size in range(longest, 0, -1):
        for end in range(len(words) - 1, size - 1, -1):
            if words[end - size : end] == words[-size:]:
                return (words[end:] * count)[:count]
    raise ValueError("no match")


@pytest.mark.parametrize("rows", [1, 3])
def test_text_copied_from_itself(rows):
    """openxla/xla#49176: updating an array with a shifted slice of itself reads what was just written (all versions).

    Our case: prompt lookup drafts tokens from earlier in the text, and `emit` writes them into the same array. Nothing
    separates the two here, so XLA can fuse them. Wrong tokens would be written.
    """
    S, d, longest, times = 64, 3, 2, 6
    text = np.random.default_rng(0).integers(1, 4, (rows, S)).astype(np.int32)
    length = np.array([20, 9, 33], np.int32)[:rows]
    text *= np.arange(S) < length[:, None]
    none_B, none_Q = jnp.zeros(rows, jnp.int32), jnp.zeros(d + 1, jnp.int32)
    state = DecodeState(
        tokens_BS=jnp.asarray(text),
        drafted_BS=jnp.zeros((rows, S), bool),
        length_B=jnp.asarray(length),
        limit_B=none_B + S,
        done_B=none_B > 0,
        eos=jnp.int32(-1),
        cache=KVQCache([], []),
        policy_state=(),
        key=jax.random.key(0),
        statistics=Statistics(jnp.int32(0), none_B, none_B, none_Q, none_B),
    )

    def draft_and_emit(_, state):
        draft_Bd, match_B = look_up(state.tokens_BS, state.length_B, longest, d)
        return emit(state, draft_Bd, jnp.where(match_B > 0, d, 0), draft_Bd[:, 0])

    @jax.jit
    def run(state):
        state = jax.lax.fori_loop(0, times, draft_and_emit, state)
        return state.tokens_BS.reshape(1, rows, S), state.length_B

    tokens, known_B = run(state)
    for row, words in enumerate(text.tolist()):
        words = words[: length[row]]
        for _ in range(times):
            drafts = continuation(words, longest, d)
            words += [*drafts, drafts[0]]
        assert known_B[row] == len(words)
        assert tokens[0, row, : len(words)].tolist() == words


def test_speculative_bfloat16_texts_rarely_differ():
    """At most 1 text of 20 differs from plain decoding's. Without `ROUNDS_OPTIONS`, 5 of these 20 do.

    A matmul of one row adds in another order than one of several, so equality in every case is not possible.
    """
    config = ModelConfig(4, 64, 2, 1, 176, 256, compute_dtype="bfloat16")
    model = Transformer(config, rngs=nnx.Rngs(0)).unstacked()
    prompts = np.random.default_rng(0).integers(3, config.vocab_size, (20, 8)).tolist()
    texts = [
        [generate(model, [prompt], 40, strategy).tokens for prompt in prompts]
        for strategy in (Autoregressive(Greedy()), SelfSpeculative(Greedy(), Fixed(2, 3)))
    ]
    assert sum(plain != speculative for plain, speculative in zip(*texts, strict=True)) <= 1
