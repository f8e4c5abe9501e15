"""A Llama-style decoder in Flax NNX, and the one forward pass of the project.

Legend of shape suffixes:
    B  sequences in a batch            D  width of the residual stream      L  blocks; also exits
    T  positions in a sequence         F  feed-forward width                E  blocks before the exit that drafts
    S  positions in the cache          V  vocabulary                        X  candidate exits
    C  positions in a chunk            N  query heads                       d  most drafted tokens in a round
    W  positions that are verified     K  key and value heads               Q  d + 1, positions of a round
    A  microbatches                    G  query heads per key head, N / K   R  rows of a loop, or of a matrix
    P  positions of a prompt           H  width of a head                   M  several axes flattened
    1  an axis of size one, kept for broadcasting                           I  groups of J rows (recipe/skipping.py)
    C also: choices at a position (decoding/branching.py)                   M also: lengths of a match (hybrid.py)

The arrays of a module are `nnx.Param`s, and its other attributes are static, so modules are plain pytrees: `jax.jit`,
`jax.grad`, `lax.scan` and `lax.while_loop` take them directly. `Transformer.blocks` has two forms. For training it is
one `Block` whose parameters have a leading layer axis: a scan over it compiles once for all depths. For decoding,
`unstacked` makes it a list of blocks, because slicing a stack would copy weights.
"""

import dataclasses
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layerskip_jax.cache import LayerCache, write_cache
from layerskip_jax.checks import require, require_exits
from layerskip_jax.config import ModelConfig
from layerskip_jax.document_attention import attend_documents
from layerskip_jax.rope import RotaryTables, rotary_frequencies, rotate
from layerskip_jax.sharding import constrain, mesh_size, on_each_device, row_major, target_platform

BlockFn = Callable[["Block", Any, Any], tuple[Any, Any]]
"""``(block, x, inputs_l) -> (x, outputs_l)``: one block; x is ``x_BTD``, or a tuple that starts with it."""

Head = tuple[nnx.Param, nnx.Param]
"""The parameters of the shared head g: ``final_norm_D``, and ``head_DV`` (``embedding_VD`` if tied)."""


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """Return the dtype of activations: the configured one; for "auto" bfloat16 on accelerators and float32 on CPU."""
    if config.compute_dtype == "auto":
        return jnp.dtype(jnp.float32 if target_platform() == "cpu" else jnp.bfloat16)
    return jnp.dtype(config.compute_dtype)


def parameter(
    key: jax.Array, shape: tuple[int, ...], axes: tuple[str, ...], fan_in: int, gain: float = 1.0
) -> nnx.Param:
    """Initialize a float32 matrix from N(0, gain^2 / fan_in), and name its logical axes."""
    return nnx.Param(jax.random.normal(key, shape) * gain * fan_in**-0.5, axes=axes)


def rms_norm(x_BTD: jax.Array, scale_D: nnx.Param, epsilon: float) -> jax.Array:
    """``x / sqrt(mean(x^2) + epsilon) * scale``, the mean in float32."""
    x32_BTD = x_BTD.astype(jnp.float32)
    inverse_BT1 = jax.lax.rsqrt(jnp.mean(x32_BTD * x32_BTD, axis=-1, keepdims=True) + epsilon)
    return (x32_BTD * inverse_BT1 * scale_D[...][None, None]).astype(x_BTD.dtype)


def project(equation: str, x_BTM: jax.Array, matrix: jax.Array, **options: Any) -> jax.Array:
    """Return ``einsum(equation, x, matrix)`` after casting a weight matrix to the dtype of ``x``."""
    T = x_BTM.shape[1]
    if target_platform() == "tpu" and len(x_BTM) * T == 1:
        # Pad one row to two. XLA:TPU multiplies one row on the vector unit, at a quarter of HBM bandwidth (estimated).
        x_BTM = jnp.pad(x_BTM, [(0, 0), (0, 1), *[(0, 0)] * (x_BTM.ndim - 2)])
    return jnp.einsum(equation, x_BTM, matrix.astype(x_BTM.dtype), **options)[:, :T]


