"""The one forward pass: against transformers' Llama, and its promises of causality, documents, depth and cache."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_config, tiny_model

from layerskip_jax.config import ModelConfig
from layerskip_jax.data.batch import Batch
from layerskip_jax.errors import UserError
from layerskip_jax.model import empty_cache, parameter_count, run_layers
from layerskip_jax.recipe.fused_exit_loss import FusedSettings, losses_and_gradients
from layerskip_jax.rope import RotaryTables, rotary_frequencies, rotate


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_tpu_form_of_rotate_equals_the_roll(dtype, monkeypatch):
    """A permutation by matmul is exact. Its gradients pass through ``dtype``, so bfloat16 rounds them once more."""
    config = tiny_config(dim=32, num_heads=2)
    H = config.head_dim
    x_BTNH = jax.random.normal(jax.random.key(0), (2, 7, 2, H)).astype(dtype)
    position = RotaryTables.at(jnp.arange(7)[None], rotary_frequencies(config))
    weight_H = jnp.arange(1.0, H + 1)

    def turned_and_gradient(platform):
        monkeypatch.setattr("layerskip_jax.rope.target_platform", lambda: platform)
        turned_BTNH, pullback = jax.vjp(lambda x_BTNH: rotate(x_BTNH, position), x_BTNH)
        return turned_BTNH, pullback(jnp.broadcast_to(weight_H.astype(dtype), x_BTNH.shape))[0]

    (ours, d_ours), (tpus, d_tpus) = turned_and_gradient("cpu"), turned_and_gradient("tpu")
    np.testing.assert_array_equal(ours, tpus)
    np.testing.assert_allclose(d_ours, d_tpus, rtol=0, atol=float(jnp.finfo(dtype).eps) * H)


def test_unstacked_blocks_are_the_same_model():
    model, tokens = tiny_model(), jnp.arange(24).reshape(2, 12)
    np.testing.assert_allclose(model.unstacked()(tokens), model(tokens), atol=1e-4)


def test_a_part_of_stacked_blocks_is_refused():
    with pytest.raises(ValueError, match="unstacked"):
        run_layers(tiny_model().blocks, jnp.zeros((1, 1, 32)), lambda block, x, _: (x, None), None, 0, 2)


@jax.jit
def _influence(model, tokens, position):
    """The gradient of the logits at one position with respect to every position's embedding."""

    def logits_at(x_BTD):
        def block_fn(block, x, _):
            return x + block(x, model.rotary_tables(jnp.arange(tokens.shape[1])[None]), jnp.ones_like(tokens))[0], None

        return model.unembed(run_layers(model.blocks, x_BTD, block_fn, None)[0])[0, position].sum()

    return jax.grad(logits_at)(model.embed(tokens))[0]


@given(position=st.integers(0, 11), seed=st.integers(0, 100))
@settings(max_examples=15)
def test_causality_by_gradient(position, seed):
    tokens = jax.random.randint(jax.random.key(seed), (1, 12), 0, 61)
    sees = np.asarray(jnp.abs(_influence(tiny_model(seed), tokens, position)).max(-1)) > 0
    assert sees.tolist() == [i <= position for i in range(12)]


@given(cut=st.integers(1, 11), seed=st.integers(0, 100))
@settings(max_examples=15)
def test_attention_does_not_cross_documents(cut, seed):
    """A packed document gives the logits that it gives alone; rotary positions are relative, so its place is free."""
    model, tokens = tiny_model(seed), jax.random.randint(jax.random.key(seed), (1, 12), 0, 61)
    packed = _forward(model, tokens, jnp.where(jnp.arange(12) < cut, 1, 2)[None])
    first = _forward(model, jnp.where(jnp.arange(12) < cut, tokens, 0), jnp.ones((1, 12), int))
    second = _forward(model, jnp.roll(tokens, -cut, axis=1), jnp.ones((1, 12), int))
    np.testing.assert_allclose(packed[:, :cut], first[:, :cut], atol=1e-4)
    np.testing.assert_allclose(packed[:, cut:], second[:, : 12 - cut], atol=1e-4)
    crossing = _forward(model, tokens, jnp.ones((1, 12), int))
    assert float(jnp.abs(crossing - packed)[:, cut:].max()) > 1e-3  # and it would make a difference


