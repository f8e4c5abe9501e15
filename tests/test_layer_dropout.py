"""LayerSkip eq. 1-4: rates by hand, statistics of the samples, and the skipping form against the masked one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerskip_jax.config import Config, LayerDropoutConfig, ModelConfig, OptimizerConfig, TrainConfig
from layerskip_jax.recipe import layer_dropout
from layerskip_jax.recipe.layer_dropout import apply_masked, sample_dropout_mask
from layerskip_jax.recipe.recipe import Recipe
from layerskip_jax.recipe.skipping import apply_skipping


def recipe(num_layers, p_max, time_scale="exponential", layer_scale="exponential", steps=1000):
    return Recipe.from_config(
        Config(
            model=ModelConfig(num_layers=num_layers),
            layer_dropout=LayerDropoutConfig(p_max=p_max, time_scale=time_scale, layer_scale=layer_scale),
            optimizer=OptimizerConfig(warmup_steps=0),
            train=TrainConfig(steps=steps),
        )
    )


def test_four_layers_at_half_by_hand():
    # L = 4, p_max = 0.5, S = 1
    rates = recipe(4, 0.5, "constant").drop_rates(0)
    np.testing.assert_allclose(rates, [0, 0.130, 0.294, 0.5], atol=5e-4)
    np.testing.assert_allclose(rates, [0, (2 ** (1 / 3) - 1) / 2, (2 ** (2 / 3) - 1) / 2, 0.5], rtol=1e-6)


def test_mean_over_32_layers_by_hand():
    assert float(layer_dropout.exponential_layer_scale(32).mean()) == pytest.approx(0.4445, abs=5e-5)


@pytest.mark.parametrize("scale", layer_dropout.LAYER_SCALES.values())
@given(num_layers=st.integers(2, 80))
def test_layer_scale_rises_from_0_to_1(scale, num_layers):
    D = np.asarray(scale(num_layers))
    assert D[0] == 0
    assert D[-1] == pytest.approx(1, abs=1e-6)
    assert (np.diff(D) > 0).all()


def test_linear_layer_scale_by_hand():
    np.testing.assert_allclose(layer_dropout.linear_layer_scale(5), [0, 0.25, 0.5, 0.75, 1])


def test_one_layer_is_never_dropped():
    for scale in layer_dropout.LAYER_SCALES.values():
        assert scale(1).tolist() == [0]


def test_time_scales_by_hand():
    T = 101
    exponential = [float(layer_dropout.exponential_time_scale(t, T)) for t in (0, 50, 100)]
    np.testing.assert_allclose(exponential, [0, 2**0.5 - 1, 1], atol=1e-6)
    decaying = [float(layer_dropout.decaying_time_scale(t, T)) for t in (0, 25, 100)]
    np.testing.assert_allclose(decaying, [1, 0.75, 0], atol=1e-6)
    assert [float(layer_dropout.constant_time_scale(t, T)) for t in (0, 100)] == [1, 1]


@given(t=st.integers(0, 99), p_max=st.floats(0, 0.99), layer=st.integers(0, 11))
def test_rate_is_the_product_of_eq_2(t, p_max, layer):
    D, S = 2 ** (layer / 11) - 1, 2 ** (t / 99) - 1
    assert float(recipe(12, p_max, steps=100).drop_rates(t)[layer]) == pytest.approx(S * D * p_max, abs=1e-6)


@pytest.mark.parametrize("scale", layer_dropout.TIME_SCALES)
def test_compiled_time_scales_stay_in_their_range(scale):
    """An optimized division by T - 1 is not exact: at T = 90 the decaying scale would end below 0."""
    optimized = {"xla_backend_optimization_level": 3}  # conftest.py turns optimization off
    for total in (*range(1, 9), *range(80, 100), 1000):
        function = partial(layer_dropout.TIME_SCALES[scale], total_steps=total)
        last = jax.jit(function, compiler_options=optimized)(jnp.int32(total - 1))
        assert 0 <= last <= 1 + 1e-6


def test_linear_decaying_recipe_of_the_later_study():
    # p = p_max l/(L-1) (1 - t/(T-1))
    rates = recipe(5, 0.8, "decaying", "linear", steps=11).drop_rates(5)
    np.testing.assert_allclose(rates, 0.8 * np.arange(5) / 4 * 0.5, rtol=1e-6)


def test_samples_have_the_rates_and_are_independent_by_sequence_and_block():
    rates = jnp.array([0.0, 0.3, 0.9])
    keep = np.asarray(sample_dropout_mask(jax.random.key(0), rates, 40_000))
    np.testing.assert_allclose(1 - keep.mean(1), rates, atol=0.01)
    assert keep[0].all()
    assert abs(np.corrcoef(keep[1], keep[2])[0, 1]) < 0.02
    assert abs(np.corrcoef(keep[1][:-1], keep[1][1:])[0, 1]) < 0.02


def test_every_shard_has_the_same_sample():
    keep = np.asarray(sample_dropout_mask(jax.random.key(1), jnp.full(6, 0.5), 32, shards=4)).reshape(6, 4, 8)
    assert (keep == keep[:, :1]).all()
    assert 0 < keep.mean() < 1


def f(weights, x_BTD, segments_BT):
    """A stand-in for a block: independent rows, and an output that depends on x, segments and position."""
    return jnp.sin(3 * x_BTD * weights[None, None]) * segments_BT[..., None] + jnp.cumsum(x_BTD, axis=1)


@given(seed=st.integers(0, 1000), rate=st.floats(0, 1), groups=st.sampled_from([1, 2, 4, 8]), scale=st.floats(1, 4))
def test_skipping_equals_masked(seed, rate, groups, scale):
    """In float64, because both forms add up gradients in another order."""
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(seed), 4)
        x, segments = jax.random.normal(keys[0], (8, 5, 3)), jax.random.randint(keys[1], (8, 5), 1, 4)
        keep, weights = (
            sample_dropout_mask(keys[2], jnp.array([rate]), 8)[0],
            jax.random.uniform(keys[3], (3,), minval=0.5),
        )
        out, grads = _value_and_grad(weights, x, segments, keep, scale, 0)
        skipped, skipped_grads = _value_and_grad(weights, x, segments, keep, scale, groups)
        np.testing.assert_allclose(skipped, out, rtol=1e-12, atol=1e-12)
        for ours, theirs in zip(skipped_grads, grads, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)
        # A dropped row is unchanged bit for bit (eq. 1 with M = 0).
        assert (np.asarray(skipped)[~np.asarray(keep)] == np.asarray(x)[~np.asarray(keep)]).all()
        without_gradient = _value(weights, x, segments, keep, scale, groups)
        np.testing.assert_allclose(without_gradient, skipped, rtol=1e-12, atol=1e-12)


def _apply(weights, x, segments, keep, scale, groups):
    apply = partial(apply_skipping, groups=groups) if groups else apply_masked
    return apply(f, weights, (x, segments), keep, scale)


_value = jax.jit(_apply, static_argnames="groups")


@partial(jax.jit, static_argnames="groups")
def _value_and_grad(weights, x, segments, keep, scale, groups):
    def loss(weights, x):
        out = _apply(weights, x, segments, keep, scale, groups)
        return jnp.sum(out**2), out

    (_, out), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(weights, x)
    return out, grads


@pytest.mark.parametrize(("kept_rows", "computed"), [(0, 0), (1, 2), (2, 2), (3, 4), (8, 8)])
def test_skipping_computes_only_groups_with_a_kept_row(kept_rows, computed):
    seen = []

    def spy(weights, x_BTD, segments_BT):
        jax.debug.callback(lambda x: seen.append(len(x)), x_BTD)
        return x_BTD

    keep = jnp.arange(8) < kept_rows
    rows = jnp.ones((8, 5, 3)), jnp.ones((8, 5), jnp.int32)
    jax.block_until_ready(jax.jit(lambda: apply_skipping(spy, None, rows, keep[::-1], jnp.float32(1), groups=4))())
    jax.effects_barrier()
    assert seen == [2] * (computed // 2)


def test_rescaling_preserves_the_expected_output():
    x, weights = jax.random.normal(jax.random.key(0), (1, 2, 3)), jnp.ones(3)
    rows = jnp.tile(x, (20_000, 1, 1)), jnp.ones((20_000, 2), jnp.int32)
    keep = sample_dropout_mask(jax.random.key(1), jnp.array([0.6]), 20_000)[0]
    out = apply_masked(f, weights, rows, keep, jnp.float32(1 / (1 - 0.6)))
    np.testing.assert_allclose(out.mean(0), (x + f(weights, x, rows[1][:1]))[0], atol=0.1)
