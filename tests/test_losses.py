"""Exit losses: plain against a loop over models, fused against plain, and the cost of the fused form."""

from functools import partial

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import Program, shares_by_scope
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_model

from layerskip_jax.data.batch import Batch
from layerskip_jax.recipe.chunked_loss import INNER_EXIT, LAST_EXIT, TWO_EXITS
from layerskip_jax.recipe.distillation import (
    SelfDistillation,
    argmax_cross_entropy,
    kl_divergence,
    negative_log_acceptance,
)
from layerskip_jax.recipe.exit_loss import Teaching, exit_losses
from layerskip_jax.recipe.fused_exit_loss import FusedSettings, Shares, chunked_exit_losses, losses_and_gradients
from layerskip_jax.recipe.layer_dropout import DropoutMask, apply_masked, sample_dropout_mask
from layerskip_jax.recipe.skipping import apply_skipping

B, T, V, L = 3, 12, 61, 4


def make_batch(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    tokens = jax.random.randint(keys[0], (B, T + 1), 0, V)
    segments = jnp.sort(jax.random.randint(keys[1], (B, T), 1, 4), axis=1)
    mask = (jax.random.uniform(keys[2], (B, T)) < 0.8).astype(jnp.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], segments, mask)


def losses_of_cut_models(model, batch):
    """The oracle: for every E, run a model of E layers and take the log-softmax of all its logits."""
    losses = []
    for exit_layer in range(1, L + 1):
        logits = model.unstacked().first_layers(exit_layer)(batch.inputs_BT, batch.segments_BT)
        log_p = jax.nn.log_softmax(logits, axis=-1)
        picked = jnp.take_along_axis(log_p, batch.targets_BT[..., None], axis=-1)[..., 0]
        losses.append(-jnp.sum(picked * batch.mask_BT))
    return jnp.stack(losses)


losses_and_gradients_jit = jax.jit(losses_and_gradients, static_argnames="settings")


@given(seed=st.integers(0, 50), chunk=st.sampled_from([1, 4, 12, 100]))
@settings(max_examples=12)
def test_every_exit_equals_the_model_cut_there(seed, chunk):
    model, batch, every = tiny_model(seed), make_batch(seed), jnp.ones(L)
    expected = jax.jit(losses_of_cut_models)(model, batch)
    fused = losses_and_gradients_jit(model, batch, every, FusedSettings(chunk))[0].loss_L
    chunked = jax.jit(chunked_exit_losses, static_argnames="chunk")(model, batch, chunk=chunk)
    for loss_L in fused, chunked, jax.jit(exit_losses)(model, batch, every).loss_L:
        np.testing.assert_allclose(loss_L, expected, rtol=1e-5)


@jax.jit
def gradient_of_cut_models(model, batch, weight_L):
    return jax.grad(lambda m: jnp.sum(weight_L * losses_of_cut_models(m, batch)))(model)


@pytest.mark.parametrize("remat", ["none", "dots", "full", "offload"])
@pytest.mark.parametrize("weight", [(0.1, 0.0, 0.3, 0.6), (0.0, 0.7, 0.3, 0.0), (0.0, 0.0, 0.0, 1.0)])
def test_gradients_equal_those_of_cut_models(remat, weight):
    """With the last exit on and off."""
    model, batch, weight = tiny_model(1), make_batch(1), jnp.array(weight)
    _, ours = losses_and_gradients_jit(model, batch, weight, FusedSettings(4, remat))
    oracle = gradient_of_cut_models(model, batch, weight)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), ours, oracle)


def value_and_gradient(losses, *arguments):
    return jax.value_and_grad(lambda model: tuple(losses(model, *arguments[1:])), has_aux=True)(arguments[0])


@partial(jax.jit, static_argnames="settings")
def plain_and_fused(model, batch, weight_L, dropout_mask, settings, share):
    distillation = settings.distillation and (settings.distillation, share)
    agreement = settings.agreement and (settings.agreement, share / 2, settings.agreement_exit)
    reference, shares = partial(exit_losses, teaching=Teaching(distillation, agreement)), Shares(share, share / 2)
    plain = value_and_gradient(reference, model, batch, weight_L, dropout_mask)
    losses, gradients = losses_and_gradients(model, batch, weight_L, settings, dropout_mask, shares=shares)
    return plain, (tuple(losses), gradients)