class Block(nnx.Module):
    """``f_l`` of eq. 1: attention and feed-forward with their norms, *without* the residual connection around both."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, N, K, H, F = config.dim, config.num_heads, config.num_kv_heads, config.head_dim, config.ffn_dim
        # Scale down the outputs onto the residual stream, so that its variance does not grow with depth (GPT-2, 2.3).
        out = (2 * config.num_layers) ** -0.5
        self.attention_norm_D = nnx.Param(jnp.ones(D), axes=("embed",))
        self.query_DNH = parameter(rngs.params(), (D, N, H), ("embed", "heads", "head_dim"), D)
        self.key_DKH = parameter(rngs.params(), (D, K, H), ("embed", "kv_heads", "head_dim"), D)
        self.value_DKH = parameter(rngs.params(), (D, K, H), ("embed", "kv_heads", "head_dim"), D)
        self.output_NHD = parameter(rngs.params(), (N, H, D), ("heads", "head_dim", "embed"), N * H, out)
        self.ffn_norm_D = nnx.Param(jnp.ones(D), axes=("embed",))
        self.gate_DF = parameter(rngs.params(), (D, F), ("embed", "ffn"), D)
        self.up_DF = parameter(rngs.params(), (D, F), ("embed", "ffn"), D)
        self.down_FD = parameter(rngs.params(), (F, D), ("ffn", "embed"), F, out)
        self.epsilon, self.attention = config.norm_epsilon, config.attention

    def __call__(
        self,
        x_BTD: jax.Array,
        rotary: RotaryTables,
        segments_BT: jax.Array | None = None,
        cache: LayerCache | None = None,
        filled: int | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Return ``f_l(x)``, and the cache with the keys and values of these positions written.

        Without a cache, a position attends to earlier ones of its document (``segments_BT``). With a cache, positions
        are consecutive and attend to the slots up to themselves. An object with another ``attend`` method, such as
        `branching.NodeCache`, can make other slots visible. ``filled`` is for a prefill from position 0: the static
        number of slots to read.
        """
        h_BTD = rms_norm(x_BTD, self.attention_norm_D, self.epsilon)
        q_BTNH, k_BTKH, v_BTKH = self.queries_keys_values(h_BTD)
        q_BTNH, k_BTKH = rotate(q_BTNH, rotary), rotate(k_BTKH, rotary)
        if cache is None:
            assert segments_BT is not None
            attended_BTNH = attend_documents(q_BTNH, k_BTKH, v_BTKH, segments_BT, self.attention)
        else:
            attended_BTNH, cache = cache.attend(q_BTNH, k_BTKH, v_BTKH, rotary.index_BT, filled)
        if target_platform() == "tpu":
            # The kernel's output has heads before positions. Contracting over N and H reads it without a transpose.
            attention_BTD = project("BTNH,NHD->BTD", attended_BTNH, self.output_NHD[...])
        else:  # XLA:CPU would transpose the weights for that einsum at every token
            attended_BTM = attended_BTNH.reshape(*attended_BTNH.shape[:2], -1)
            attention_BTD = project("BTM,MD->BTD", attended_BTM, self.output_NHD[...].reshape(-1, x_BTD.shape[-1]))

        h_BTD = rms_norm(x_BTD + attention_BTD, self.ffn_norm_D, self.epsilon)
        gate_BTF, up_BTF = self.gate_up(h_BTD)
        ffn_BTD = project("BTF,FD->BTD", jax.nn.silu(gate_BTF) * up_BTF, self.down_FD[...])
        return attention_BTD + ffn_BTD, cache

    def propagate(self, x_BTD: jax.Array, rotary: RotaryTables, cache: LayerCache) -> LayerCache:
        """Write the keys and values of ``x``, and compute nothing else (state propagation: CALM, arXiv 2207.07061).

        Later tokens can then attend, in this block, to a token that exited before it.
        """
        h_BTD = rms_norm(x_BTD, self.attention_norm_D, self.epsilon)
        _, k_BTKH, v_BTKH = self.queries_keys_values(h_BTD)
        return write_cache(cache, rotate(k_BTKH, rotary), v_BTKH, rotary.index_BT[:, 0])

    def queries_keys_values(self, h_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return ``q_BTNH, k_BTKH, v_BTKH``, not yet rotated."""
        weights = self.query_DNH, self.key_DKH, self.value_DKH
        q_BTNH, k_BTKH, v_BTKH = (project("BTD,DNH->BTNH", h_BTD, weight[...]) for weight in weights)
        return q_BTNH, k_BTKH, v_BTKH

    def gate_up(self, h_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return ``gate_BTF, up_BTF`` of SwiGLU."""
        return project("BTD,DF->BTF", h_BTD, self.gate_DF[...]), project("BTD,DF->BTF", h_BTD, self.up_DF[...])


SPLIT = (None, None, "heads")
"""How tensor parallelism shards the outputs of the merged matrices of `DecodingBlock`."""


class DecodingBlock(Block):
    """A block with query, key and value in one matrix, and gate and up in another.

    With a few tokens, a matmul costs a fixed overhead and the time to read its weights, so fewer matmuls are faster.
    Tensor parallelism splits the columns of the merged matrices. Each device must hold the heads that it attends with,
    so the columns come device by device, first its queries, then its keys and its values.
    """

    def __init__(self, block: Block):
        D, N, self.head_dim = block.query_DNH.shape
        self.group, self.devices = N // block.key_DKH.shape[1], mesh_size("heads")

        def merged(*matrices: nnx.Param) -> nnx.Param:
            parts = [matrix[...].reshape(D, self.devices, -1) for matrix in matrices]
            return nnx.Param(jnp.concatenate(parts, axis=2).reshape(D, -1), axes=("embed", "heads"))

        self.attention_norm_D, self.ffn_norm_D = block.attention_norm_D, block.ffn_norm_D
        self.query_key_value_DM = merged(block.query_DNH, block.key_DKH, block.value_DKH)
        self.gate_up_DM = merged(block.gate_DF, block.up_DF)
        self.output_NHD, self.down_FD = block.output_NHD, block.down_FD
        self.epsilon, self.attention = block.epsilon, block.attention

    def queries_keys_values(self, h_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        def split(qkv_BTM: jax.Array) -> tuple[jax.Array, ...]:
            qkv_BTNH = row_major(qkv_BTM).reshape(*qkv_BTM.shape[:2], -1, self.head_dim)
            K = qkv_BTNH.shape[2] // (self.group + 2)
            return tuple(jnp.split(qkv_BTNH, [self.group * K, (self.group + 1) * K], axis=2))

        # On another number of devices, each would take the columns of other heads, and the text would be wrong.
        require(
            mesh_size("heads") == self.devices,
            f"the model was prepared by unstacked() for {self.devices} device(s) along the tensor axis, and runs on "
            f"{mesh_size('heads')}: call unstacked() and generate in the same tensor_parallel()",
        )
        qkv_BTM = project("BTD,DM->BTM", h_BTD, self.query_key_value_DM[...])
        return on_each_device(split, [SPLIT], [SPLIT] * 3, along=["heads"])(qkv_BTM)

    def gate_up(self, h_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        halve = on_each_device(lambda x_BTM: tuple(jnp.split(x_BTM, 2, axis=-1)), [SPLIT], [SPLIT] * 2, along=["heads"])
        return halve(project("BTD,DM->BTM", h_BTD, self.gate_up_DM[...]))


def run_layers(
    blocks: "Block | Sequence[Block]", x: Any, block_fn: BlockFn, inputs: Any, first: int = 0, last: int | None = None
) -> tuple[Any, Any]:
    """Run blocks [first, last): ``x, outputs_l = block_fn(block_l, x, inputs_l)`` for each.

    This is the one forward pass. Training calls it on stacked blocks. Then ``inputs`` and the returned outputs have a
    leading layer axis: dropout masks and exit weights go in, and in evaluation exit losses come out. Decoding calls it
    on a list of blocks; ``inputs`` and outputs are then lists of caches. The draft runs [0, E), the verification
    [E, L). ``inputs`` may be None.
    """
    if isinstance(blocks, Block):
        if (first, last) != (0, None):
            raise ValueError("running a part of stacked blocks would copy their weights; use Transformer.unstacked()")
        return jax.lax.scan(lambda x, layer: block_fn(layer[0], x, layer[1]), x, (blocks, inputs))
    outputs, part = [], blocks[first:last]
    for block, layer_inputs in zip(part, [None] * len(part) if inputs is None else inputs, strict=True):
        x, output = block_fn(block, x, layer_inputs)
        outputs.append(output)
    return x, outputs


class Transformer(nnx.Module):
    """Embedding, L blocks, and the head g that every exit shares (final norm and unembedding)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, V, L = config.dim, config.vocab_size, config.num_layers
        self.embedding_VD = parameter(rngs.params(), (V, D), ("vocab", "embed"), D)
        self.blocks: Any = jax.vmap(lambda key: Block(config, rngs=nnx.Rngs(key)))(jax.random.split(rngs.params(), L))
        self.final_norm_D = nnx.Param(jnp.ones(D), axes=("embed",))
        if not config.tied_embedding:
            self.head_DV = parameter(rngs.params(), (D, V), ("embed", "vocab"), D)
        self.config = config

    def rotary_tables(self, index_BT: jax.Array) -> RotaryTables:
        """Precompute the rotary tables for positions ``index_BT``; all blocks share them."""
        return RotaryTables.at(index_BT, rotary_frequencies(self.config))

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """Return ``x_0``: the embeddings of ``tokens_BT``, in the compute dtype."""
        x_BTD = self.embedding_VD[...][tokens_BT].astype(compute_dtype(self.config))
        return constrain(x_BTD, "batch", "length", None)

    def head(self) -> Head:
        """Return the parameters of g: the final norm, and the head matrix (the embedding, if tied)."""
        return self.final_norm_D, self.embedding_VD if self.config.tied_embedding else self.head_DV

    def unembed(self, x_BTD: jax.Array) -> jax.Array:
        """Return float32 ``logits_BTV = g(x)``: the final norm and the head, which all exits share."""
        return unembed(self.config, self.head(), x_BTD)

    def unstacked(self) -> "Transformer":
        """Return the same model for decoding: `blocks` is a list of `DecodingBlock`, matrices are in the compute dtype.

        This copies the weights once; decoding a token then copies none. An unstacked model is returned as it is.
        """
        if isinstance(self.blocks, nnx.List):
            return self
        dtype, L = compute_dtype(self.config), self.config.num_layers
        cast = lambda tree: jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim > 1 else leaf, tree)  # noqa: E731
        model = nnx.merge(*nnx.split(self))
        model.blocks = nnx.List([DecodingBlock(cast(jax.tree.map(itemgetter(i), self.blocks))) for i in range(L)])
        return cast(model)

    def require_unstacked(self) -> None:
        """Raise `UserError` if the blocks are stacked, as in training."""
        require(isinstance(self.blocks, nnx.List), "the blocks are stacked, as in training: pass model.unstacked()")

    def __call__(self, tokens_BT: jax.Array, segments_BT: jax.Array | None = None) -> jax.Array:
        """Return ``logits_BTV`` of the full model, computed without a cache."""
        segments_BT = jnp.ones_like(tokens_BT) if segments_BT is None else segments_BT
        return self.unembed(self.run_uncached(tokens_BT, segments_BT)[0])

    def first_layers(self, exit_layer: int) -> "Transformer":
        """Return the model that exits at ``exit_layer``: blocks [0, E) of an `unstacked` model, with shared weights."""
        require_exits("exit layer", [exit_layer], self.config.num_layers)
        self.require_unstacked()
        early = nnx.merge(*nnx.split(self))
        early.blocks = nnx.List(list(self.blocks)[:exit_layer])
        early.config = dataclasses.replace(self.config, num_layers=exit_layer)
        return early

    def run_uncached(
        self, tokens_BT: jax.Array, segments_BT: jax.Array, read: Callable[[jax.Array], Any] = lambda x_BTD: None
    ) -> tuple[jax.Array, Any]:
        """Run all blocks without a cache; return ``x_BTD`` after the last one, and ``read(x_BTD)`` after each one."""
        rotary = self.rotary_tables(jnp.arange(tokens_BT.shape[1])[None])

        def block_fn(block: Block, x_BTD: jax.Array, _: None) -> tuple[jax.Array, Any]:
            x_BTD = x_BTD + block(x_BTD, rotary, segments_BT)[0]
            return x_BTD, read(x_BTD)

        return run_layers(self.blocks, self.embed(tokens_BT), block_fn, None)

    def run_cached(
        self,
        x_BTD: jax.Array,
        rotary: RotaryTables,
        cache: list[LayerCache],
        first: int,
        last: int,
        *,
        filled: int | None = None,
    ) -> tuple[jax.Array, list[LayerCache]]:
        """Run blocks [first, last) of an `unstacked` model at the positions of ``rotary``, and update their caches.

        ``cache`` and the returned list have one entry for each block of the whole model. ``filled`` as in `Block`.
        """

        def block_fn(block: Block, x_BTD: jax.Array, layer: LayerCache) -> tuple[jax.Array, LayerCache]:
            delta_BTD, written = block(x_BTD, rotary, cache=layer, filled=filled)
            assert written is not None
            return x_BTD + delta_BTD, written

        x_BTD, written = run_layers(self.blocks, x_BTD, block_fn, cache[first:last], first, last)
        return x_BTD, [*cache[:first], *written, *cache[last:]]


def unembed(config: ModelConfig, head: Head, x_BTD: jax.Array) -> jax.Array:
    """Return float32 ``logits_BTV = g(x)`` for the parameters ``head``, which may be copies of the model's."""
    norm_D, matrix = head
    h_BTD = rms_norm(x_BTD, norm_D, config.norm_epsilon)
    equation = "BTD,VD->BTV" if config.tied_embedding else "BTD,DV->BTV"
    logits_BTV = project(equation, h_BTD, matrix[...], preferred_element_type=jnp.float32)
    return constrain(logits_BTV, "batch", "length", "vocab")


def negative_log_likelihood(logits_BCV: jax.Array, targets_BC: jax.Array) -> jax.Array:
    """Return ``-log softmax(logits)[target]`` of each position [nats]."""
    # Compare instead of gathering: this fuses, and it also works on a vocabulary that is split over devices.
    is_target_BCV = jnp.arange(logits_BCV.shape[-1])[None, None] == targets_BC[:, :, None]
    target_logit_BC = jnp.sum(jnp.where(is_target_BCV, logits_BCV, 0), axis=-1)
    return jax.nn.logsumexp(logits_BCV, axis=-1) - target_logit_BC


def empty_cache(config: ModelConfig, batch: int, capacity: int) -> list[LayerCache]:
    """Return zeroed keys and values of every block for ``capacity`` positions, in the compute dtype."""
    shape = batch, config.num_kv_heads, capacity, config.head_dim
    return [LayerCache.empty(*shape, compute_dtype(config)) for _ in range(config.num_layers)]


def parameter_count(config: ModelConfig) -> int:
    """Return the number of parameters, including embedding and head."""
    attention = 2 * config.head_dim * (config.num_heads + config.num_kv_heads)
    block = config.dim * (attention + 3 * config.ffn_dim + 2)
    tables = config.vocab_size * config.dim * (1 if config.tied_embedding else 2)
    return config.num_layers * block + tables + config.dim


def weight_count(config: ModelConfig) -> int:
    """Return the weights that one token's pass uses: all parameters, less an untied embedding (it reads one row)."""
    return parameter_count(config) - (0 if config.tied_embedding else config.vocab_size * config.dim)
