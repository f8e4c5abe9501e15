"""The device mesh, and `RULES`, the one table that maps logical axes to mesh axes.

To try another layout, edit `RULES`. Edit `_check_divides` and `check_tensor_divides` too, which repeat the table to
raise a `UserError` if the mesh does not divide a dimension. For example, ``"embed": None`` replicates parameters over
fsdp and sequence. The axis sequence is then free for another dimension: ``"ffn": ("tensor", "sequence")`` shards the
feed-forward width over tensor and sequence.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from layerskip_jax.config import Config, ModelConfig
from layerskip_jax.errors import UserError

AXES = ("data", "fsdp", "sequence", "tensor")

RULES: Mapping[str, str | tuple[str, ...] | None] = MappingProxyType(
    {
        # activations
        "batch": ("data", "fsdp"),
        "length": "sequence",
        "attended_heads": ("tensor", "sequence"),
        "attended_kv_heads": ("tensor", "sequence"),
        # parameters, and the vocabulary of logits
        "layers": None,
        "vocab": "tensor",
        "embed": ("fsdp", "sequence"),
        "heads": "tensor",
        "kv_heads": "tensor",
        "head_dim": None,
        "ffn": "tensor",
    }
)


def make_mesh(config: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh (data, fsdp, sequence, tensor) over ``devices``, by default all of them.

    With several TPU slices, only the data axis crosses slices, over the data-center network (DCN). Raises `UserError`
    if a size does not fit.
    """
    devices = jax.devices() if devices is None else devices
    wanted, slices = config.mesh, len({getattr(device, "slice_index", 0) for device in devices})
    rest = wanted.fsdp * wanted.sequence * wanted.tensor
    data = len(devices) // rest if wanted.data == -1 else wanted.data
    shape = (data, wanted.fsdp, wanted.sequence, wanted.tensor)
    if data * rest != len(devices):
        sizes = f"data {wanted.data}, fsdp {wanted.fsdp}, sequence {wanted.sequence}, tensor {wanted.tensor}"
        raise UserError(
            f"mesh ({sizes}) does not cover {len(devices)} devices: the product of its axes must be {len(devices)}"
        )
    if data % slices:
        raise UserError(f"mesh.data = {data} must be a multiple of the {slices} slices: no other axis crosses them")
    _check_divides(config, data)
    return auto_mesh(arrange_devices(shape, slices, devices))


def auto_mesh(devices: np.ndarray) -> Mesh:
    """Return the mesh over an array of devices with four axes, along which the compiler partitions."""
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@contextlib.contextmanager
def tensor_parallel(count: int) -> Iterator[None]:
    """Split models over the first ``count`` devices while the context is active, for models too large for one.

    `load_model` then reads one shard for each device, and generation runs on all of them. Heads, feed-forward width and
    vocabulary are split. Raises `UserError` unless this process has as many devices.
    """
    devices = jax.local_devices()
    if not 1 <= count <= len(devices):
        raise UserError(f"--tensor_parallel must be in 1..{len(devices)}, the devices of this process, not {count}")
    if count == 1:
        yield
        return
    shape = (1, 1, 1, count)
    # `arrange_devices` needs all devices of a slice.
    used = arrange_devices(shape, 1, devices) if count == len(devices) else np.reshape(devices[:count], shape)
    with jax.set_mesh(auto_mesh(used)):
        yield


def check_tensor_divides(model: ModelConfig, setting: str, count: int, sequence: int = 1) -> None:
    """Raise `UserError`, which names ``setting``, unless a model can be split over ``count`` devices.

    Attention also splits its heads over the ``sequence`` devices; all other layers split positions over them.
    """
    for name in ("num_heads", "num_kv_heads", "ffn_dim", "vocab_size"):
        further = sequence if "heads" in name else 1
        size, over, devices = getattr(model, name), setting + " * mesh.sequence" * (further > 1), count * further
        if size % devices:
            raise UserError(f"model.{name} {size} is not divisible by {over} = {devices} devices: use a divisor")


