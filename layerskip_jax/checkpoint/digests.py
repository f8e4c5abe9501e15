"""Digests of arrays, computed on the devices that hold them: equal on every mesh, at the cost of one read."""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Specs = tuple[PartitionSpec, ...]
"""The partition of each array over the mesh."""


def digests(arrays: Mapping[str, jax.Array]) -> tuple[dict[str, int], bool]:
    """Return ``{name: sum_i (2 i + 1) bits_i mod 2^32}`` over the elements i of each array, and whether all are finite.

    The factors are odd, so a change of one element always changes the sum. They are distinct, so swapping elements i
    and j changes it too, unless ``2 (i - j) (bits_i - bits_j)`` is a multiple of 2^32. All processes must call it, and
    all get the same result.
    """
    leaves = tuple(arrays.values())
    laid_out = [leaf.sharding for leaf in leaves if isinstance(leaf.sharding, NamedSharding)]
    if laid_out:  # then all leaves are sharded over one mesh
        specs = tuple(sharding.spec for sharding in laid_out)
        sums = np.asarray(_over_mesh(laid_out[0].mesh, specs, leaves))
    else:
        sums = np.asarray(_on_one_device(leaves))
    return {name: int(value) for name, value in zip(arrays, sums[:-1], strict=True)}, int(sums[-1]) == 0


@jax.jit
def _on_one_device(leaves: tuple[jax.Array, ...]) -> jax.Array:
    return _sums([PartitionSpec()] * len(leaves), leaves, {})


@partial(jax.jit, static_argnums=(0, 1))
def _over_mesh(mesh: Mesh, specs: Specs, leaves: tuple[jax.Array, ...]) -> jax.Array:
    # Every device computes a vector with the sum of each array's shard, and a single all-reduce adds these vectors.
    # With one all-reduce for each array, XLA:CPU starts several at once. Each blocks a thread, and it can run out of
    # threads.
    sizes = dict(mesh.shape)
    shards = jax.shard_map(
        lambda *shards: _sums(specs, shards, sizes)[None],
        mesh=mesh,
        in_specs=specs,
        out_specs=PartitionSpec(mesh.axis_names),
    )
    return jax.lax.with_sharding_constraint(
        jnp.sum(shards(*leaves), axis=0, dtype=jnp.uint32), NamedSharding(mesh, PartitionSpec())
    )


def _sums(specs: list[PartitionSpec] | Specs, shards: tuple[jax.Array, ...], sizes: dict[str, int]) -> jax.Array:
    """Return the digests of this device's shards, and last the number of their elements that are not finite."""
    sums = [_digest(shard, spec, sizes) for shard, spec in zip(shards, specs, strict=True)]
    not_finite = [jnp.sum(~jnp.isfinite(shard), dtype=jnp.uint32) for shard in shards]
    return jnp.stack([*sums, sum(not_finite[1:], not_finite[0])])


def _digest(shard: jax.Array, spec: PartitionSpec, sizes: dict[str, int]) -> jax.Array:
    """Return the sum over the elements of a shard, with their flat indices in the whole array."""
    unsigned = jnp.dtype(f"uint{8 * shard.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(shard, unsigned).astype(jnp.uint32)
    index, replicated = jnp.zeros(shard.shape, jnp.uint32), dict(sizes)
    for axis, size in enumerate(shard.shape):
        names = spec[axis] if axis < len(spec) else None
        parts, part = 1, jnp.uint32(0)
        for name in (names,) if isinstance(names, str) else names or ():
            parts, part = parts * sizes[name], part * sizes[name] + jax.lax.axis_index(name).astype(jnp.uint32)
            del replicated[name]
        along_axis = part * size + jax.lax.broadcasted_iota(jnp.uint32, shard.shape, axis)
        index = index * jnp.uint32(size * parts) + along_axis
    total = jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)
    # Count only one of the replicas of a shard.
    counts = [jax.lax.axis_index(name) == 0 for name in replicated]
    return total * jnp.prod(jnp.array(counts, jnp.uint32)) if counts else total
