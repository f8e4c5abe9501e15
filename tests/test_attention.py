"""The backends of attention against the XLA form, and the choice between them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny_model

from layerskip_jax import cache as cache_module
from layerskip_jax import document_attention
from layerskip_jax.cache import LayerCache, write_cache
from layerskip_jax.config import Config, MeshConfig, ModelConfig, TrainConfig
from layerskip_jax.document_attention import attend_documents, attend_splash, choose_backend
from layerskip_jax.errors import UserError
from layerskip_jax.sharding import AXES, make_mesh, target_platform


def inputs(seed, B, T, N, K, H, dtype=jnp.float32):
    """Queries, keys, values, a weight for every output, and documents that end anywhere (some of one token)."""
    keys = jax.random.split(jax.random.key(seed), 6)
    q, k, v, weight = (
        jax.random.normal(key, (B, T, heads, H), dtype) for key, heads in zip(keys, (N, K, K, N), strict=False)
    )
    ends = jax.random.uniform(keys[4], (B, T)) < jax.random.choice(keys[5], jnp.array([0.0, 0.02, 0.3]), (B, 1))
    return q, k, v, jnp.cumsum(ends, axis=1).astype(jnp.int32), weight


def value_and_gradients(attend, q, k, v, segments, weight):
    def objective(q, k, v):
        out = attend(q, k, v, segments)
        return jnp.sum((out * weight).astype(jnp.float32)), out

    (_, out), gradients = jax.jit(jax.value_and_grad(objective, (0, 1, 2), has_aux=True))(q, k, v)
    return out, *gradients


def xla(q, k, v, segments):
    return attend_documents(q, k, v, segments, "xla")


def interpreted(q, k, v, segments, **tile):
    return attend_splash(q, k, v, segments, interpret=True, **tile)


@pytest.mark.parametrize(
    ("B", "T", "N", "K", "H"), [(2, 128, 4, 4, 16), (1, 256, 6, 2, 64), (2, 384, 2, 1, 128), (1, 640, 2, 2, 8)]
)
def test_splash_equals_xla(B, T, N, K, H):
    """Forward and gradients; grouped heads; several tiles, and a length of an odd number of them."""
    arrays = inputs(T, B, T, N, K, H)
    ours, theirs = value_and_gradients(interpreted, *arrays), value_and_gradients(xla, *arrays)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tile", [128, 256, 1024])
def test_every_tile_gives_the_same_attention(tile):
    arrays = inputs(0, 1, 256, 2, 2, 16)[:4]
    np.testing.assert_allclose(interpreted(*arrays, largest_tile=tile), xla(*arrays), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(8, 1, 1, 1), (2, 2, 1, 2), (1, 4, 1, 2), (2, 2, 2, 1)])
def test_splash_on_a_mesh_equals_one_device(shape):
    """Every device has its own rows and heads, of the queries and of the keys; split sequences become whole."""
    config = Config(
        model=ModelConfig(dim=64, num_heads=4, num_kv_heads=2),
        mesh=MeshConfig(*shape),
        train=TrainConfig(batch_size=8),
    )
    arrays = inputs(1, 8, 128, 4, 2, 16)
    expected = value_and_gradients(xla, *arrays)
    with jax.set_mesh(make_mesh(config)):
        ours = value_and_gradients(interpreted, *arrays)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU: ACCELERATOR=1 python -m pytest -k cudnn")
def test_cudnn_equals_xla():
    """In bfloat16, which is all that it takes: no farther from float32 than the XLA form is, with a little room."""
    arrays = inputs(0, 2, 256, 6, 2, 64)
    exact = value_and_gradients(xla, *arrays)
    half = [a.astype(jnp.bfloat16) if a.dtype == jnp.float32 else a for a in arrays]
    ours = value_and_gradients(lambda q, k, v, segments: attend_documents(q, k, v, segments, "cudnn"), *half)
    theirs = value_and_gradients(xla, *half)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert float(jnp.abs(a - c).max()) <= 1.5 * float(jnp.abs(b - c).max())


def test_auto_takes_a_backend_that_fits_the_device_and_the_shapes():
    bf16, f32 = jnp.bfloat16, jnp.float32
    assert choose_backend("auto", "tpu", 4096, 128, bf16) == "splash"
    assert choose_backend("auto", "tpu", 4096, 64, f32) == "splash"
    assert choose_backend("auto", "tpu", 200, 128, bf16) == "xla"
    assert choose_backend("auto", "gpu", 4096, 128, bf16) == "cudnn"
    assert choose_backend("auto", "gpu", 4096, 128, f32) == "xla"
    assert choose_backend("auto", "gpu", 4096, 256, bf16) == "xla"
    assert choose_backend("auto", "cpu", 4096, 128, f32) == "xla"
    for platform in ("cpu", "gpu", "tpu"):
        assert choose_backend("xla", platform, 4096, 128, bf16) == "xla"


@pytest.mark.parametrize(
    ("asked", "platform", "length", "head_dim", "dtype", "message"),
    [
        ("splash", "cpu", 256, 64, "bfloat16", r"model\.attention splash needs a TPU, not cpu; or use auto"),
        ("splash", "tpu", 200, 64, "bfloat16", r"splash needs data\.sequence_length in multiples of 128, not 200"),
        ("cudnn", "tpu", 256, 64, "bfloat16", r"cudnn needs a GPU, not tpu"),
        ("cudnn", "gpu", 256, 64, "float32", r"cudnn needs model\.compute_dtype bfloat16, not float32"),
        ("cudnn", "gpu", 256, 160, "bfloat16", r"in multiples of 8 up to 128, not 160"),
        ("cudnn", "gpu", 255, 64, "bfloat16", r"an even data\.sequence_length, not 255"),
    ],
)
def test_a_backend_that_cannot_run_is_an_error_with_the_reason(asked, platform, length, head_dim, dtype, message):
    with pytest.raises(UserError, match=message) as error:
        choose_backend(asked, platform, length, head_dim, jnp.dtype(dtype))
    assert "\n" not in str(error.value)


def test_the_setting_reaches_the_blocks(monkeypatch):
    with pytest.raises(UserError, match="splash needs a TPU, not cpu"):
        tiny_model(attention="splash")(jnp.zeros((1, 128), int))
    monkeypatch.setattr(document_attention, "target_platform", lambda: "tpu")
    monkeypatch.setattr(document_attention, "attend_splash", interpreted_through(document_attention.attend_splash))
    tokens = jax.random.randint(jax.random.key(0), (1, 128), 0, 61)
    splash = tiny_model(attention="splash")(tokens)
    np.testing.assert_allclose(splash, tiny_model(attention="xla")(tokens), atol=1e-4)


def interpreted_through(splash):
    return lambda *arrays: splash(*arrays, interpret=True)


def test_the_mesh_decides_the_platform_of_a_program():
    """Not the default backend: a program for a TPU is compiled on machines that have none."""
    assert target_platform() == "cpu"
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((4, 1, 1, 1), AXES, (jax.sharding.AxisType.Auto,) * 4, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert target_platform() == "tpu"
        model = tiny_model(compute_dtype="auto")
        assert jax.eval_shape(model.embed, jnp.zeros((4, 1), int)).dtype == jnp.bfloat16
    assert model.embed(jnp.zeros((4, 1), int)).dtype == jnp.float32


@pytest.mark.parametrize(
    ("T", "starts", "S", "first"),
    [
        (1, [0, 125, 297], 300, 4096),
        (3, [0, 126, 297], 300, 4096),
        (8, [120, 250, 292], 300, 128),
        (5, [0, 9, 3], 14, 4096),
    ],
)
def test_cache_writes_for_gpus_equal_those_for_cpus(T, starts, S, first, monkeypatch):
    """One scatter of all rows against one update per row, also where the positions cross from one piece to the next."""
    K, H = 2, 4
    new_BTKH = jax.random.normal(jax.random.key(0), (len(starts), T, K, H))

    def written():
        cache = jax.tree.map(lambda piece: piece + 7, LayerCache.empty(len(starts), K, S, H, jnp.float32))
        cache = jax.jit(lambda cache: write_cache(cache, new_BTKH, -new_BTKH, jnp.array(starts)))(cache)
        return [np.concatenate(pieces, axis=2) for pieces in cache]

    expected = written()
    monkeypatch.setattr(cache_module, "on_gpu", lambda: True)
    sizes = cache_module.read_sizes(S, first)
    monkeypatch.setattr(cache_module, "read_sizes", lambda *_, **__: sizes)
    for ours, reference in zip(written(), expected, strict=True):
        np.testing.assert_array_equal(ours, reference)
