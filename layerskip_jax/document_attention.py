"""Attention over packed documents, for training, by the fastest backend that fits."""

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention

from layerskip_jax.attention import attend
from layerskip_jax.errors import UserError
from layerskip_jax.sharding import on_each_device, target_platform

SPLASH_TILE = 128
"""Splash attention needs tiles of a multiple of 128 positions, the number of lanes of a TPU vector register."""

LARGEST_TILE = 512
"""The largest tile that splash attention uses; ``python -m benchmarks.splash_tiles`` compares others."""

SAVED_OUTPUT = "attention output"
"""Checkpoint name of splash attention's output and log-sum-exp, for remat policies that save them."""


def attend_documents(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, backend: str
) -> jax.Array:
    """Return ``out_BTNH``: each position attends to itself and earlier positions of the same document.

    ``backend`` is `ModelConfig.attention`; the choice is made at trace time.
    """
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    same_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
    match choose_backend(backend, target_platform(), T, H, q_BTNH.dtype):
        case "splash":
            return attend_splash(q_BTNH, k_BTKH, v_BTKH, segments_BT)
        case "cudnn":
            # cuDNN gets the documents as a [B, 1, T, T] bias, which doubles the kernel's time on an H100
            # (docs/results/h100.md). Its packed layout needs none, but JAX offers that in private functions only.
            return jax.nn.dot_product_attention(
                q_BTNH, k_BTKH, v_BTKH, mask=same_BTS[:, None], is_causal=True, implementation="cudnn"
            )
        case _:
            visible_BTS = same_BTS & jnp.tril(jnp.ones((T, T), bool))[None]
            return attend(q_BTNH, [k_BTKH.swapaxes(1, 2)], [v_BTKH.swapaxes(1, 2)], visible_BTS)


def choose_backend(asked: str, platform: str, length: int, head_dim: int, dtype: jnp.dtype) -> str:
    """Return the backend: splash, cudnn or xla. ``auto`` takes the platform's kernel, or xla if that does not fit.

    >>> choose_backend("auto", "tpu", 4096, 128, jnp.bfloat16), choose_backend("auto", "tpu", 100, 128, jnp.bfloat16)
    ('splash', 'xla')

    Raises `UserError` if ``asked`` names a backend that does not support the platform, length, head width or dtype.
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
            f"model.head_width (or model.dim / model.num_heads) in multiples of 8 up to 128, not {head_dim}": (
                head_dim % 8 == 0 and head_dim <= 128
            ),
        },
    }
    unmet = [need for need, met in needs.get(backend, {}).items() if not met]
    if unmet and asked != "auto":
        raise UserError(f"model.attention {asked} needs {unmet[0]}; or use auto, which takes what fits")
    return "xla" if unmet else backend


def attend_splash(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    interpret: bool = False,
    largest_tile: int = LARGEST_TILE,
) -> jax.Array:
    """Attend as `attend_documents` with the splash kernel for TPU, which never writes the scores to memory.

    Each device attends for its own sequences and heads. The kernel skips tiles above the diagonal, but not tiles
    between two documents. A tile has ``largest_tile`` positions (a power of two), halved until it divides T.
    ``interpret`` runs the kernel, slowly, on other platforms.
    """

    def on_device(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array) -> jax.Array:
        _, T, N, H = q_BTNH.shape
        tile = math.gcd(T, largest_tile)
        # Made here, where N is the number of heads on this device. The kernel handles grouped queries itself.
        kernel = splash_attention.make_splash_mha_single_device(
            splash_attention.MultiHeadMask([splash_attention.CausalMask((T, T))] * N),
            block_sizes=splash_attention.BlockSizes(
                block_q=tile, block_kv=tile, block_q_dkv=tile, block_kv_dkv=tile, block_q_dq=tile, block_kv_dq=tile
            ),
            residual_checkpoint_name=SAVED_OUTPUT,
            interpret=interpret,
        )
        # The kernel does not divide by sqrt(H). Scale in float32: in bfloat16, H**-0.5 itself would be rounded too.
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
