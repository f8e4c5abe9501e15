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


def plain_digest(array):
    bits = array.view(f"uint{8 * array.itemsize}").reshape(-1)
    return sum((2 * i + 1) * int(b) for i, b in enumerate(bits)) % 2**32


def make_arrays(seed):
    random = np.random.default_rng(seed)
    return {
        "float": random.normal(size=(8, 4)).astype(np.float32),
        "half": np.asarray(jnp.asarray(random.normal(size=(4, 8, 2)), jnp.bfloat16)),
        "count": random.integers(-9, 9, (8, 8)).astype(np.int32),
        "step": np.asarray(seed, np.int32),
    }


@pytest.mark.parametrize("spec", SPECS)
def test_digests_are_equal_on_every_mesh(spec):
    mesh = make_mesh(Config(mesh=MeshConfig(data=2, fsdp=2, tensor=2)))
    arrays = make_arrays(3)
    laid = {
        name: jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec[: array.ndim])))
        for name, array in arrays.items()
    }
    expected = {name: plain_digest(array) for name, array in arrays.items()}
    assert digests(laid) == (expected, True)
    assert digests({name: jax.device_put(array, jax.devices()[0]) for name, array in arrays.items()}) == (
        expected,
        True,
    )


@given(st.integers(0, 3), st.integers(0, 2**31), st.integers(0, 31), st.sampled_from(["float", "count"]))
def test_a_flipped_bit_changes_the_digest(seed, place, bit, name):
    arrays = make_arrays(seed)
    before, _ = digests({key: jnp.asarray(array) for key, array in arrays.items()})
    flat = arrays[name].view(np.uint32).reshape(-1).copy()
    flat[place % flat.size] ^= np.uint32(1 << bit)
    changed = flat.view(arrays[name].dtype).reshape(arrays[name].shape)
    after, _ = digests({key: jnp.asarray(array) for key, array in (arrays | {name: changed}).items()})
    assert [key for key in before if before[key] != after[key]] == [name]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_found(bad):
    mesh = make_mesh(Config(mesh=MeshConfig(data=2, fsdp=2, tensor=2)))
    array = np.ones((8, 4), np.float32)
    array[5, 1] = bad
    for sharding in (jax.devices()[0], NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))):
        assert not digests({"array": jax.device_put(array, sharding)})[1]
