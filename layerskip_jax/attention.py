"""Attention: over packed documents in training, by the fastest backend that fits, and over a cache in decoding."""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention

from layerskip_jax.errors import UserError
from layerskip_jax.sharding import on_each_device, row_major, target_platform

SPLASH_TILE = 128
"""The length of splash attention's tiles must be a multiple of this, the lanes of a TPU vector [positions]."""

SAVED_OUTPUT = "attention output"
"""Checkpoint name of splash attention's output and log-sum-exp, for remat policies that save them."""


class LayerCache(NamedTuple):
    """Keys and values of one block for S positions, the capacity of the cache.

    The S axis is split into several arrays, the pieces. Attention reads as many of the first pieces as it needs, in
    place, while XLA would copy a slice of a single array. Heads come before positions, as attention's matmuls want.
    """

    k_BKSH: tuple[jax.Array, ...]
    v_BKSH: tuple[jax.Array, ...]

    @classmethod
    def empty(cls, batch: int, heads: int, capacity: int, head_dim: int, dtype: jnp.dtype) -> "LayerCache":
        """Return zeroed pieces that end at `read_sizes`."""
        # On a GPU, the switch in `attend_cache` waits for the host, which costs as much as reading 2,000 positions. A
        # cache of up to 4,096 positions is one piece: it needs no switch, and reads 2,000 unused positions on average.
        ends = read_sizes(capacity, first=4096 if on_gpu() else 128)
        shapes = [(batch, heads, end - start, head_dim) for start, end in zip([0, *ends], ends, strict=False)]
        return cls(tuple(jnp.zeros(s, dtype) for s in shapes), tuple(jnp.zeros(s, dtype) for s in shapes))


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


def attend_documents(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, backend: str
) -> jax.Array:
    """Return ``out_BTNH``: each position attends to itself and earlier positions of the same document.

    ``backend`` is `ModelConfig.attention`; the choice is made at trace time.
    """
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    match choose_backend(backend, target_platform(), T, H, q_BTNH.dtype):
        case "splash":
            return attend_splash(q_BTNH, k_BTKH, v_BTKH, segments_BT)
        case "cudnn":
            # cuDNN gets the documents as a [B, 1, T, T] bias, which doubles the kernel's time on an H100
            # (docs/results/h100.md). Its packed layout needs none, but JAX offers that in private functions only.
            same_B1TS = (segments_BT[:, :, None] == segments_BT[:, None, :])[:, None]
            return jax.nn.dot_product_attention(
                q_BTNH, k_BTKH, v_BTKH, mask=same_B1TS, is_causal=True, implementation="cudnn"
            )
        case _:
            return attend(q_BTNH, [k_BTKH.swapaxes(1, 2)], [v_BTKH.swapaxes(1, 2)], same_document(segments_BT))


def choose_backend(asked: str, platform: str, length: int, head_dim: int, dtype: jnp.dtype) -> str:
    """Return splash, cudnn or xla: ``asked``, or for auto the platform's kernel, and xla where that does not fit.

    >>> choose_backend("auto", "tpu", 4096, 128, jnp.bfloat16), choose_backend("auto", "tpu", 100, 128, jnp.bfloat16)
    ('splash', 'xla')

    Raises `UserError` if ``asked`` names a backend that does not support them.
    """
    own = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}
    backend = own.get(platform, "xla") if asked == "auto" else asked
    needs = {
        "splash": {
            f"a TPU, not {platform}": platform == "tpu",
            f"data.sequence_length in multiples of {SPLASH_TILE}, not {length}": length % SPLASH_TILE == 0,
        },
        "cudnn": {
            f"a GPU, not {platform}": platform in ("gpu", "cuda"),
            f"model.compute_dtype bfloat16, not {jnp.dtype(dtype).name}": dtype == jnp.bfloat16,
            f"an even data.sequence_length, not {length}": length % 2 == 0,
            f"model.dim / model.num_heads in multiples of 8 up to 128, not {head_dim}": (
                head_dim % 8 == 0 and head_dim <= 128
            ),
        },
    }
    unmet = [need for need, met in needs.get(backend, {}).items() if not met]
    if unmet and asked != "auto":
        raise UserError(f"model.attention {asked} needs {unmet[0]}; or use auto, which takes what fits")
    return "xla" if unmet else backend


