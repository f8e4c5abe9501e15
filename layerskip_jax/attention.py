"""Attention in one function, and the cache of keys and values that decoding reads."""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp


class LayerCache(NamedTuple):
    """Keys and values of one block, for every position up to the cache's capacity S.

    In pieces along the positions, so that attention reads the first few as they lie; XLA would copy a slice. Heads
    come before positions, as the batched products of attention want them.
    """

    k_BKSH: tuple[jax.Array, ...]
    v_BKSH: tuple[jax.Array, ...]

    @classmethod
    def empty(cls, batch: int, heads: int, capacity: int, head_dim: int, dtype: jnp.dtype) -> "LayerCache":
        """Return zeroed pieces that end at `read_sizes`."""
        ends = read_sizes(capacity)
        shapes = [(batch, heads, end - start, head_dim) for start, end in zip([0, *ends], ends, strict=False)]
        return cls(tuple(jnp.zeros(s, dtype) for s in shapes), tuple(jnp.zeros(s, dtype) for s in shapes))


def attend(
    q_BTNH: jax.Array, k_BKSH: Sequence[jax.Array], v_BKSH: Sequence[jax.Array], visible_BTS: jax.Array
) -> jax.Array:
    """``softmax(q k^T / sqrt(H)) v`` over the visible positions, in float32; N/K query heads share one key head.

    Returns ``out_BTNH``. Keys and values may come in pieces along S. ``visible_BTS`` is boolean; its batch dimension
    may be 1.
    """
    B, T, N, H = q_BTNH.shape
    K, dtype = k_BKSH[0].shape[1], q_BTNH.dtype
    G, ends = N // K, list(itertools.accumulate(piece.shape[2] for piece in k_BKSH))
    # Plain batched products: with G and T apart, XLA:CPU transposes all keys and values first.
    q_BKMH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    scores = [
        jnp.einsum("BKMH,BKSH->BKMS", q_BKMH, k.astype(dtype), preferred_element_type=jnp.float32) for k in k_BKSH
    ]
    scores_BKGTS = jnp.concatenate(scores, axis=-1).reshape(B, K, G, T, ends[-1]) * H**-0.5
    scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS, jnp.finfo(jnp.float32).min)
    weights_BKMS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(dtype).reshape(B, K, G * T, ends[-1])
    out_BKMH = sum(
        # Not an einsum, which would take v first, and transpose it.
        jax.lax.dot_general(
            weights_BKMS[..., end - v.shape[2] : end], v.astype(dtype), (((3,), (2,)), ((0, 1), (0, 1)))
        )
        for end, v in zip(ends, v_BKSH, strict=True)
    )
    assert isinstance(out_BKMH, jax.Array)
    return out_BKMH.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def same_document(segments_BT: jax.Array) -> jax.Array:
    """Return ``visible_BTS`` for training: earlier positions, itself included, of the same document."""
    T = segments_BT.shape[1]
    causal_TS = jnp.tril(jnp.ones((T, T), bool))
    return causal_TS[None] & (segments_BT[:, :, None] == segments_BT[:, None, :])


def write_cache(cache: LayerCache, k_BTKH: jax.Array, v_BTKH: jax.Array, start_B: jax.Array | None) -> LayerCache:
    """Write T positions of each row from that row's ``start_B`` (None: from 0), which the caller keeps in capacity.

    Row by row and piece by piece: one update of a slice is done in place, where a scatter copies the whole cache.
    T is at most the shortest piece, if there is a ``start_B``.
    """

    def write_piece(piece_BKSH: jax.Array, new_BKTH: jax.Array, first: int) -> jax.Array:
        S, T = piece_BKSH.shape[2], new_BKTH.shape[2]
        if start_B is None:
            return jax.lax.dynamic_update_slice(piece_BKSH, new_BKTH[:, :, first : first + S], (0, 0, 0, 0))
        # The window of T slots that is nearest to the row's positions; what of it is not theirs keeps its old value.
        slot_B = jnp.clip(start_B - first, 0, S - T)
        source_BT = (first + slot_B - start_B)[:, None] + jnp.arange(T)[None]
        is_new_BT = (source_BT >= 0) & (source_BT < T)

        def write_row(row: jax.Array, piece_BKSH: jax.Array) -> jax.Array:
            at = (row, 0, slot_B[row], 0)
            old_1KTH = jax.lax.dynamic_slice(piece_BKSH, at, (1, *new_BKTH.shape[1:]))
            new_1KTH = jax.lax.dynamic_slice_in_dim(new_BKTH, row, 1)
            if T > 1:
                new_1KTH = jnp.take(new_1KTH, source_BT[row], axis=2, mode="clip")
            return jax.lax.dynamic_update_slice(
                piece_BKSH, jnp.where(is_new_BT[row][None, None, :, None], new_1KTH, old_1KTH), at
            )

        rows = start_B.shape[0]
        return jax.lax.fori_loop(0, rows, write_row, piece_BKSH, unroll=min(8, rows))

    def write(pieces: tuple[jax.Array, ...], new_BTKH: jax.Array) -> tuple[jax.Array, ...]:
        new_BKTH, first, written = new_BTKH.swapaxes(1, 2).astype(pieces[0].dtype), 0, []
        for piece_BKSH in pieces:
            written.append(write_piece(piece_BKSH, new_BKTH, first))
            first += piece_BKSH.shape[2]
        return tuple(written)

    return LayerCache(write(cache.k_BKSH, k_BTKH), write(cache.v_BKSH, v_BTKH))


def read_sizes(capacity: int) -> list[int]:
    """Return where the pieces of a cache end, so the prefixes that attention reads: 128, 256, 512, ... and all.

    >>> read_sizes(1000)
    [128, 256, 512, 1000]
    """
    return [*(128 << doublings for doublings in range(capacity.bit_length()) if 128 << doublings < capacity), capacity]


def attend_cache(q_BTNH: jax.Array, cache: LayerCache, position_BT: jax.Array, filled: int | None = None) -> jax.Array:
    """Attend to the cache slots up to each query's own position, and read no more of the cache than is filled.

    The fewest pieces that hold every position are chosen while the program runs: what is read grows with the text, at
    most twice as fast, and not with the capacity. ``filled``, where it is known beforehand, is a bound on all
    positions. Slots after a query's position are not seen, whatever a rolled-back draft left there.
    """
    ends = list(itertools.accumulate(piece.shape[2] for piece in cache.k_BKSH))

    def attend_first(pieces: int, q_BTNH: jax.Array, cache: LayerCache, position_BT: jax.Array) -> jax.Array:
        visible_BTS = jnp.arange(ends[pieces - 1])[None, None, :] <= position_BT[:, :, None]
        return attend(q_BTNH, cache.k_BKSH[:pieces], cache.v_BKSH[:pieces], visible_BTS)

    if filled is not None:
        return attend_first(sum(end < filled for end in ends) + 1, q_BTNH, cache, position_BT)
    needed = jnp.max(position_BT) + 1
    choice = sum((needed > end).astype(jnp.int32) for end in ends[:-1])
    branches = [partial(attend_first, pieces) for pieces in range(1, len(ends) + 1)]
    return jax.lax.switch(choice, branches, q_BTNH, cache, position_BT)
