"""The cache of keys and values, for decoding: write positions, and attend to the slots that hold them."""

import itertools
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from layerskip_jax.attention import attend
from layerskip_jax.sharding import constrain, on_each_device, row_major, target_platform


class LayerCache(NamedTuple):
    """Keys and values of one block for S positions, the capacity of the cache.

    The S axis is split into several arrays, the pieces. Attention reads as many of the first pieces as it needs, in
    place, while XLA would copy a slice of a single array. Heads come before positions, because attention's matmuls read
    them in this order.
    """

    k_BKSH: tuple[jax.Array, ...]
    v_BKSH: tuple[jax.Array, ...]

    @classmethod
    def empty(cls, batch: int, heads: int, capacity: int, head_dim: int, dtype: jnp.dtype) -> "LayerCache":
        """Return a zeroed cache, split into pieces at the positions of `read_sizes`."""
        # Small pieces leave few unused positions to read, but each adds a branch to the switch in `attend_cache`. On a
        # TPU, 512 compiles in 0.7 of the time of 128, and 512 positions are 2 % of what a pass of a 7B model reads. On
        # a GPU, the switch waits for the host, which costs as much as reading 2,000 positions.
        ends = read_sizes(capacity, first={"cpu": 128, "tpu": 512}.get(target_platform(), 4096))
        shapes = [(batch, heads, end - start, head_dim) for start, end in zip([0, *ends], ends, strict=False)]

        def zeros() -> tuple[jax.Array, ...]:
            return tuple(constrain(jnp.zeros(shape, dtype), None, "kv_heads", None, None) for shape in shapes)

        return cls(zeros(), zeros())

    def attend(
        self, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, index_BT: jax.Array, filled: int | None = None
    ) -> tuple[jax.Array, "LayerCache"]:
        """Write the keys and values of the positions ``index_BT``; return their attention and the new cache."""
        written = write_cache(self, k_BTKH, v_BTKH, index_BT[:, 0] if filled is None else None)
        return attend_cache(q_BTNH, written, index_BT, filled), written


def write_cache(cache: LayerCache, k_BTKH: jax.Array, v_BTKH: jax.Array, start_B: jax.Array | None) -> LayerCache:
    """Write the keys and values of T positions into each row, from the slot ``start_B`` of that row on (None: slot 0).

    The caller keeps them within the capacity. With ``start_B``, T must be at most the length of the shortest piece.
    """

    def write(pieces: tuple[jax.Array, ...], new_BTKH: jax.Array) -> tuple[jax.Array, ...]:
        new_BKTH, first, written = new_BTKH.swapaxes(1, 2).astype(pieces[0].dtype), 0, []
        for piece_BKSH in pieces:
            S = piece_BKSH.shape[2]
            if start_B is None:
                prefix_BKTH = new_BKTH[:, :, first : first + S]
                written.append(jax.lax.dynamic_update_slice(piece_BKSH, prefix_BKTH, (0, 0, 0, 0)))
            else:
                written.append(_write_piece(piece_BKSH, new_BKTH, start_B - first))
            first += S
        return tuple(written)

    return LayerCache(write(cache.k_BKSH, k_BTKH), write(cache.v_BKSH, v_BTKH))


