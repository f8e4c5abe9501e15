"""Attention in one function, and the cache of keys and values that decoding reads."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp


class LayerCache(NamedTuple):
    """Keys and values of one block, for every position up to the cache's capacity S.

    Heads come before positions, so that the batched products of attention read the cache where it lies.
    """

    k_BKSH: jax.Array
    v_BKSH: jax.Array


def attend(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, visible_BTS: jax.Array) -> jax.Array:
    """``softmax(q k^T / sqrt(H)) v`` over the visible positions, in float32; N/K query heads share one key head.

    Returns ``out_BTNH``. ``visible_BTS`` is boolean; its batch dimension may be 1.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BKSH.shape[1]
    G, S = N // K, k_BKSH.shape[2]
    # One plain batched product for each of the two: with G and T apart, XLA:CPU transposes all keys and values first.
    q_BKMH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    scores_BKMS = jnp.einsum("BKMH,BKSH->BKMS", q_BKMH, k_BKSH, preferred_element_type=jnp.float32)
    scores_BKGTS = scores_BKMS.reshape(B, K, G, T, S) * H**-0.5
    scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS, jnp.finfo(jnp.float32).min)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BKSH.dtype)
    out_BKMH = jax.lax.dot_general(
        weights_BKGTS.reshape(B, K, G * T, S), v_BKSH, (((3,), (2,)), ((0, 1), (0, 1)))
    )  # not an einsum, which would take v first, and transpose it
    return out_BKMH.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def same_document(segments_BT: jax.Array) -> jax.Array:
    """Return ``visible_BTS`` for training: earlier positions, itself included, of the same document."""
    T = segments_BT.shape[1]
    causal_TS = jnp.tril(jnp.ones((T, T), bool))
    return causal_TS[None] & (segments_BT[:, :, None] == segments_BT[:, None, :])


def write_cache(cache: LayerCache, k_BTKH: jax.Array, v_BTKH: jax.Array, start_B: jax.Array) -> LayerCache:
    """Write T positions of each row from that row's ``start_B``; the caller keeps ``start_B + T`` within capacity.

    Row by row: one update of a slice is done in place, where a scatter over rows copies the whole cache.
    """

    def write(cache_BKSH: jax.Array, new_BTKH: jax.Array) -> jax.Array:
        new_BKTH = new_BTKH.swapaxes(1, 2).astype(cache_BKSH.dtype)

        def write_row(row: jax.Array, cache_BKSH: jax.Array) -> jax.Array:
            new_1KTH = jax.lax.dynamic_slice_in_dim(new_BKTH, row, 1)
            return jax.lax.dynamic_update_slice(cache_BKSH, new_1KTH, (row, 0, start_B[row], 0))

        rows = start_B.shape[0]
        return jax.lax.fori_loop(0, rows, write_row, cache_BKSH, unroll=min(8, rows))

    return LayerCache(write(cache.k_BKSH, k_BTKH), write(cache.v_BKSH, v_BTKH))


def read_sizes(capacity: int) -> list[int]:
    """Return the prefixes of the cache that attention is compiled for: 128, 256, 512, 768, 1024, ... and all of it.

    >>> read_sizes(1000)
    [128, 256, 512, 768, 1000]
    """
    sizes = [128, 256, *(size << doublings for doublings in range(capacity.bit_length()) for size in (512, 768))]
    return [*(size for size in sizes if size < capacity), capacity]


def attend_cache(q_BTNH: jax.Array, cache: LayerCache, position_BT: jax.Array, filled: int | None = None) -> jax.Array:
    """Attend to the cache slots up to each query's own position, and read no more of the cache than is filled.

    The smallest of `read_sizes` that holds every position is chosen while the program runs: what is read grows with
    the text, at most twice as fast, and not with the capacity. ``filled``, where it is known beforehand, is a
    bound on all positions. Slots after a query's position are not seen, whatever a rolled-back draft left there.
    """

    def attend_prefix(size: int, q_BTNH: jax.Array, cache: LayerCache, position_BT: jax.Array) -> jax.Array:
        k_BKSH, v_BKSH = cache.k_BKSH[:, :, :size], cache.v_BKSH[:, :, :size]
        visible_BTS = jnp.arange(size)[None, None, :] <= position_BT[:, :, None]
        return attend(q_BTNH, k_BKSH.astype(q_BTNH.dtype), v_BKSH.astype(q_BTNH.dtype), visible_BTS)

    if filled is not None:
        return attend_prefix(filled, q_BTNH, cache, position_BT)
    sizes = read_sizes(cache.k_BKSH.shape[2])
    needed = jnp.max(position_BT) + 1
    choice = sum((needed > size).astype(jnp.int32) for size in sizes[:-1])
    return jax.lax.switch(choice, [partial(attend_prefix, size) for size in sizes], q_BTNH, cache, position_BT)
