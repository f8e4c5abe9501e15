"""Attention in one function, and the cache of keys and values that decoding reads."""

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
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    scores_BKGTS = jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32)
    scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS * H**-0.5, jnp.finfo(jnp.float32).min)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BKSH.dtype)
    out_BKGTH = jnp.einsum("BKGTS,BKSH->BKGTH", weights_BKGTS, v_BKSH)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def same_document(segments_BT: jax.Array) -> jax.Array:
    """Return ``visible_BTS`` for training: earlier positions, itself included, of the same document."""
    T = segments_BT.shape[1]
    causal_TS = jnp.tril(jnp.ones((T, T), bool))
    return causal_TS[None] & (segments_BT[:, :, None] == segments_BT[:, None, :])


def write_cache(cache: LayerCache, k_BTKH: jax.Array, v_BTKH: jax.Array, start_B: jax.Array) -> LayerCache:
    """Write T positions of each row from that row's ``start_B``; the caller keeps ``start_B + T`` within capacity."""

    def write_row(cache_KSH: jax.Array, new_TKH: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(cache_KSH, new_TKH.swapaxes(0, 1), (0, start, 0))

    write = jax.vmap(write_row)
    return LayerCache(
        write(cache.k_BKSH, k_BTKH.astype(cache.k_BKSH.dtype), start_B),
        write(cache.v_BKSH, v_BTKH.astype(cache.v_BKSH.dtype), start_B),
    )


def up_to(position_BT: jax.Array, capacity: int) -> jax.Array:
    """Return ``visible_BTS`` for decoding: cache slots up to and including each query's own position."""
    return jnp.arange(capacity)[None, None, :] <= position_BT[:, :, None]
