"""A Llama-style decoder in Flax NNX, and the one forward pass of the project.

Legend of shape suffixes: B batch, T positions in, S positions attended to (cache slots), D width of the residual
stream, N query heads, K key/value heads, G = N/K, H head dimension, F feed-forward width, V vocabulary, L blocks,
E blocks before the exit.

Modules hold `nnx.Param`s and nothing else, so they are plain pytrees: `jax.jit`, `jax.grad`, `lax.scan` and
`lax.while_loop` take them as they are. `Transformer.blocks` is one `Block` whose parameters have a leading layer
axis (training, where a scan compiles once for all depths) or, after `unstacked`, a list of blocks (decoding, where a
slice of a stack would copy weights).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from layerskip_jax.attention import LayerCache, attend_cache, attend_documents, write_cache
from layerskip_jax.config import ModelConfig
from layerskip_jax.errors import UserError
from layerskip_jax.sharding import constrain, target_platform

LayerStep = Callable[["Block", Any, Any], tuple[Any, Any]]
"""``(block, x, inputs_l) -> (x, outputs_l)``: what happens at one block; x is ``x_BTD``, or goes with it in a tuple."""


Head = tuple[nnx.Param, nnx.Param]
"""The parameters of g: ``final_norm_D``, and ``head_DV`` (or ``embedding_VD``, if tied)."""


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """Return the type of activations: as configured, or bfloat16 on accelerators and float32 on CPU."""
    if config.compute_dtype == "auto":
        return jnp.dtype(jnp.float32 if target_platform() == "cpu" else jnp.bfloat16)
    return jnp.dtype(config.compute_dtype)


def parameter(
    key: jax.Array, shape: tuple[int, ...], axes: tuple[str, ...], fan_in: int, gain: float = 1.0
) -> nnx.Param:
    """Make a float32 matrix, normal with standard deviation ``gain / sqrt(fan_in)``, and name its logical axes."""
    return nnx.Param(jax.random.normal(key, shape) * gain * fan_in**-0.5, axes=axes)


def rms_norm(x_BTD: jax.Array, scale_D: nnx.Param, epsilon: float) -> jax.Array:
    """``x / sqrt(mean(x^2) + epsilon) * scale``, the mean in float32."""
    x32_BTD = x_BTD.astype(jnp.float32)
    inverse_BT1 = jax.lax.rsqrt(jnp.mean(x32_BTD * x32_BTD, axis=-1, keepdims=True) + epsilon)
    return (x32_BTD * inverse_BT1 * scale_D[...][None, None]).astype(x_BTD.dtype)


def rotary_frequencies(config: ModelConfig) -> jax.Array:
    """``base^(-2i/H)`` for i below H/2 (RoFormer, arXiv 2104.09864 section 3.2.2), scaled for long texts [rad a token].

    "linear" divides all by the factor (arXiv 2306.15595). "llama3" keeps those of at least ``rope_high_turns`` turns in
    ``rope_original_length``, divides those of at most ``rope_low_turns``, and blends in between (Llama 3.1).
    """
    half = config.head_dim // 2
    frequency_H = config.rope_base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if config.rope_scaling == "none":
        return frequency_H
    kept_H = jnp.zeros(half)
    if config.rope_scaling == "llama3":
        turns_H = frequency_H * (config.rope_original_length / (2 * math.pi))
        low, high = config.rope_low_turns, config.rope_high_turns
        kept_H = jnp.clip((turns_H - low) / (high - low), 0, 1)
    return frequency_H * (kept_H + (1 - kept_H) / config.rope_factor)


class Positions(NamedTuple):
    """Where tokens stand, with what turns a head's H dimensions there (see `rotate`), which all blocks share."""

    index_BT: jax.Array
    sin_BT1H: jax.Array  # with the sign: the first half's are negative
    cos_BT1H: jax.Array

    @classmethod
    def at(cls, index_BT: jax.Array, frequency_H: jax.Array) -> "Positions":
        """``angle_i = angle_{i + H/2} = index * frequency_i``, for i below H/2."""
        angle_BT1H = index_BT[:, :, None, None].astype(jnp.float32) * frequency_H[None, None, None]
        sin_BT1H, cos_BT1H = jnp.sin(angle_BT1H), jnp.cos(angle_BT1H)
        turns = jnp.concatenate([-sin_BT1H, sin_BT1H], axis=-1), jnp.concatenate([cos_BT1H, cos_BT1H], axis=-1)
        # Without the barrier XLA fuses them into every use, and computes them anew in each block.
        return cls(index_BT, *jax.lax.optimization_barrier(turns))

    def first(self, count: int) -> "Positions":
        """Return the first ``count`` positions of each row."""
        return Positions(*(array[:, :count] for array in self))