def arrange_devices(shape: tuple[int, ...], slices: int, devices: Sequence[jax.Device]) -> np.ndarray:
    """Arrange ``devices`` in the ``shape`` of the mesh, with neighbors on the mesh next to each other on the torus.

    Exception: if one axis takes all chips of a v6e slice, keep the chips of a host together. libtpu 0.0.50 then runs
    all-gathers on the SparseCores. It estimated 0.72 s in place of 0.80 s for a step of the 7B on 8x8 chips.
    """
    if devices[0].device_kind == "TPU v6 lite" and slices == 1 and max(shape) == len(devices):
        return np.reshape(sorted(devices, key=lambda device: (device.process_index, device.id)), shape)
    arrange = partial(mesh_utils.create_device_mesh, shape)
    if slices > 1:
        within_slice = (shape[0] // slices, *shape[1:])
        arrange = partial(mesh_utils.create_hybrid_device_mesh, within_slice, (slices, 1, 1, 1))
    try:
        return arrange(devices)
    except NotImplementedError:  # a mesh axis is not a product of whole torus axes, so split them
        return arrange(devices, allow_split_physical_axes=True)


def _check_divides(config: Config, data: int) -> None:
    wanted, embed_shards = config.mesh, config.mesh.fsdp * config.mesh.sequence
    microbatch = config.train.batch_size // config.train.accumulate
    if microbatch % (data * wanted.fsdp):
        raise UserError(
            f"a microbatch of {microbatch} sequences (train.batch_size / train.accumulate) is not divisible by "
            f"mesh.data * mesh.fsdp = {data * wanted.fsdp} devices; make it a multiple"
        )
    check_tensor_divides(config.model, "mesh.tensor", wanted.tensor, wanted.sequence)
    if config.model.dim % embed_shards:
        raise UserError(
            f"model.dim {config.model.dim} is not divisible by mesh.fsdp * mesh.sequence = {embed_shards} devices: "
            "use a divisor"
        )
    if config.data.sequence_length % wanted.sequence:
        raise UserError(
            f"data.sequence_length {config.data.sequence_length} is not divisible by mesh.sequence = "
            f"{wanted.sequence} devices: use a divisor"
        )
    chunk = min(config.train.loss_chunk, config.data.sequence_length)
    if chunk % wanted.sequence:
        raise UserError(
            f"train.loss_chunk {chunk} is not divisible by mesh.sequence = {wanted.sequence} devices: use a divisor"
        )


def batch_shards(mesh: Mesh) -> int:
    """Return the number of shards that hold different rows of a batch."""
    return math.prod(mesh.shape[axis] for axis in _mesh_axes("batch"))


def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Translate logical axes to mesh axes by `RULES`.

    >>> tuple(spec(("embed", "heads", "head_dim")))
    (('fsdp', 'sequence'), 'tensor', None)
    """
    return PartitionSpec(*(RULES[axis] if axis else None for axis in axes))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch's arrays, [B, T]."""
    return NamedSharding(mesh, spec(("batch", "length")))


def named_shardings(tree: Any, model: nnx.Module, mesh: Mesh) -> Any:
    """Return a `NamedSharding` for every array of ``tree``.

    A Param with the axis names and the shape of a parameter of ``model`` is sharded by `RULES`: the parameters
    themselves, and the optimizer's moments. Other arrays, such as factored moments, are replicated. A Param with one
    more dimension than axis names has "layers" as its first.
    """
    known = {(param.get_metadata()["axes"], param.shape) for param in jax.tree.leaves(model, is_leaf=_is_param)}

    def leaf_sharding(leaf: Any) -> Any:
        empty = not jax.tree.leaves(leaf)  # muon's state has no array for a parameter that adamw updates
        if empty or not _is_param(leaf) or (leaf.get_metadata()["axes"], leaf.shape) not in known:
            return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), leaf)
        axes = leaf.get_metadata()["axes"]
        stacked = ("layers",) * (leaf.ndim - len(axes))
        return jax.tree.map(lambda _: NamedSharding(mesh, spec(stacked + axes)), leaf)

    return jax.tree.map(leaf_sharding, tree, is_leaf=_is_param)