def _write_piece(piece_BKSH: jax.Array, new_BKTH: jax.Array, start_B: jax.Array) -> jax.Array:
    """Write the positions of ``new_BKTH`` that fall into a piece; ``start_B`` counts from the piece's first slot."""
    S, T = piece_BKSH.shape[2], new_BKTH.shape[2]
    # Each row rewrites a window of T slots. It starts at the row's first new position, clipped so that the window fits
    # in the piece. Slot t of the window takes new position source_BT[t]; where that is outside [0, T), it keeps its
    # value.
    slot_B = jnp.clip(start_B, 0, S - T)
    source_BT = (slot_B - start_B)[:, None] + jnp.arange(T)[None]
    is_new_BT = (source_BT >= 0) & (source_BT < T)

    if on_gpu():  # XLA:GPU scatters in place; a loop would launch kernels for every row
        read_rows = jax.vmap(lambda piece_KSH, slot: jax.lax.dynamic_slice_in_dim(piece_KSH, slot, T, axis=1))
        write_rows = jax.vmap(
            lambda piece_KSH, rows_KTH, slot: jax.lax.dynamic_update_slice(piece_KSH, rows_KTH, (0, slot, 0))
        )
        shifted_BKTH = jnp.take_along_axis(new_BKTH, source_BT[:, None, :, None], axis=2, mode="clip")
        window_BKTH = jnp.where(is_new_BT[:, None, :, None], shifted_BKTH, read_rows(piece_BKSH, slot_B))
        return write_rows(piece_BKSH, window_BKTH, slot_B)

    def write_row(row: jax.Array, piece_BKSH: jax.Array) -> jax.Array:
        at = (row, 0, slot_B[row], 0)
        old_1KTH = jax.lax.dynamic_slice(piece_BKSH, at, (1, *new_BKTH.shape[1:]))
        new_1KTH = jax.lax.dynamic_slice_in_dim(new_BKTH, row, 1)
        if T > 1:
            new_1KTH = jnp.take(new_1KTH, source_BT[row], axis=2, mode="clip")
        window_1KTH = jnp.where(is_new_BT[row][None, None, :, None], new_1KTH, old_1KTH)
        return jax.lax.dynamic_update_slice(piece_BKSH, window_1KTH, at)

    # One row at a time: XLA:CPU and XLA:TPU update a slice in place, but copy the whole piece for a scatter. Unroll on
    # TPU only: XLA:CPU would fuse a row's write into the next row's read, and copy the piece twice.
    rows = start_B.shape[0]
    unroll = 1 if target_platform() == "cpu" else min(8, rows)
    written_BKSH = jax.lax.fori_loop(0, rows, write_row, piece_BKSH, unroll=unroll)
    # Each device constrains its own shard: XLA:TPU would gather the whole array to constrain its layout.
    return on_each_device(row_major, [(None, "kv_heads")], (None, "kv_heads"), along=["kv_heads"])(written_BKSH)


def read_sizes(capacity: int, first: int) -> list[int]:
    """Return where the pieces end: at ``first``, at its doublings below the capacity, and at the capacity.

    Attention can read a prefix of any of these lengths.

    >>> read_sizes(1000, first=128)
    [128, 256, 512, 1000]
    """
    ends = (first << doublings for doublings in range(capacity.bit_length()))
    return [*(end for end in ends if end < capacity), capacity]


def on_gpu() -> bool:
    """Return whether the current program is traced for a GPU."""
    return target_platform() in ("gpu", "cuda")


def attend_cache(
    q_BTNH: jax.Array,
    cache: LayerCache,
    position_BT: jax.Array,
    filled: int | None = None,
    extra: tuple[jax.Array, jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Return ``out_BTNH``: each query attends to the cache slots up to its own position.

    The program chooses at run time how many pieces to read, the fewest that hold every position. So the bytes read grow
    with the text and not with the capacity. A prefill knows its number of positions, ``filled``, at trace time, and
    then needs no choice. Masks hide the slots after a query's position, where a rejected draft may have left keys.
    ``extra`` holds keys and values outside the cache, and which query sees them: ``k_BKSH, v_BKSH, visible_BTS``.
    """
    ends = list(itertools.accumulate(piece.shape[2] for piece in cache.k_BKSH))

    def attend_first(pieces: int, q_BTNH: jax.Array, cache: LayerCache, position_BT: jax.Array) -> jax.Array:
        visible_BTS = jnp.arange(ends[pieces - 1])[None, None, :] <= position_BT[:, :, None]
        k_BKSH, v_BKSH = cache.k_BKSH[:pieces], cache.v_BKSH[:pieces]
        if extra is not None:
            k_BKSH, v_BKSH = (*k_BKSH, extra[0]), (*v_BKSH, extra[1])
            visible_BTS = jnp.concatenate([visible_BTS, extra[2]], axis=2)
        return attend(q_BTNH, k_BKSH, v_BKSH, visible_BTS)

    if filled is not None:
        return attend_first(sum(end < filled for end in ends) + 1, q_BTNH, cache, position_BT)
    needed = jnp.max(position_BT) + 1
    choice = sum((needed > end).astype(jnp.int32) for end in ends[:-1])
    branches = [partial(attend_first, pieces) for pieces in range(1, len(ends) + 1)]
    return jax.lax.switch(choice, branches, q_BTNH, cache, position_BT)
