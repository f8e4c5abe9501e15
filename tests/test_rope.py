"""Rotary frequencies and their scaling, and logits at long positions."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_config

from layerskip_jax.checkpoint.arrays import named_arrays
from layerskip_jax.model import Transformer
from layerskip_jax.rope import rotary_frequencies


@given(
    head_width=st.sampled_from([2, 6, 64, 128]),
    base=st.floats(100, 1e6),
    factor=st.floats(1, 64),
    low=st.floats(0.1, 4),
    more=st.floats(0.5, 60),
    length=st.integers(16, 16_384),
)
def test_llama3_scaling_by_wavelength(head_width, base, factor, low, more, length):
    """Against the definition of Llama 3.1, which uses wavelengths, in a plain loop."""
    config = tiny_config(
        head_width=head_width,
        rope_base=base,
        rope_scaling="llama3",
        rope_factor=factor,
        rope_low_freq_factor=low,
        rope_high_freq_factor=low + more,
        rope_original_length=length,
    )
    expected = []
    for i in range(head_width // 2):
        frequency = base ** (-2 * i / head_width)
        wavelength = 2 * math.pi / frequency
        if wavelength < length / (low + more):
            expected.append(frequency)
        elif wavelength > length / low:
            expected.append(frequency / factor)
        else:
            smooth = (length / wavelength - low) / more
            expected.append((1 - smooth) * frequency / factor + smooth * frequency)
    np.testing.assert_allclose(rotary_frequencies(config), expected, rtol=2e-5)


@given(
    head_width=st.sampled_from([2, 6, 24, 64, 96, 128]),
    base=st.sampled_from([1e4, 5e5, 1e6]) | st.floats(100, 1e6),
)
def test_frequencies_are_rounded_as_in_transformers(head_width, base):
    """``1 / base ** (i / H)``, each operation rounded to float32: one step off is 2e-4 radians at position 4,000."""
    expected = [
        np.float32(1) / np.float32(float(np.float32(base)) ** float(np.float32(i) / np.float32(head_width)))
        for i in range(0, head_width, 2)
    ]
    frequencies = np.asarray(rotary_frequencies(tiny_config(head_width=head_width, rope_base=base)))
    assert frequencies.dtype == np.float32
    np.testing.assert_array_equal(frequencies, np.array(expected))


@pytest.mark.parametrize(
    "changes", [{"rope_base": 5e5}, {"rope_base": 5e5, "rope_scaling": "llama3", "rope_original_length": 2048}]
)
def test_logits_at_long_positions(changes):
    """One block at positions up to 4,096 against numpy in float64, from the same float32 frequencies."""
    config = tiny_config(num_layers=1, head_width=64, num_heads=8, num_kv_heads=1, vocab_size=301, **changes)
    model = Transformer(config, rngs=nnx.Rngs(3))
    tokens = np.random.default_rng(0).integers(0, 301, 4096)
    block = {name: np.asarray(array[0], np.float64) for name, array in named_arrays(model.blocks).items()}

    def norm(x):
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + config.norm_epsilon)

    def rotate(x, index):
        angle = index[:, None, None] * rotary_frequencies(config).astype(np.float64)
        first, second = np.split(x, 2, axis=-1)
        sin, cos = np.sin(angle), np.cos(angle)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    x, late = np.asarray(model.embedding_VD[...], np.float64)[tokens], np.array([0, 300, 3000, 4090, 4095])
    h = norm(x)
    q = rotate(np.einsum("TD,DNH->TNH", h[late], block["query_DNH"]), late)
    k = rotate(np.einsum("TD,DKH->TKH", h, block["key_DKH"]), np.arange(4096))[:, 0]
    score = np.einsum("TNH,SH->TNS", q, k) / 8
    score = np.where(np.arange(4096) <= late[:, None, None], score, -np.inf)
    weight = np.exp(score - score.max(-1, keepdims=True))
    weight /= weight.sum(-1, keepdims=True)
    attended = np.einsum("TNS,SH->TNH", weight, np.einsum("TD,DKH->TKH", h, block["value_DKH"])[:, 0])
    y = x[late] + np.einsum("TNH,NHD->TD", attended, block["output_NHD"])
    gate, up = norm(y) @ block["gate_DF"], norm(y) @ block["up_DF"]
    y = norm(y + (gate / (1 + np.exp(-gate)) * up) @ block["down_FD"])
    expected = y @ np.asarray(model.head_DV[...], np.float64)
    np.testing.assert_allclose(np.asarray(model(jnp.asarray(tokens)[None]))[0, late], expected, atol=2e-5)


def test_linear_scaling_stretches_positions():
    plain, scaled = (rotary_frequencies(tiny_config(rope_scaling=kind, rope_factor=4.0)) for kind in ("none", "linear"))
    np.testing.assert_allclose(scaled * 4, plain, rtol=1e-6)