def _is_param(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrain the sharding of an activation along the mesh axes that are left to the compiler.

    A dimension that is not divisible, such as the single row when generating a sample, is replicated. Does nothing
    outside `jax.set_mesh`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = _free_axes(mesh)
    if mesh.size == 1 or not free:
        return x
    axes = tuple(axis if axis and n % mesh_size(axis) == 0 else None for axis, n in zip(axes, x.shape, strict=True))
    return jax.lax.with_sharding_constraint(x, _split(axes, free))


def mesh_size(logical: str) -> int:
    """Return how many devices of the current mesh a logical axis is sharded over; 1 outside `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in _mesh_axes(logical) if axis in mesh.shape)


def target_platform() -> str:
    """Return the platform that a program is traced for: the current mesh's, or else JAX's default.

    They differ when a program is compiled for a TPU on a machine without one.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def target_device_kind() -> str:
    """Return the kind of device that a program is traced for, as `target_platform` does."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device is not None else jax.devices()[0].device_kind


def row_major(x: jax.Array) -> jax.Array:
    """Keep the last axis contiguous in a TPU's memory; does nothing on other devices.

    XLA:TPU may choose different layouts for two branches of a conditional, and then copies the array between them.
    """
    if target_platform() != "tpu":
        return x
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def on_each_device(
    f: Callable[..., Any],
    inputs: Sequence[tuple[str | None, ...]],
    output: tuple[str | None, ...] | list[tuple[str | None, ...]],
    along: Sequence[str] | None = None,
) -> Callable[..., Any]:
    """Return ``f`` under `jax.shard_map`: every device runs it on its own shard of the arguments.

    ``inputs`` has an entry for each argument: the logical axes of the leading dimensions of every array in it; ()
    replicates them. ``output`` is one such entry, or a list with one for each output. ``along`` names the logical axes
    to map over, by default all. Their mesh axes become manual, and the compiler still partitions the others. Returns
    ``f`` itself if no axis is left to map: on one device, outside `jax.set_mesh`, inside a `shard_map` over these
    axes, or if each of them has one device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    mapped = _free_axes(mesh)
    if along is not None:
        # Leave out axes of one device: XLA fails to partition a sum over them inside a partly manual program.
        chosen = {axis for name in along for axis in _mesh_axes(name) if axis in mesh.shape}
        mapped &= {axis for axis in chosen if mesh.shape[axis] > 1}
    if mesh.size == 1 or not mapped:
        return f
    in_specs = tuple(_split(axes, mapped) for axes in inputs)
    out_specs = tuple(_split(axes, mapped) for axes in output) if isinstance(output, list) else _split(output, mapped)
    return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, axis_names=mapped, check_vma=False)


def sum_over(logical: Sequence[str], values: Any) -> Any:
    """Sum arrays over the devices that `on_each_device` maps along these logical axes."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = set(mesh.axis_names) - _free_axes(mesh)
    axes = tuple(axis for name in logical for axis in _mesh_axes(name) if axis in manual)
    return jax.lax.psum(values, axes) if axes else values


def _free_axes(mesh: AbstractMesh) -> set[str]:
    """Return the mesh axes that the compiler partitions: all that `on_each_device` has not mapped over."""
    return {axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}


def _split(axes: tuple[str | None, ...], along: set[str]) -> PartitionSpec:
    return PartitionSpec(*(tuple(axis for axis in _mesh_axes(logical) if axis in along) for logical in axes))


def _mesh_axes(logical: str | None) -> tuple[str, ...]:
    axes = RULES[logical] if logical else None
    return (axes,) if isinstance(axes, str) else axes or ()
