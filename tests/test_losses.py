"""Exit losses against a plain computation, and what they must not do: hold [B, T, V], or supervise the wrong output."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import Program, taken_in
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_model

from layerskip_jax.data.batch import Batch
from layerskip_jax.recipe.fused_exit_loss import INNER_EXIT, LAST_EXIT, Draw, exit_losses
from layerskip_jax.recipe.layer_dropout import apply_masked, draw_kept
from layerskip_jax.recipe.skipping import apply_skipping

B, T, V, L = 3, 12, 61, 4


def make_batch(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    tokens = jax.random.randint(keys[0], (B, T + 1), 0, V)
    segments = jnp.sort(jax.random.randint(keys[1], (B, T), 1, 4), axis=1)
    mask = (jax.random.uniform(keys[2], (B, T)) < 0.8).astype(jnp.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], segments, mask)


def plain_losses(model, batch):
    """Run a model of E layers for every E, with log-softmax over whole logits: the oracle."""
    losses = []
    for exit_layer in range(1, L + 1):
        logits = model.unstacked().first_layers(exit_layer)(batch.inputs_BT, batch.segments_BT)
        log_p = jax.nn.log_softmax(logits, axis=-1)
        picked = jnp.take_along_axis(log_p, batch.targets_BT[..., None], axis=-1)[..., 0]
        losses.append(-jnp.sum(picked * batch.mask_BT))
    return jnp.stack(losses)


@given(seed=st.integers(0, 50), chunk=st.sampled_from([1, 3, 4, 12, 100]))
@settings(max_examples=12)
def test_every_exit_equals_the_model_cut_there(seed, chunk):
    model, batch = tiny_model(seed), make_batch(seed)
    losses = jax.jit(exit_losses, static_argnames="chunk")(model, batch, jnp.ones(L), chunk=chunk).loss_L
    np.testing.assert_allclose(losses, jax.jit(plain_losses)(model, batch), rtol=1e-5)


@pytest.mark.parametrize("remat", ["none", "dots", "full", "offload"])
@pytest.mark.parametrize("weight", [(0.1, 0.0, 0.3, 0.6), (0.0, 0.7, 0.3, 0.0), (0.0, 0.0, 0.0, 1.0)])
def test_gradients_equal_the_plain_ones(remat, weight):
    """With the last exit on or off. The objective is scaled, as the step divides it by the number of tokens."""
    model, batch, weight = tiny_model(1), make_batch(1), jnp.array(weight)
    ours = jax.jit(jax.grad(lambda m: exit_losses(m, batch, weight / 3, chunk=4, remat=remat).objective * 3))(model)
    plain = jax.jit(jax.grad(lambda m: jnp.sum(weight * plain_losses(m, batch))))(model)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), ours, plain)


def test_exits_that_are_off_are_zero_and_change_nothing():
    model, batch = tiny_model(2), make_batch(2)
    every = exit_losses(model, batch, jnp.ones(L), chunk=4).loss_L
    some = exit_losses(model, batch, jnp.array([0, 0.5, 0, 0.5]), chunk=4).loss_L
    np.testing.assert_allclose(some, every * jnp.array([0, 1, 0, 1]), rtol=1e-6)


@pytest.mark.parametrize("layer", range(L))
def test_index_l_supervises_the_output_of_block_l(layer):
    """A known mistake is to supervise the input of block l, which leaves the last block without a gradient."""
    model, batch = tiny_model(3), make_batch(3)
    weight = jnp.zeros(L).at[layer].set(1)
    grads = jax.grad(lambda m: exit_losses(m, batch, weight, chunk=4).objective)(model)
    norm_L = jnp.abs(grads.blocks.down_FD[...]).max((1, 2))
    assert (norm_L > 0).tolist() == [l <= layer for l in range(L)]  # noqa: E741


def all_shapes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars if hasattr(variable.aval, "shape"))
        for parameter in equation.params.values():
            for inner in parameter if isinstance(parameter, list | tuple) else [parameter]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from all_shapes(inner)


@pytest.mark.parametrize(("chunk", "holds"), [(4, False), (12, True)])
def test_no_array_of_batch_length_vocabulary_forward_or_backward(chunk, holds):
    model, batch = tiny_model(), make_batch()
    gradient = jax.grad(lambda m: exit_losses(m, batch, jnp.ones(L), chunk=chunk).objective)
    largest = max(np.prod(shape) for shape in all_shapes(jax.make_jaxpr(gradient)(model).jaxpr) if V in shape)
    assert (largest >= B * T * V) == holds


@pytest.mark.parametrize(("remat", "cost"), [("none", 6), ("dots", 6), ("full", 8)])
def test_what_an_exit_multiplies(remat, cost):
    """6 D V operations a token, forward and backward; 8 where inputs alone are kept. An exit that is off has none."""
    model, batch = tiny_model(), make_batch()

    def objective(model, weight):
        return exit_losses(model, batch, weight, chunk=4, remat=remat).objective

    program = Program(jax.jit(jax.grad(objective)).lower(model, jnp.ones(L)).compile().as_text())
    on, off = (program.work(taken_in({INNER_EXIT: share})).flops for share in (1.0, 0.0))
    assert on - off == cost * model.config.dim * V * B * T * L


@pytest.mark.parametrize("form", ["plain", "masked", "skipping"])
def test_full_remat_repeats_every_matmul_of_a_block_but_the_down_projection(form):
    """The backward pass needs what is inside a block, not its output: an exit reads the input of the next block."""
    model, batch = tiny_model(), make_batch()
    draw = None if form == "plain" else Draw(jnp.ones((L, B), bool), jnp.ones(L))
    apply = partial(apply_skipping, groups=B) if form == "skipping" else apply_masked

    def flops(remat):
        def objective(model):
            last = jnp.zeros(L).at[-1].set(1)
            return exit_losses(model, batch, last, chunk=12, draw=draw, apply=apply, remat=remat).objective

        program = Program(jax.jit(jax.grad(objective)).lower(model).compile().as_text())
        return program.work(taken_in({INNER_EXIT: 0.0, LAST_EXIT: 1.0}), unknown_turns=B).flops

    D, F, N, K = model.config.dim, model.config.ffn_dim, model.config.num_heads, model.config.num_kv_heads
    products = 2 * D * D + 2 * D * D * K // N + 2 * D * F  # query and output, key and value, gate and up
    attention = 2 * D * T  # scores, and their product with the values
    assert flops("full") - flops("none") == 2 * L * B * T * (products + attention)


def test_dropout_in_the_scan_is_eq_1():
    """Against a loop over blocks that skips, sequence by sequence, what the draw says."""
    model, batch = tiny_model(4), make_batch(4)
    draw = Draw(draw_kept(jax.random.key(0), jnp.full(L, 0.5), B), jnp.array([1.0, 1.5, 1.0, 2.0]))
    losses = exit_losses(model, batch, jnp.ones(L), chunk=4, draw=draw, apply=apply_masked).loss_L
    blocks, expected = model.unstacked().blocks, np.zeros(L)
    for row in range(B):
        one = jax.tree.map(lambda a, row=row: a[row : row + 1], batch)
        x = model.embed(one.inputs_BT)
        for layer, block in enumerate(blocks):
            if draw.kept_LB[layer, row]:
                delta = block(x, model.positions(jnp.arange(T)[None]), one.segments_BT)[0]
                x = x + draw.scale_L[layer] * delta
            log_p = jax.nn.log_softmax(model.unembed(x), axis=-1)
            picked = jnp.take_along_axis(log_p, one.targets_BT[..., None], axis=-1)[..., 0]
            expected[layer] -= float(jnp.sum(picked * one.mask_BT))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
