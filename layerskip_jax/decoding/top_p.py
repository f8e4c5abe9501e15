"""The threshold of top-p (nucleus) sampling, without a sort."""

import jax
import jax.numpy as jnp


def smallest_kept(p: jax.Array, top_p: float) -> jax.Array:
    """Return the smallest probability that top-p keeps: the least t with ``sum(p[p > t]) < top_p``, over the last axis.

    Binary search over the bit patterns of float32, which sort like the numbers if none is negative. It is exact, and
    reads ``p`` 30 times; a sort takes about 30 times as long on a CPU.
    """

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high) // 2
        more_likely = p > jax.lax.bitcast_convert_type(middle, jnp.float32)
        found = jnp.sum(jnp.where(more_likely, p, 0), axis=-1, keepdims=True) < top_p
        return jnp.where(found, low, middle + 1), jnp.where(found, middle, high)

    one = jnp.full((*p.shape[:-1], 1), jax.lax.bitcast_convert_type(jnp.float32(1), jnp.int32))
    _, high = jax.lax.fori_loop(0, 30, halve, (jnp.zeros_like(one), one))
    return jax.lax.bitcast_convert_type(high, jnp.float32)
