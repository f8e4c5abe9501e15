"""LayerSkip eq. 5-6: weights by hand, and the properties of each curriculum."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerskip_jax.config import Config, EarlyExitConfig, LayerDropoutConfig, ModelConfig, TrainConfig
from layerskip_jax.errors import UserError
from layerskip_jax.recipe.distillation import ConstantShare, SelfDistillation, kl_divergence
from layerskip_jax.recipe.early_exit import (
    PaperScale,
    Rotational,
    all_exits,
    exit_weights,
    gradual,
    last_only,
)
from layerskip_jax.recipe.recipe import LossSpike, Recipe


def test_scale_by_hand():
    # e(l) = s l(l+1)/2, e(L-1) = (L-1) + s (L-2)(L-1)/2, for L = 5
    np.testing.assert_allclose(PaperScale(1.0)(5), [0, 1, 3, 6, 4 + 6])
    np.testing.assert_allclose(PaperScale(0.2)(5), [0, 0.2, 0.6, 1.2, 4 + 0.2 * 6], rtol=1e-6)
    np.testing.assert_allclose(PaperScale(1.0)(1), [1])
    np.testing.assert_allclose(PaperScale(1.0)(2), [0, 1])


@given(num_layers=st.integers(2, 64), e_scale=st.floats(0, 2))
def test_scale_properties(num_layers, e_scale):
    e = np.asarray(PaperScale(e_scale)(num_layers))
    assert e[0] == 0
    assert (np.diff(e[:-1]) >= 0).all()
    assert e[-1] >= e[:-1].max()
    assert e[-1] > 0


def test_weights_by_hand():
    # eq. 6 normalizes over the exits that are on
    np.testing.assert_allclose(exit_weights(np.array([1.0, 0, 1, 1]), PaperScale(1.0)(4)), [0, 0, 1 / 3, 2 / 3])
    np.testing.assert_allclose(exit_weights(np.zeros(4), PaperScale(1.0)(4)), 0)


@given(
    num_layers=st.integers(2, 48),
    dilation=st.integers(1, 48),
    step=st.integers(0, 10_000),
    e_scale=st.floats(0.01, 2),
)
def test_weights_sum_to_one_over_the_exits_that_are_on(num_layers, dilation, step, e_scale):
    on = np.asarray(Rotational(dilation)(step, 10_001, num_layers))
    weight = np.asarray(exit_weights(on, PaperScale(e_scale)(num_layers)))
    assert weight.sum() == pytest.approx(1, abs=1e-5)
    assert (weight[on == 0] == 0).all()
    assert (weight[(on == 1) & (np.arange(num_layers) > 0)] > 0).all()


def test_zero_e_scale_is_the_ordinary_loss():
    np.testing.assert_allclose(exit_weights(np.ones(6), PaperScale(0.0)(6)), [0, 0, 0, 0, 0, 1])


@given(num_layers=st.integers(1, 40), dilation=st.integers(1, 40), start=st.integers(0, 10**6))
def test_rotation_has_each_exit_on_once_in_R_steps(num_layers, dilation, start):
    rotation = Rotational(dilation, always_last=False)
    on = np.stack([np.asarray(rotation(start + t, 10**7, num_layers)) for t in range(dilation)])
    assert (on.sum(0) == 1).all()
    per_step = on.sum(1)
    assert per_step.max() - per_step.min() <= 1


def test_rotation_by_hand():
    on = [np.flatnonzero(Rotational(3)(t, 100, 8)).tolist() for t in range(4)]
    assert on == [[0, 3, 6, 7], [1, 4, 7], [2, 5, 7], [0, 3, 6, 7]]


def test_rotation_of_the_paper_has_one_inner_exit_a_step():
    # 1.5B from scratch: L = 24, R = 23
    counts = [int(Rotational(23)(t, 50_000, 24)[:-1].sum()) for t in range(46)]
    assert max(counts) == 1
    assert sum(counts) == 46


def test_gradual_by_hand():
    # L = 4, T = 80: one more exit every T/(2L) = 10 steps, from the last down
    first_step = [next(t for t in range(80) if gradual(t, 80, 4)[layer]) for layer in range(4)]
    assert first_step == [30, 20, 10, 0]


@given(num_layers=st.integers(1, 40), total=st.integers(1, 100_000))
def test_gradual_has_all_exits_on_by_half_time(num_layers, total):
    assert np.asarray(gradual((total + 1) // 2, total, num_layers)).all()
    assert gradual(0, total, num_layers)[-1] == 1


def test_all_and_none():
    np.testing.assert_array_equal(all_exits(3, 10, 5), 1)
    np.testing.assert_array_equal(last_only(3, 10, 5), [0, 0, 0, 0, 1])


def make_recipe(**replaced):
    config = Config(model=ModelConfig(num_layers=4), layer_dropout=LayerDropoutConfig(p_max=0.5))
    return dataclasses.replace(Recipe.from_config(config), **replaced)


def test_custom_exit_weights():
    recipe = make_recipe(curriculum=all_exits, exit_scale=jnp.ones)
    assert recipe.exit_weights(0).tolist() == [0.25] * 4
    recipe.check()


@pytest.mark.parametrize(
    ("replaced", "says"),
    [
        (
            {"curriculum": lambda step, total, L: jnp.ones(L - 1)},
            r"recipe's curriculum must return 4 numbers, .* \(3,\)",
        ),
        ({"layer_scale": lambda L: jnp.ones(L + 1)}, "recipe's layer_scale must return 4 numbers"),
        ({"exit_scale": lambda L: 1.0}, "recipe's exit_scale must return 4 numbers"),
        ({"time_scale": lambda step, total: jnp.ones(2)}, "recipe's time_scale must return one number"),
        ({"layer_scale": lambda L: 7.0 * jnp.arange(L)}, r"drop rates must be in \[0, 1\), not .* at step"),
        ({"exit_scale": lambda L: 1 - jnp.arange(L)}, "exit weights must be finite and at least 0"),
        ({"curriculum": lambda t, T, L: (t != 3) * jnp.ones(L)}, "curriculum leaves no exit with a loss at step 3"),
        (
            {"curriculum": lambda t, total, L: jnp.where(t == 5, -1.0, 1.0) * (jnp.arange(L) % 2)},
            r"exit weights must be finite and at least 0, .* step 5",
        ),
        ({"agreement": SelfDistillation(kl_divergence)}, r"agreement_exit must be in 1..3, not 0"),
        ({"agreement": SelfDistillation(kl_divergence), "agreement_exit": 4}, r"agreement_exit must be in 1..3, not 4"),
        (
            {"agreement": SelfDistillation(kl_divergence), "agreement_exit": 2},
            "agreement_share must be positive at some step",
        ),
        ({"distillation_share": ConstantShare(2.0)}, r"distillation_share must be in \[0, 1\], not \[2.0, 2.0, 2.0\]"),
        ({"agreement_share": ConstantShare(-0.1)}, r"agreement_share must be in \[0, 1\]"),
    ],
)
def test_an_invalid_recipe_is_an_error(replaced, says):
    with pytest.raises(UserError, match=says):
        make_recipe(**replaced).check()


def test_a_setting_turns_on_spike_skipping():
    assert Recipe.from_config(Config(train=TrainConfig(skip_spikes=3.0))).is_spike == LossSpike(3.0)


def recipe_with(**settings):
    return Recipe.from_config(Config(ModelConfig(num_layers=6), early_exit=EarlyExitConfig(**settings)))


@pytest.mark.parametrize(
    ("weights", "expected"),
    [((), (0.5, 0.5)), ((0.2,), (0.2, 0.2)), ((0.25, 1.0), (0.25, 1.0)), ((0.0, 1.0), (0.0, 1.0))],
)
def test_fixed_exits_have_a_weight_relative_to_the_last(weights, expected):
    recipe = recipe_with(curriculum="fixed", exits=(2, 4), exit_weights=weights)
    weight_L = np.array([0, expected[0], 0, expected[1], 0, 1])
    for step in (0, 7):
        np.testing.assert_allclose(recipe.exit_weights(step), weight_L / weight_L.sum(), rtol=1e-6)
    recipe.check()


def test_chosen_exits_take_turns():
    recipe = recipe_with(curriculum="rotational", dilation=2, exits=(1, 3, 4), exit_weights=(0.5,))
    on = [np.flatnonzero(recipe.exit_weights(step)).tolist() for step in range(3)]
    assert on == [[0, 3, 5], [2, 5], [0, 3, 5]]
    np.testing.assert_allclose(recipe.exit_weights(1)[2], 0.5 / 1.5, rtol=1e-6)
    # Without weights of their own, they have those of eq. 6, and exit 1 has none.
    by_depth = recipe_with(curriculum="rotational", dilation=2, exits=(1, 3, 4)).exit_weights(0)
    np.testing.assert_allclose(by_depth, np.array([0, 0, 0, 6, 0, 15]) / 21, rtol=1e-6)


@pytest.mark.parametrize("curriculum", ["rotational", "gradual", "all"])
def test_distillation_needs_a_curriculum_with_inner_exits(curriculum):
    assert recipe_with(curriculum=curriculum, distillation="kl").distillation == SelfDistillation(kl_divergence)
    assert recipe_with(curriculum="none", distillation="kl").distillation is None


def test_weights_of_the_papers_scratch_settings_by_hand():
    scratch = EarlyExitConfig(curriculum="rotational", dilation=23, e_scale=0.2)
    recipe = Recipe.from_config(Config(ModelConfig(num_layers=24), early_exit=scratch, train=TrainConfig(steps=50_000)))
    # step 30: 30 mod 23 = 7; e(7) = .2 * 28 = 5.6, e(23) = 23 + .2 * 253 = 73.6
    weight = np.asarray(recipe.exit_weights(30))
    np.testing.assert_allclose(weight[[7, 23]], [5.6 / 79.2, 73.6 / 79.2], rtol=1e-5)
    assert np.flatnonzero(weight).tolist() == [7, 23]


def test_the_exit_that_drafts_teaches_the_last_one():
    """Of the trained exits, decoding drafts from the nearest to L/4: 2 of 8."""
    early = EarlyExitConfig("fixed", exits=(1, 2, 5), agreement_weight=0.2)
    config = Config(model=ModelConfig(num_layers=8), early_exit=early)
    recipe = Recipe.from_config(config)
    assert recipe.agreement_exit == config.decode_settings.exit_layer == 2
    assert recipe.agreement_share(0, 10) == pytest.approx(0.2)
    assert Recipe.from_config(dataclasses.replace(config, early_exit=EarlyExitConfig("all"))).agreement is None
    recipe.check()


@pytest.mark.parametrize("settings", [{"exits": (1,)}, {"exits": (2, 3), "e_scale": 0.0}])
def test_exits_without_a_loss_are_refused_in_a_new_run_only(settings):
    early = EarlyExitConfig("rotational", **settings)  # as a stored config may be
    assert early.trained_exits == ()
    with pytest.raises(UserError, match=r"early_exit\.exits .* have no loss, .*: set early_exit\.exit_weights"):
        early.check_trained()


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        ({"exits": (1, 2, 5)}, (1, 2, 5)),
        ({"exits": (1, 2, 5), "exit_weights": (1.0, 0.0, 0.5)}, (1, 5)),
        ({"exits": (1, 3), "exit_weights": (0.2,), "curriculum": "rotational"}, (1, 3)),
        ({"exits": (1, 3), "curriculum": "rotational"}, (3,)),  # e(0) = 0
    ],
)
def test_only_exits_with_a_loss_draft(settings, trained):
    early = EarlyExitConfig(**({"curriculum": "fixed"} | settings))
    config = Config(model=ModelConfig(num_layers=6), early_exit=early)
    early.check_trained()
    assert config.decode_settings.exits == trained
    assert config.trained_draft_exit in trained
    weight_L = sum(np.asarray(Recipe.from_config(config).exit_weights(step)) for step in range(8))
    assert [int(e) + 1 for e in np.flatnonzero(weight_L[:-1])] == list(trained)
