"""int8 weights: a quarter of the memory, nearly the same logits, and speculation is still lossless."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny_model

from layerskip_jax.decoding.adaptive import AdaptiveSpeculative
from layerskip_jax.decoding.adaptive_policy import Adaptive
from layerskip_jax.decoding.engine import begin, generate, rounds_program
from layerskip_jax.decoding.policies import Fixed
from layerskip_jax.decoding.quantization import OUTPUT_AXES, quantized, with_weights
from layerskip_jax.decoding.rounds import Autoregressive, SelfSpeculative
from layerskip_jax.decoding.sampling import Greedy
from layerskip_jax.errors import UserError


def tree_bytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_nearly_the_same(tied):
    model, tokens = tiny_model(tied_embedding=tied).unstacked(), jnp.arange(24).reshape(2, 12)
    full, rounded = model(tokens), quantized(model)(tokens)
    difference = float(jnp.linalg.norm(rounded - full) / jnp.linalg.norm(full))
    print(f"relative difference of the logits: {difference:.4f}")
    assert 1e-4 < difference < 0.03


def test_every_weight_changes_by_at_most_half_a_quantization_step():
    model = tiny_model().unstacked()
    rounded = quantized(model)
    for name, output_axes in OUTPUT_AXES.items():
        old, new = (getattr(m if name == "head_DV" else m.blocks[1], name) for m in (model, rounded))
        reduced = tuple(axis for axis in range(old[...].ndim) if axis not in output_axes)
        step = np.abs(old[...]).max(reduced, keepdims=True) / 127.5
        assert (np.abs(np.asarray(new[...]) - old[...]) <= 0.5001 * step).all(), name


def test_the_loop_reads_a_quarter_of_the_bytes():
    model = tiny_model(dim=128, ffn_dim=512, num_heads=4, num_kv_heads=4, vocab_size=512).unstacked()
    rounded, strategy = quantized(model), Autoregressive(Greedy())
    embedding = model.embedding_VD[...].nbytes  # not quantized: a token reads only one row of it
    assert tree_bytes(rounded) - embedding < 0.27 * (tree_bytes(model) - embedding)
    state = begin(rounded, [[1, 2]], 8, strategy)
    memory = rounds_program(model.config).lower(strategy, rounded, state, jnp.int32(1)).compile().memory_analysis()
    assert memory.argument_size_in_bytes < 0.5 * tree_bytes(model)


@pytest.mark.parametrize(
    "strategy",
    [SelfSpeculative(Greedy(), Fixed(2, 3)), AdaptiveSpeculative(Greedy(), Adaptive((1, 2, 3), 4))],
    ids=["fixed", "adaptive"],
)
def test_speculation_is_lossless_on_int8_weights(strategy):
    for seed in range(3):
        model, prompts = quantized(tiny_model(seed).unstacked()), [[1, 2, 3], [4]]
        plain = generate(model, prompts, 30, Autoregressive(Greedy()))
        assert generate(model, prompts, 30, strategy).tokens == plain.tokens


def test_quantization_does_not_change_the_original_model():
    model = tiny_model().unstacked()
    assert with_weights(model, "full") is model
    before = np.asarray(model.blocks[0].gate_up_DM[...])
    quantized(model)
    np.testing.assert_array_equal(model.blocks[0].gate_up_DM[...], before)


def test_a_missing_qwix_names_the_package_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(UserError, match=r"pip install 'layerskip-jax\[int8\]'"):
        quantized(tiny_model().unstacked())
