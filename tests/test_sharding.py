"""The arrangement of chips in the mesh, tested with stubs that have the coordinates of TPU chips."""

import itertools
import math
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import mesh_utils

from layerskip_jax import sharding
from layerskip_jax.sharding import RULES, arrange_devices, batch_shards

TORUSES = [(4, 8, 1), (8, 16, 1), (2, 2, 2), (4, 4, 4), (4, 8, 8)]


def chips(torus, slices=1):
    kind = "TPU v5 lite" if torus[2] == 1 else "TPU v5p"
    chip = {"core_on_chip": 0, "platform": "tpu", "device_kind": kind}
    places = list(itertools.product(*map(range, torus)))
    return [
        types.SimpleNamespace(id=i, coords=list(at), process_index=i // 4, slice_index=slice_index, **chip)
        for slice_index in range(slices)
        for i, at in enumerate(places)
    ]


@st.composite
def meshes(draw):
    """A torus, a number of slices, and a mesh whose fsdp, sequence and tensor axes are powers of two."""
    torus, slices = draw(st.sampled_from(TORUSES)), draw(st.sampled_from([1, 2, 4]))
    left, axes = math.prod(torus), []
    for _ in range(3):
        axes.append(1 << draw(st.integers(0, int(math.log2(left)))))
        left //= axes[-1]
    return torus, slices, (slices * left, *axes)


@given(meshes())
def test_a_mesh_holds_every_chip_once_and_only_its_data_axis_crosses_slices(drawn):
    torus, slices, shape = drawn
    devices = chips(torus, slices)
    grid = arrange_devices(shape, slices, devices)
    assert grid.shape == shape
    assert sorted((chip.slice_index, chip.id) for chip in grid.flat) == [(c.slice_index, c.id) for c in devices]
    for copy in grid:
        assert len({chip.slice_index for chip in copy.flat}) == 1


def test_a_mesh_axis_may_split_a_torus_axis():
    """On 4 x 4 x 4 an axis of 32 is not a product of whole axes, which JAX rejects unless asked to split."""
    shape, devices = (2, 32, 1, 1), chips((4, 4, 4))
    with pytest.raises(NotImplementedError, match="allow_split_physical_axes"):
        mesh_utils.create_device_mesh(shape, devices)
    assert arrange_devices(shape, 1, devices).shape == shape


def test_a_v6e_mesh_of_one_axis_keeps_the_chips_of_a_host_together():
    devices = chips((8, 8, 1))
    for device in devices:  # a host has 2 x 2 chips
        device.device_kind, device.process_index = "TPU v6 lite", 4 * (device.coords[0] // 2) + device.coords[1] // 2
    hosts = [device.process_index for device in arrange_devices((1, 64, 1, 1), 1, devices).flat]
    assert hosts == sorted(hosts)
    hosts = [device.process_index for device in arrange_devices((1, 8, 1, 8), 1, devices).flat]
    assert hosts != sorted(hosts)  # with two axes, neighbors on the torus


def test_the_rules_are_constant():
    with pytest.raises(TypeError):
        RULES["embed"] = None


@pytest.mark.parametrize(("rule", "shards"), [(("data", "fsdp"), 6), ("data", 2), (None, 1)])
def test_batch_shards_for_every_kind_of_rule(monkeypatch, rule, shards):
    monkeypatch.setattr(sharding, "RULES", RULES | {"batch": rule})
    assert batch_shards(types.SimpleNamespace(shape={"data": 2, "fsdp": 3, "sequence": 5, "tensor": 7})) == shards