@jax.jit
def _forward(model, tokens, segments):
    return model(tokens, segments)


@given(
    pieces=st.lists(st.sampled_from([1, 4]), min_size=1, max_size=6),
    exit_layer=st.sampled_from([1, 3]),
    seed=st.integers(0, 100),
)
@settings(max_examples=20)
def test_draft_then_remainder_through_a_cache_equals_the_full_model(pieces, exit_layer, seed):
    """The tokens arrive in pieces of any size, through blocks [0, E) and then [E, L)."""
    model, length = tiny_model(seed), sum(pieces)
    tokens = jax.random.randint(jax.random.key(seed), (2, length), 0, 61)
    cache, unstacked, logits, start = empty_cache(model.config, 2, 32), model.unstacked(), [], 0
    for size in pieces:
        position = unstacked.rotary_tables(jnp.tile(start + jnp.arange(size)[None], (2, 1)))
        piece, cache = _draft_then_rest(unstacked, tokens[:, start : start + size], position, cache, exit_layer)
        logits.append(piece)
        start += size
    whole = _forward(model, jnp.pad(tokens, ((0, 0), (0, 24 - length))), jnp.ones((2, 24), int))
    np.testing.assert_allclose(jnp.concatenate(logits, 1), whole[:, :length], atol=1e-4)


@partial(jax.jit, static_argnames="exit_layer")
def _draft_then_rest(model, tokens, position, cache, exit_layer):
    x, cache = model.run_cached(model.embed(tokens), position, cache, 0, exit_layer)
    x, cache = model.run_cached(x, position, cache, exit_layer, model.config.num_layers)
    return model.unembed(x), cache


def test_rows_of_a_cache_stand_at_their_own_positions():
    model = tiny_model().unstacked()
    tokens = jnp.arange(20).reshape(2, 10)
    position = model.rotary_tables(jnp.tile(jnp.arange(10)[None], (2, 1)))
    _, cache = model.run_cached(model.embed(tokens), position, empty_cache(model.config, 2, 32), 0, 4)
    starts = jnp.array([4, 9])  # row 0 is rolled back to 4 tokens, row 1 to 9
    new = jnp.array([[7], [8]])
    x, _ = model.run_cached(model.embed(new), model.rotary_tables(starts[:, None]), cache, 0, 4)
    for row, start in enumerate(starts.tolist()):
        whole = jnp.concatenate([tokens[row, :start], new[row]])[None]
        np.testing.assert_allclose(model.unembed(x)[row, 0], model(whole)[0, -1], atol=1e-4)


def test_parameter_count():
    for changes in ({}, {"tied_embedding": True}, {"num_layers": 7, "num_kv_heads": 4}):
        model = tiny_model(**changes)
        assert parameter_count(model.config) == sum(leaf.size for leaf in jax.tree.leaves(model))


def test_parameter_count_of_the_papers_7b():
    config = ModelConfig(32, 4096, 32, 32, 11008, 32_000)
    assert parameter_count(config) == 6_738_415_616  # Llama 2 7B


def test_the_same_seed_gives_the_same_model():
    same = jax.tree.map(lambda a, b: bool((a == b).all()), tiny_model(3), tiny_model(3))
    assert all(jax.tree.leaves(same))


def test_bfloat16_compute_keeps_float32_parameters_and_logits():
    model = tiny_model(compute_dtype="bfloat16")
    logits = model(jnp.arange(8)[None])
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype("float32")}
    assert logits.dtype == jnp.float32
    assert model.embed(jnp.zeros((1, 1), int)).dtype == jnp.bfloat16
    batch = Batch(jnp.arange(8)[None], jnp.arange(8)[None], jnp.ones((1, 8), int), jnp.ones((1, 8)))
    losses, gradients = losses_and_gradients(model, batch, jnp.ones(4), FusedSettings(chunk=4))
    assert {leaf.dtype for leaf in jax.tree.leaves((losses, gradients))} == {jnp.dtype("float32")}


def test_invalid_shapes_are_named():
    with pytest.raises(UserError, match=r"model\.dim 30 must be a multiple"):
        tiny_config(dim=30)
    with pytest.raises(UserError, match=r"num_kv_heads 3 must divide"):
        tiny_config(num_kv_heads=3)