FUSED = {
    "chunks_of_1": (FusedSettings(1), False, True),
    "full_remat": (FusedSettings(4, "full"), True, True),
    "dots_remat": (FusedSettings(6, "dots"), True, False),
    "whole": (FusedSettings(12), True, True),
    "whole_full_remat": (FusedSettings(100, "full"), False, False),
    "kl": (FusedSettings(4, distillation=SelfDistillation(kl_divergence)), True, False),
    "acceptance": (
        FusedSettings(6, "dots", distillation=SelfDistillation(negative_log_acceptance)),
        True,
        True,
    ),
    "agreement": (
        FusedSettings(
            4,
            distillation=SelfDistillation(kl_divergence),
            agreement=SelfDistillation(argmax_cross_entropy),
            agreement_exit=3,
        ),
        True,
        True,
    ),
    "agreement_alone": (
        FusedSettings(4, "full", agreement=SelfDistillation(kl_divergence), agreement_exit=1),
        False,
        False,
    ),
    "argmax": (
        FusedSettings(3, "full", distillation=SelfDistillation(argmax_cross_entropy)),
        False,
        True,
    ),
}


@pytest.mark.parametrize(("settings", "tied", "masked"), FUSED.values(), ids=FUSED)
@given(
    seed=st.integers(0, 1000),
    weights=st.lists(st.sampled_from([0, 0, 0.25, 1, 3]), min_size=L, max_size=L),
    drop_rate=st.sampled_from([0.0, 0.5, 1.0]),
)
@hypothesis.settings(max_examples=8)
def test_the_fused_form_equals_the_plain_one(settings, tied, masked, seed, weights, drop_rate):
    """In the objective, in the loss of every exit, and in every gradient, relative to the largest of its array.

    Both sum in float32, but in another order: differences of 2e-6 were seen.
    """
    keys, model, batch = jax.random.split(jax.random.key(seed)), tiny_model(seed, tied_embedding=tied), make_batch(seed)
    keep_LB = sample_dropout_mask(keys[0], jnp.full(L, drop_rate), B)
    mask = DropoutMask(keep_LB, jax.random.uniform(keys[1], (L,), minval=1, maxval=2)) if masked else None
    plain, fused = plain_and_fused(model, batch, jnp.array(weights, float), mask, settings, seed % 5 / 4)

    def assert_equal(ours, reference):
        np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-5 * np.abs(reference).max())

    jax.tree.map(assert_equal, fused, plain)


def test_integer_weights_are_allowed():
    model, batch, weight_L = tiny_model(2), make_batch(2), jnp.array([0, 1, 0, 2])
    whole, real = (
        losses_and_gradients_jit(model, batch, weight_L.astype(dtype), FusedSettings(chunk=4)) for dtype in (int, float)
    )
    jax.tree.map(np.testing.assert_array_equal, whole, real)


def test_the_fused_form_needs_less_temporary_memory():
    """The plain form saves the logits of every exit, 4 x 3 x 12 x 2000 floats; the fused one a chunk at a time."""
    model, batch = tiny_model(vocab_size=2000), make_batch()

    def temporary_bytes(function, *arguments):
        lowered = function.lower(model, batch, jnp.ones(L), *arguments)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    saved_logits = 4 * L * B * T * 2000
    plain = temporary_bytes(jax.jit(partial(value_and_gradient, exit_losses)))
    for remat in ("none", "dots", "full"):
        assert plain - temporary_bytes(losses_and_gradients_jit, FusedSettings(1, remat)) > saved_logits, remat


def test_exits_that_are_off_are_zero_and_change_nothing():
    model, batch, chunks = tiny_model(2), make_batch(2), FusedSettings(chunk=4)
    every = losses_and_gradients_jit(model, batch, jnp.ones(L), chunks)[0].loss_L
    some = losses_and_gradients_jit(model, batch, jnp.array([0, 0.5, 0, 0.5]), chunks)[0].loss_L
    np.testing.assert_allclose(some, every * jnp.array([0, 1, 0, 1]), rtol=1e-6)


@pytest.mark.parametrize("layer", range(L))
def test_index_l_supervises_the_output_of_block_l(layer):
    """A known mistake is to supervise the input of block l, which leaves the last block without a gradient."""
    model, batch = tiny_model(3), make_batch(3)
    weight = jnp.zeros(L).at[layer].set(1)
    _, grads = losses_and_gradients_jit(model, batch, weight, FusedSettings(4, "none"))
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
    traced = losses_and_gradients_jit.trace(model, batch, jnp.ones(L), FusedSettings(chunk))
    largest = max(np.prod(shape) for shape in all_shapes(traced.jaxpr.jaxpr) if V in shape)
    assert (largest >= B * T * V) == holds


def compiled(model, weight_L, settings, mask=None):
    return Program(losses_and_gradients_jit.lower(model, make_batch(), weight_L, settings, mask).compile().as_text())


