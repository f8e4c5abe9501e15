"""Digests of arrays, computed where the arrays lie: the same on every mesh, for the price of one look at the memory."""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Layout = tuple[PartitionSpec, ...]
"""How each array is laid out over the mesh."""


def digests(arrays: Mapping[str, jax.Array]) -> tuple[dict[str, int], bool]:
    """Return ``{name: sum_i (2 i + 1) bits_i mod 2^32}`` over the elements i of each array, and whether all are finite.

    The factors are odd, so that no change of a single element goes unseen, and differ, so that two that changed places
    do not either. Of several processes all must call it, and all get the same.
    """
    leaves = tuple(arrays.values())
    laid_out = [leaf.sharding for leaf in leaves if isinstance(leaf.sharding, NamedSharding)]
    if laid_out:  # all of them
        layout = tuple(sharding.spec for sharding in laid_out)
        sums = np.asarray(_over_mesh(laid_out[0].mesh, layout, leaves))
    else:
        sums = np.asarray(_on_one_device(leaves))
    return {name: int(value) for name, value in zip(arrays, sums[:-1], strict=True)}, int(sums[-1]) == 0


@jax.jit
def _on_one_device(leaves: tuple[jax.Array, ...]) -> jax.Array:
    nowhere = PartitionSpec()
    return _sums([nowhere] * len(leaves), leaves, {})


@partial(jax.jit, static_argnums=(0, 1))
def _over_mesh(mesh: Mesh, layout: Layout, leaves: tuple[jax.Array, ...]) -> jax.Array:
    # Every device sums up what it holds, and one reduction adds all of it: of many small ones, which wait for each
    # other, XLA:CPU starts several at once and can run out of threads.
    sizes = dict(mesh.shape)
    shards = jax.shard_map(
        lambda *shards: _sums(layout, shards, sizes)[None],
        mesh=mesh,
        in_specs=layout,
        out_specs=PartitionSpec(mesh.axis_names),
    )
    return jax.lax.with_sharding_constraint(
        jnp.sum(shards(*leaves), axis=0, dtype=jnp.uint32), NamedSharding(mesh, PartitionSpec())
    )


def _sums(layout: list[PartitionSpec] | Layout, shards: tuple[jax.Array, ...], sizes: dict[str, int]) -> jax.Array:
    """Return the digests of this device's shards, and how many of their elements are not finite."""
    digests = [_digest(shard, spec, sizes) for shard, spec in zip(shards, layout, strict=True)]
    wrong = [jnp.sum(~jnp.isfinite(shard), dtype=jnp.uint32) for shard in shards]
    return jnp.stack([*digests, sum(wrong[1:], wrong[0])])


def _digest(shard: jax.Array, spec: PartitionSpec, sizes: dict[str, int]) -> jax.Array:
    unsigned = jnp.dtype(f"uint{8 * shard.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(shard, unsigned).astype(jnp.uint32)
    place, unused = jnp.zeros(shard.shape, jnp.uint32), dict(sizes)
    for axis, size in enumerate(shard.shape):
        names = spec[axis] if axis < len(spec) else None
        parts, index = 1, jnp.uint32(0)
        for name in (names,) if isinstance(names, str) else names or ():
            parts, index = parts * sizes[name], index * sizes[name] + jax.lax.axis_index(name).astype(jnp.uint32)
            del unused[name]
        here = index * size + jax.lax.broadcasted_iota(jnp.uint32, shard.shape, axis)
        place = place * jnp.uint32(size * parts) + here
    total = jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)
    # Of the copies of a shard one counts.
    counts = [jax.lax.axis_index(name) == 0 for name in unused]
    return total * jnp.prod(jnp.array(counts, jnp.uint32)) if counts else total
