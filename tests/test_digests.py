"""Digests of arrays against a plain loop in numpy, on one device and over a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from layerskip_jax.checkpoint.digests import digests
from layerskip_jax.config import Config, MeshConfig
from layerskip_jax.sharding import make_mesh

SPECS = [(), ("fsdp",), (None, "tensor"), (("data", "fsdp"), "tensor"), ("tensor", ("fsdp", "data"))]


def by_hand(array):
    bits = array.view(f"uint{8 * array.itemsize}").reshape(-1)
    return sum((2 * i + 1) * int(b) for i, b in enumerate(bits)) % 2**32


def arrays_of(seed):
    random = np.random.default_rng(seed)
    return {
        "float": random.normal(size=(8, 4)).astype(np.float32),
        "half": np.asarray(jnp.asarray(random.normal(size=(4, 8, 2)), jnp.bfloat16)),
        "count": random.integers(-9, 9, (8, 8)).astype(np.int32),
        "step": np.asarray(seed, np.int32),
    }


@pytest.mark.parametrize("spec", SPECS)
def test_they_are_the_same_on_every_mesh(spec):
    mesh = make_mesh(Config(mesh=MeshConfig(data=2, fsdp=2, tensor=2)))
    arrays = arrays_of(3)
    laid = {
        name: jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec[: array.ndim])))
        for name, array in arrays.items()
    }
    expected = {name: by_hand(array) for name, array in arrays.items()}
    assert digests(laid) == (expected, True)
    assert digests({name: jax.device_put(array, jax.devices()[0]) for name, array in arrays.items()}) == (
        expected,
        True,
    )


@given(st.integers(0, 3), st.integers(0, 2**31), st.integers(0, 31), st.sampled_from(["float", "count"]))
def test_a_bit_that_differs_is_seen(seed, place, bit, name):
    arrays = arrays_of(seed)
    before, _ = digests({key: jnp.asarray(array) for key, array in arrays.items()})
    flat = arrays[name].view(np.uint32).reshape(-1).copy()
    flat[place % flat.size] ^= np.uint32(1 << bit)
    changed = flat.view(arrays[name].dtype).reshape(arrays[name].shape)
    after, _ = digests({key: jnp.asarray(array) for key, array in (arrays | {name: changed}).items()})
    assert [key for key in before if before[key] != after[key]] == [name]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_said(bad):
    mesh = make_mesh(Config(mesh=MeshConfig(data=2, fsdp=2, tensor=2)))
    array = np.ones((8, 4), np.float32)
    array[5, 1] = bad
    for sharding in (jax.devices()[0], NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))):
        assert not digests({"array": jax.device_put(array, sharding)})[1]