@pytest.mark.parametrize(("distillation", "cost"), [(None, 6), (SelfDistillation(kl_divergence), 8)])
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_flops_of_an_exit(remat, distillation, cost):
    """6 D V a token, forward and backward, and 2 D V for a teacher. An exit that is off has none."""
    model = tiny_model()
    program = compiled(model, jnp.ones(L), FusedSettings(4, remat, distillation=distillation))
    on, off = (program.work(shares_by_scope({INNER_EXIT: share})).flops for share in (1.0, 0.0))
    assert on - off == cost * model.config.dim * V * B * T * L


@pytest.mark.parametrize("distillation", [None, SelfDistillation(kl_divergence)])
def test_flops_of_two_exits_that_teach_each_other(distillation):
    """12 D V a token: their teachers need no more logits."""
    model, agreement = tiny_model(), SelfDistillation(argmax_cross_entropy)
    settings = FusedSettings(4, distillation=distillation, agreement=agreement, agreement_exit=2)
    program = compiled(model, jnp.array([0, 0.5, 0, 1]), settings)
    alone = {INNER_EXIT: 0.0, LAST_EXIT: 0.0}
    on, off = (program.work(shares_by_scope(alone | {TWO_EXITS: share})).flops for share in (1.0, 0.0))
    assert on - off == 12 * model.config.dim * V * B * T


def unusual_distillation(g, x_BCD, targets_BC, mask_BC, teacher):
    """Use the head on another hidden state, and the teacher without `jax.lax.stop_gradient`."""
    loss = SelfDistillation(kl_divergence)(g, x_BCD, targets_BC, mask_BC, teacher)
    return loss + jnp.mean(g(-x_BCD) ** 2) + jnp.mean(g(teacher[0]) * teacher[0][..., :1])


@pytest.mark.parametrize("weights", [(0, 0.5, 0, 1), (0.5, 0, 0, 1), (0.5, 1, 0.25, 0)])
def test_unusual_losses_of_two_exits_equal_the_plain_form(weights):
    """Together, and with each of the two exits off."""
    model, batch = tiny_model(5), make_batch(5)
    settings = FusedSettings(100, distillation=unusual_distillation, agreement=unusual_distillation, agreement_exit=2)
    plain, fused = plain_and_fused(model, batch, jnp.array(weights), None, settings, jnp.float32(0.5))
    jax.tree.map(
        lambda ours, reference: np.testing.assert_allclose(
            ours, reference, rtol=0, atol=1e-5 * np.abs(reference).max()
        ),
        fused,
        plain,
    )


@pytest.mark.parametrize("form", ["plain", "masked", "skipping"])
def test_full_remat_repeats_every_matmul_of_a_block_but_the_down_projection(form):
    """An exit reads the input of the next block, so the backward pass never needs the output of a block."""
    model = tiny_model()
    mask = None if form == "plain" else DropoutMask(jnp.ones((L, B), bool), jnp.ones(L))
    apply = partial(apply_skipping, groups=B) if form == "skipping" else apply_masked

    def flops(remat):
        program = compiled(model, jnp.zeros(L).at[-1].set(1), FusedSettings(12, remat, apply_dropout=apply), mask)
        return program.work(shares_by_scope({INNER_EXIT: 0.0, LAST_EXIT: 1.0}), unknown_trip_count=B).flops

    D, F, N, K = model.config.dim, model.config.ffn_dim, model.config.num_heads, model.config.num_kv_heads
    matmuls = 2 * D * D + 2 * D * D * K // N + 2 * D * F  # query and output, key and value, gate and up
    attention = 2 * D * T  # scores, and their product with the values
    assert flops("full") - flops("none") == 2 * L * B * T * (matmuls + attention)


def test_dropout_in_the_scan_is_eq_1():
    """Against a loop over sequences and blocks that skips the blocks that the mask drops."""
    model, batch = tiny_model(4), make_batch(4)
    keep_LB = sample_dropout_mask(jax.random.key(0), jnp.full(L, 0.5), B)
    mask = DropoutMask(keep_LB, jnp.array([1.0, 1.5, 1.0, 2.0]))
    losses = losses_and_gradients_jit(model, batch, jnp.ones(L), FusedSettings(chunk=4), mask)[0].loss_L
    blocks, expected = model.unstacked().blocks, np.zeros(L)
    for row in range(B):
        one = jax.tree.map(lambda a, row=row: a[row : row + 1], batch)
        x = model.embed(one.inputs_BT)
        for layer, block in enumerate(blocks):
            if mask.keep_LB[layer, row]:
                delta = block(x, model.rotary_tables(jnp.arange(T)[None]), one.segments_BT)[0]
                x = x + mask.scale_L[layer] * delta
            log_p = jax.nn.log_softmax(model.unembed(x), axis=-1)
            picked = jnp.take_along_axis(log_p, one.targets_BT[..., None], axis=-1)[..., 0]
            expected[layer] -= float(jnp.sum(picked * one.mask_BT))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
