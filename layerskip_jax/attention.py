"""Attention: scores, softmax and weighted values, in plain operations."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp


def attend(
    q_BTNH: jax.Array, k_BKSH: Sequence[jax.Array], v_BKSH: Sequence[jax.Array], visible_BTS: jax.Array
) -> jax.Array:
    """Return ``out_BTNH = softmax(q k^T / sqrt(H)) v`` over the visible positions; the softmax is in float32.

    G = N/K query heads share one key head. Keys and values may come in pieces along S. ``visible_BTS`` is boolean; its
    batch axis may have size 1.
    """
    B, T, N, H = q_BTNH.shape
    K, dtype = k_BKSH[0].shape[1], q_BTNH.dtype
    G, ends = N // K, list(itertools.accumulate(piece.shape[2] for piece in k_BKSH))
    # Flatten G and T into M for plain batched matmuls: with separate axes, XLA:CPU transposes keys and values first.
    q_BKMH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    scores = [
        jnp.einsum("BKMH,BKSH->BKMS", q_BKMH, k.astype(dtype), preferred_element_type=jnp.float32) for k in k_BKSH
    ]
    scores_BKGTS = jnp.concatenate(scores, axis=-1).reshape(B, K, G, T, ends[-1]) * H**-0.5
    scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS, jnp.finfo(jnp.float32).min)
    weights_BKMS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(dtype).reshape(B, K, G * T, ends[-1])
    out_BKMH = sum(
        # `jnp.einsum` would make v the left operand, and transpose it.
        jax.lax.dot_general(
            weights_BKMS[..., end - v.shape[2] : end], v.astype(dtype), (((3,), (2,)), ((0, 1), (0, 1)))
        )
        for end, v in zip(ends, v_BKSH, strict=True)
    )
    assert isinstance(out_BKMH, jax.Array)
    return out_BKMH.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