def rotate(x_BTNH: jax.Array, position: Positions) -> jax.Array:
    """Rotary positions (RoFormer, eq. 34): dimension i pairs with i + H/2, as in Llama checkpoints."""
    half = x_BTNH.shape[-1] // 2
    if target_platform() == "tpu":
        # Half a head would leave half of a TPU's registers empty. Its matrix unit swaps the halves at almost no cost.
        swap_HH = jnp.roll(jnp.eye(2 * half, dtype=x_BTNH.dtype), half, axis=1)
        swapped_BTNH = jnp.matmul(x_BTNH, swap_HH, precision=jax.lax.Precision.HIGHEST)  # float32 stays exact
    else:
        swapped_BTNH = jnp.roll(x_BTNH, half, axis=-1)
    turned_BTNH = x_BTNH.astype(jnp.float32) * position.cos_BT1H + swapped_BTNH.astype(jnp.float32) * position.sin_BT1H
    return turned_BTNH.astype(x_BTNH.dtype)


class Block(nnx.Module):
    """``f_l``: attention and feed-forward with their norms, *without* the residual around the whole (eq. 1)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, N, K, H, F = config.dim, config.num_heads, config.num_kv_heads, config.head_dim, config.ffn_dim
        # Outputs onto the residual stream start smaller, so that its variance does not grow with depth (GPT-2, 2.3).
        out = (2 * config.num_layers) ** -0.5
        self.attention_norm_D = nnx.Param(jnp.ones(D), axes=("embed",))
        self.query_DNH = parameter(rngs.params(), (D, N, H), ("embed", "heads", "head_dim"), D)
        self.key_DKH = parameter(rngs.params(), (D, K, H), ("embed", "kv_heads", "head_dim"), D)
        self.value_DKH = parameter(rngs.params(), (D, K, H), ("embed", "kv_heads", "head_dim"), D)
        self.output_NHD = parameter(rngs.params(), (N, H, D), ("heads", "head_dim", "embed"), D, out)
        self.ffn_norm_D = nnx.Param(jnp.ones(D), axes=("embed",))
        self.gate_DF = parameter(rngs.params(), (D, F), ("embed", "ffn"), D)
        self.up_DF = parameter(rngs.params(), (D, F), ("embed", "ffn"), D)
        self.down_FD = parameter(rngs.params(), (F, D), ("ffn", "embed"), F, out)
        self.epsilon, self.attention = config.norm_epsilon, config.attention

    def __call__(
        self,
        x_BTD: jax.Array,
        position: Positions,
        segments_BT: jax.Array | None = None,
        cache: LayerCache | None = None,
        filled: int | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Return ``f_l(x)``, and the cache with the keys and values of ``position`` (consecutive in each row).

        Without a cache, attention sees what came before in the same document (``segments_BT``); with one, the cache up
        to each position (``filled``, for positions from 0 on, as in `attend_cache`).
        """
        dtype = x_BTD.dtype
        h_BTD = rms_norm(x_BTD, self.attention_norm_D, self.epsilon)
        q_BTNH, k_BTKH, v_BTKH = self.queries_keys_values(h_BTD)
        q_BTNH, k_BTKH = rotate(q_BTNH, position), rotate(k_BTKH, position)
        if cache is None:
            assert segments_BT is not None
            attended_BTNH = attend_documents(q_BTNH, k_BTKH, v_BTKH, segments_BT, self.attention)
        else:
            start_B = position.index_BT[:, 0] if filled is None else None
            cache = write_cache(cache, k_BTKH, v_BTKH, start_B)
            attended_BTNH = attend_cache(q_BTNH, cache, position.index_BT, filled)
        output_NHD = self.output_NHD[...].astype(dtype)
        if target_platform() == "tpu":
            # The kernel's output has heads before positions: contracting over both axes reads it without a transpose.
            attention_BTD = jnp.einsum("BTNH,NHD->BTD", attended_BTNH, output_NHD)
        else:  # XLA:CPU would transpose the weights for that, at every token
            attended_BTM = attended_BTNH.reshape(*attended_BTNH.shape[:2], -1)
            attention_BTD = attended_BTM @ output_NHD.reshape(-1, x_BTD.shape[-1])

        h_BTD = rms_norm(x_BTD + attention_BTD, self.ffn_norm_D, self.epsilon)
        gate_BTF, up_BTF = self.gate_up(h_BTD)
        ffn_BTD = jnp.einsum("BTF,FD->BTD", jax.nn.silu(gate_BTF) * up_BTF, self.down_FD[...].astype(dtype))
        return attention_BTD + ffn_BTD, cache

    def propagate(self, x_BTD: jax.Array, position: Positions, cache: LayerCache) -> LayerCache:
        """Write the keys and values of ``x`` and run nothing else (state propagation, arXiv 2207.07061 section 3.1).

        This is how a token that has left before this block lets later tokens attend to it here.
        """
        h_BTD = rms_norm(x_BTD, self.attention_norm_D, self.epsilon)
        _, k_BTKH, v_BTKH = self.queries_keys_values(h_BTD)
        return write_cache(cache, rotate(k_BTKH, position), v_BTKH, position.index_BT[:, 0])

    def queries_keys_values(self, h_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return ``q_BTNH, k_BTKH, v_BTKH``, not yet rotated."""
        project = partial(jnp.einsum, "BTD,DNH->BTNH", h_BTD)
        q_BTNH, k_BTKH, v_BTKH = (
            project(matrix[...].astype(h_BTD.dtype)) for matrix in (self.query_DNH, self.key_DKH, self.value_DKH)
        )
        return q_BTNH, k_BTKH, v_BTKH

    def gate_up(self, h_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return ``gate_BTF, up_BTF`` of SwiGLU."""
        dtype = h_BTD.dtype
        return h_BTD @ self.gate_DF[...].astype(dtype), h_BTD @ self.up_DF[...].astype(dtype)


class DecodingBlock(Block):
    """A block whose matrices that read the same input lie side by side, so that they are one product.

    A product of a few tokens costs a fixed part and the reading of the weights. (Training keeps them apart: under
    tensor parallelism each has its own split.)
    """

    def __init__(self, block: Block):
        D, N, H = block.query_DNH.shape
        self.query_heads, self.head_dim = N, H
        beside = lambda *matrices: nnx.Param(  # noqa: E731
            jnp.concatenate([matrix[...].reshape(D, -1) for matrix in matrices], axis=1)
        )
        self.attention_norm_D, self.ffn_norm_D = block.attention_norm_D, block.ffn_norm_D
        self.query_key_value_DM = beside(block.query_DNH, block.key_DKH, block.value_DKH)
        self.output_NHD = block.output_NHD
        self.gate_up_DM = beside(block.gate_DF, block.up_DF)
        self.down_FD = block.down_FD
        self.epsilon, self.attention = block.epsilon, block.attention

    def queries_keys_values(self, h_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        together_BTM = h_BTD @ self.query_key_value_DM[...].astype(h_BTD.dtype)
        together_BTNH = together_BTM.reshape(*h_BTD.shape[:2], -1, self.head_dim)
        q_BTNH, keys_values_BTKH = jnp.split(together_BTNH, [self.query_heads], axis=2)
        k_BTKH, v_BTKH = jnp.split(keys_values_BTKH, 2, axis=2)
        return q_BTNH, k_BTKH, v_BTKH

    def gate_up(self, h_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        gate_BTF, up_BTF = jnp.split(h_BTD @ self.gate_up_DM[...].astype(h_BTD.dtype), 2, axis=-1)
        return gate_BTF, up_BTF


def run_layers(
    blocks: "Block | Sequence[Block]",
    x: Any,
    step: LayerStep,
    inputs: Any,
    first: int = 0,
    last: int | None = None,
) -> tuple[Any, Any]:
    """Run blocks ``first`` to ``last`` (exclusive): ``x, outputs_l = step(block_l, x, inputs_l)`` for each.

    This is the one forward pass. Training calls it on stacked blocks, where ``inputs`` and the returned outputs have
    a leading layer axis (dropout draws and exit weights in, exit losses out). Decoding calls it on a list of blocks,
    where both are lists (the cache in, the cache out): the draft on [0, E), the verification on [E, L).
    """
    if isinstance(blocks, Block):
        if (first, last) != (0, None):
            raise ValueError("a part of stacked blocks would copy their weights; use Transformer.unstacked()")
        return jax.lax.scan(lambda x, layer: step(layer[0], x, layer[1]), x, (blocks, inputs))
    outputs = []
    for block, layer_inputs in zip(blocks[first:last], inputs, strict=True):
        x, output = step(block, x, layer_inputs)
        outputs.append(output)
    return x, outputs


class Transformer(nnx.Module):
    """Embedding, L blocks, and the head g that every exit shares (final norm and unembedding)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, V = config.dim, config.vocab_size
        self.embedding_VD = parameter(rngs.params(), (V, D), ("vocab", "embed"), D)
        keys_L = jax.random.split(rngs.params(), config.num_layers)
        self.blocks: Any = jax.vmap(lambda key: Block(config, rngs=nnx.Rngs(key)))(keys_L)
        self.final_norm_D = nnx.Param(jnp.ones(D), axes=("embed",))
        if not config.tied_embedding:
            self.head_DV = parameter(rngs.params(), (D, V), ("embed", "vocab"), D)
        self.config = config

    def positions(self, index_BT: jax.Array) -> Positions:
        """Return what the blocks want to know of positions ``index_BT``."""
        return Positions.at(index_BT, rotary_frequencies(self.config))

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """Return ``x_0``: the embeddings of ``tokens_BT``, in the compute type."""
        x_BTD = self.embedding_VD[...][tokens_BT].astype(compute_dtype(self.config))
        return constrain(x_BTD, "batch", "length", None)

    def head(self) -> Head:
        """Return the parameters of g: the final norm, and the head or the embedding that serves as one."""
        return self.final_norm_D, self.embedding_VD if self.config.tied_embedding else self.head_DV

    def unembed(self, x_BTD: jax.Array) -> jax.Array:
        """``g(x)``: final norm and head, the same for every exit; returns float32 ``logits_BTV``."""
        return unembed(self.config, self.head(), x_BTD)

    def unstacked(self) -> "Transformer":
        """Return the same model with `blocks` as a list, each a `DecodingBlock`, and matrices in the compute type.

        One copy of the weights now, and none at every token.
        """
        dtype, layers = compute_dtype(self.config), range(self.config.num_layers)
        cast = partial(jax.tree.map, lambda leaf: leaf.astype(dtype) if leaf.ndim > 1 else leaf)
        model = nnx.merge(*nnx.split(self))
        model.blocks = nnx.List([DecodingBlock(cast(jax.tree.map(itemgetter(layer), self.blocks))) for layer in layers])
        return cast(model)

    def __call__(self, tokens_BT: jax.Array, segments_BT: jax.Array | None = None) -> jax.Array:
        """Return ``logits_BTV`` of the full model, without a cache."""
        segments_BT = jnp.ones_like(tokens_BT) if segments_BT is None else segments_BT
        position = self.positions(jnp.arange(tokens_BT.shape[1])[None])

        def step(block: Block, x_BTD: jax.Array, inputs: None) -> tuple[jax.Array, None]:
            return x_BTD + block(x_BTD, position, segments_BT)[0], None

        inputs = None if isinstance(self.blocks, Block) else [None] * self.config.num_layers
        return self.unembed(run_layers(self.blocks, self.embed(tokens_BT), step, inputs)[0])

    def first_layers(self, exit_layer: int) -> "Transformer":
        """Return the model that leaves at ``exit_layer``: blocks [0, E) of an `unstacked` model, sharing weights."""
        if not 1 <= exit_layer <= self.config.num_layers:
            raise UserError(f"exit layer {exit_layer} must be in 1..{self.config.num_layers}, the model's layers")
        graph, state = nnx.split(self)
        early = nnx.merge(graph, state)
        early.blocks = nnx.List(list(self.blocks)[:exit_layer])
        early.config = dataclasses.replace(self.config, num_layers=exit_layer)
        return early

    def run_cached(
        self,
        x_BTD: jax.Array,
        position: Positions,
        cache: list[LayerCache],
        first: int,
        last: int,
        *,
        filled: int | None = None,
    ) -> tuple[jax.Array, list[LayerCache]]:
        """Run blocks [first, last) of an `unstacked` model at ``position``, reading and writing their caches.

        ``cache`` has an entry for every block of the model; the returned list too. ``filled`` as in `Block`.
        """

        def step(block: Block, x_BTD: jax.Array, layer: LayerCache) -> tuple[jax.Array, LayerCache]:
            delta_BTD, written = block(x_BTD, position, cache=layer, filled=filled)
            assert written is not None
            return x_BTD + delta_BTD, written

        x_BTD, written = run_layers(self.blocks, x_BTD, step, cache[first:last], first, last)
        return x_BTD, [*cache[:first], *written, *cache[last:]]


def unembed(config: ModelConfig, head: Head, x_BTD: jax.Array) -> jax.Array:
    """Return ``logits_BTV = g(x)`` in float32, for a ``head`` that need not be the model's own arrays."""
    norm_D, matrix = head
    h_BTD = rms_norm(x_BTD, norm_D, config.norm_epsilon)
    equation = "BTD,VD->BTV" if config.tied_embedding else "BTD,DV->BTV"
    logits_BTV = jnp.einsum(equation, h_BTD, matrix[...].astype(h_BTD.dtype), preferred_element_type=jnp.float32)
    return constrain(logits_BTV, "batch", "length", "vocab")


def empty_cache(config: ModelConfig, batch: int, capacity: int) -> list[LayerCache]:
    """Return zeroed keys and values of every block for ``capacity`` positions, in the compute type."""
    K, H, dtype = config.num_kv_heads, config.head_dim, compute_dtype(config)
    return [LayerCache.empty(batch, K, capacity, H, dtype) for _ in range(config.num_layers)]


def parameter_count(config: ModelConfig) -> int:
    """Return the number of parameters, embedding and head included."""
    attention = config.dim * config.head_dim * 2 * (config.num_heads + config.num_kv_heads)
    block = attention + 3 * config.dim * config.ffn_dim + 2 * config.dim
    tables = config.vocab_size * config.dim * (1 if config.tied_embedding else 2)
    return config.num_layers * block + tables + config.dim
