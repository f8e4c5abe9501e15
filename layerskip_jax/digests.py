"""Digests of arrays, computed where the arrays lie: the same on every mesh, for the price of one look at the memory."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp


def digests(arrays: Mapping[str, jax.Array]) -> tuple[dict[str, int], bool]:
    """Return ``{name: sum_i (2 i + 1) bits_i mod 2^32}`` over the elements i of each array, and whether all are finite.

    The factors are odd, so that no change of a single element goes unseen, and differ, so that two that changed places
    do not either. Of several processes all must call it, and all get the same.
    """
    sums, finite = jax.device_get(_digest_all(dict(arrays)))
    return {name: int(value) for name, value in sums.items()}, bool(finite)


@jax.jit
def _digest_all(arrays: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], jax.Array]:
    sums = {name: _digest(array) for name, array in arrays.items()}
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(array)) for array in arrays.values()]))
    if jax.sharding.get_abstract_mesh().empty:
        return sums, finite
    return jax.lax.with_sharding_constraint((sums, finite), jax.sharding.PartitionSpec())


def _digest(array: jax.Array) -> jax.Array:
    unsigned = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    place = jnp.zeros(array.shape, jnp.uint32)
    for axis, size in enumerate(array.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)