def attend_splash(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, interpret: bool = False
) -> jax.Array:
    """Attend as `attend_documents` with the splash kernel for TPU, which never writes the scores to memory.

    Each device attends for its own sequences and heads. The kernel skips tiles above the diagonal, but not tiles
    between two documents. ``interpret`` runs it, slowly, on other platforms.
    """

    def on_device(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array) -> jax.Array:
        _, T, N, H = q_BTNH.shape
        tile = max(size for size in (SPLASH_TILE, 2 * SPLASH_TILE, 4 * SPLASH_TILE) if T % size == 0)
        # Made here, where N is the number of heads on this device. The kernel handles grouped queries itself.
        kernel = splash_attention.make_splash_mha_single_device(
            splash_attention.MultiHeadMask([splash_attention.CausalMask((T, T))] * N),
            block_sizes=splash_attention.BlockSizes(
                block_q=tile, block_kv=tile, block_q_dkv=tile, block_kv_dkv=tile, block_q_dq=tile, block_kv_dq=tile
            ),
            residual_checkpoint_name=SAVED_OUTPUT,
            interpret=interpret,
        )
        # The kernel does not divide by sqrt(H). Divide in float32, so that bfloat16 queries are rounded once.
        scaled_BTNH = (q_BTNH.astype(jnp.float32) * H**-0.5).astype(q_BTNH.dtype)
        out_BNTH = jax.vmap(kernel)(
            *(array.swapaxes(1, 2) for array in (scaled_BTNH, k_BTKH, v_BTKH)),
            splash_attention.SegmentIds(segments_BT, segments_BT),
        )
        return out_BNTH.swapaxes(1, 2)

    # Each device gets whole sequences and some of the heads. A mesh that shards sequences gathers them here.
    queries, keys = ("batch", None, "attended_heads", None), ("batch", None, "attended_kv_heads", None)
    split = on_each_device(on_device, [queries, keys, keys, ("batch", None)], queries)
    return split(q_BTNH, k_BTKH, v_BTKH, segments_BT)


def same_document(segments_BT: jax.Array) -> jax.Array:
    """Return ``visible_BTS`` for training: the position itself and earlier ones of the same document."""
    T = segments_BT.shape[1]
    causal_TS = jnp.tril(jnp.ones((T, T), bool))
    return causal_TS[None] & (segments_BT[:, :, None] == segments_BT[:, None, :])


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
    # Each row writes a window of T slots from slot_B on: the slots of its new positions, shifted into the piece if some
    # are outside. Slot t of the window gets new position source_BT[t], or keeps its value if that is not in [0, T).
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

    # One row at a time: XLA:CPU and XLA:TPU update a slice in place, but copy the whole piece for a scatter. In an
    # unrolled loop, XLA:CPU fuses a row's write into the next row's read, and copies the piece twice.
    rows = start_B.shape[0]
    unroll = 1 if target_platform() == "cpu" else min(8, rows)
    return row_major(jax.lax.fori_loop(0, rows, write_row, piece_BKSH, unroll=unroll))


def read_sizes(capacity: int, first: int = 128) -> list[int]:
    """Return the lengths of the prefixes that attention can read, where the pieces end: doublings of ``first``, and S.

    >>> read_sizes(1000)
    [128, 256, 512, 1000]
    """
    ends = (first << doublings for doublings in range(capacity.bit_length()))
    return [*(end for end in ends if end < capacity), capacity]


def on_gpu() -> bool:
    """Return whether the current program is traced for a GPU."""
    return target_platform() in ("gpu", "cuda")


def attend_cache(q_BTNH: jax.Array, cache: LayerCache, position_BT: jax.Array, filled: int | None = None) -> jax.Array:
    """Return ``out_BTNH``: each query attends to the cache slots up to its own position.

    The program chooses at run time how many pieces to read, the fewest that hold every position. So the bytes read grow
    with the text and not with the capacity. A prefill knows its number of positions, ``filled``, at trace time, and
    then needs no choice. Masks hide the slots after a query's position, where a rejected draft may have left keys.
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
