"""Distillation losses against hand-computed values, and as a teacher of early exits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_model

from layerskip_jax.data.batch import Batch
from layerskip_jax.model import negative_log_likelihood
from layerskip_jax.recipe.distillation import (
    LOSSES,
    SelfDistillation,
    argmax_cross_entropy,
    kl_divergence,
    negative_log_acceptance,
)
from layerskip_jax.recipe.exit_loss import Teaching, exit_losses


def logits(*probabilities):
    return jnp.log(jnp.array(probabilities))[None, None]


def test_losses_by_hand():
    """p = (1/2, 1/4, 1/4) teaches q = (1/4, 1/4, 1/2)."""
    p, q = logits(0.5, 0.25, 0.25), logits(0.25, 0.25, 0.5)
    np.testing.assert_allclose(kl_divergence(q, p), [[0.25 * np.log(2)]], rtol=1e-6)
    np.testing.assert_allclose(argmax_cross_entropy(q, p), [[np.log(4)]], rtol=1e-6)
    np.testing.assert_allclose(negative_log_acceptance(q, p), [[-np.log(0.75)]], rtol=1e-6)


def random_logits(seed, size):
    return [size * jax.random.normal(key, (1, 1, 7)) for key in jax.random.split(jax.random.key(seed), 2)]


@given(seed=st.integers(0, 1000), size=st.sampled_from([0.1, 1.0, 30.0]))
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_ignores_a_constant(name, seed, size):
    q, p = random_logits(seed, size)
    np.testing.assert_allclose(LOSSES[name](q + 3, p - 2), LOSSES[name](q, p), atol=1e-4, rtol=1e-5)


@given(seed=st.integers(0, 1000), size=st.sampled_from([0.1, 1.0, 30.0]))
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "argmax"])
def test_a_loss_is_lowest_at_the_teacher(name, seed, size):
    """Except for the cross-entropy of the argmax, which is lowest where one token has all probability."""
    q, p = random_logits(seed, size)
    assert LOSSES[name](q, p) >= LOSSES[name](p, p) - 1e-5
    np.testing.assert_allclose(LOSSES[name](p, p), 0, atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_distillation_gives_the_teacher_no_gradient(name):
    """Only exit 2 has a weight, so that the blocks behind it can only learn as its teacher."""
    model, L = tiny_model(1), 4
    tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, 61)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], jnp.ones((2, 8), int), jnp.ones((2, 8)))
    weight_L = jnp.zeros(L).at[1].set(1)
    loss = SelfDistillation(LOSSES[name])
    teaching = Teaching(distillation=(loss, 1.0))
    gradient = jax.jit(jax.grad(lambda model: exit_losses(model, batch, weight_L, teaching=teaching).objective))
    grads = gradient(model)
    norm_L = jnp.abs(grads.blocks.down_FD[...]).max((1, 2))
    assert (norm_L > 0).tolist() == [True, True, False, False]


@pytest.mark.parametrize("name", LOSSES)
def test_the_early_exit_teaches_the_last_one_without_a_gradient(name):
    """J_L = a D(p, q) + (1 - a) CE(p, Y), with q precomputed, has the same value and the same gradients."""
    model, a, exit_layer = tiny_model(1), 0.3, 2
    tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, 61)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], jnp.ones((2, 8), int), jnp.ones((2, 8)))
    weight_L = jnp.zeros(4).at[3].set(1)
    early = model.unstacked().first_layers(exit_layer)(batch.inputs_BT)

    def by_formula(model):
        last = model(batch.inputs_BT)
        return jnp.sum(a * LOSSES[name](last, early) + (1 - a) * negative_log_likelihood(last, batch.targets_BT))

    teaching = Teaching(agreement=(SelfDistillation(LOSSES[name]), a, exit_layer))
    ours = jax.jit(jax.value_and_grad(lambda model: exit_losses(model, batch, weight_L, teaching=teaching).objective))
    jax.tree.map(
        lambda got, expected: np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4),
        ours(model),
        jax.jit(jax.value_and_grad(by_formula))(model),
    )
