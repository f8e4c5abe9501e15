"""Safetensors of a Llama, read slice by slice and written file by file, without a second copy of the model in memory.

Hugging Face stores a matrix ``[outputs, inputs]`` for each layer. Here the inputs come first, heads are a separate
axis, and the layers are stacked in one array.
"""

import json
from math import prod
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from layerskip_jax.checkpoint.huggingface.config_json import read_json
from layerskip_jax.config import ModelConfig
from layerskip_jax.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
NO_LIBRARY = "safetensors files need safetensors: pip install layerskip_jax[huggingface]"
FILE_BYTES = 1 << 30
"""Maximum size of an exported file. An export holds one file in memory in addition to the model."""


class StoredTensor(NamedTuple):
    """The name of a parameter's tensor, and how many leading axes here are inputs (0: the tensor is stored as here)."""

    tensor: str
    inputs: int


BLOCK_TENSORS = {
    "attention_norm_D": StoredTensor("input_layernorm", 0),
    "query_DNH": StoredTensor("self_attn.q_proj", 1),
    "key_DKH": StoredTensor("self_attn.k_proj", 1),
    "value_DKH": StoredTensor("self_attn.v_proj", 1),
    "output_NHD": StoredTensor("self_attn.o_proj", 2),
    "ffn_norm_D": StoredTensor("post_attention_layernorm", 0),
    "gate_DF": StoredTensor("mlp.gate_proj", 1),
    "up_DF": StoredTensor("mlp.up_proj", 1),
    "down_FD": StoredTensor("mlp.down_proj", 1),
}
MODEL_TENSORS = {
    "embedding_VD": StoredTensor("model.embed_tokens", 0),
    "final_norm_D": StoredTensor("model.norm", 0),
    "head_DV": StoredTensor("lm_head", 1),
}


def stored_tensor(name: str, layer: int | None = None) -> StoredTensor:
    """Return the tensor of the parameter ``name`` ("head_DV", or with a layer "query_DNH").

    >>> stored_tensor("query_DNH", 3).tensor
    'model.layers.3.self_attn.q_proj.weight'
    """
    if layer is None:
        tensor, inputs = MODEL_TENSORS[name]
        return StoredTensor(f"{tensor}.weight", inputs)
    tensor, inputs = BLOCK_TENSORS[name]
    return StoredTensor(f"model.layers.{layer}.{tensor}.weight", inputs)


def safe_open(file: epath.Path) -> Any:
    """Open a safetensors file; raises `UserError` without the library, or if the file cannot be read."""
    try:
        import safetensors
    except ImportError:
        raise UserError(NO_LIBRARY) from None
    try:
        return safetensors.safe_open(str(file), "numpy")
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot read {file} as safetensors: {error}") from error


class WeightFiles:
    """The tensors of a Llama folder, read on demand. Raises `UserError` unless they are the tensors of ``config``."""

    def __init__(self, folder: epath.Path, config: ModelConfig):
        self._config = config
        self._files = {tensor: folder / name for tensor, name in _file_names(folder).items()}
        needed = {
            stored_tensor(name).tensor for name in MODEL_TENSORS if not (name == "head_DV" and config.tied_embedding)
        }
        needed |= {stored_tensor(name, layer).tensor for name in BLOCK_TENSORS for layer in range(config.num_layers)}
        ignored = {stored_tensor("head_DV").tensor} if config.tied_embedding else set()
        unknown = [t for t in self._files if t not in needed | ignored and not t.endswith("rotary_emb.inv_freq")]
        if unknown:
            raise UserError(
                f"{folder} has tensors that do not belong to the Llama of its config.json, such as {min(unknown)}"
            )
        if missing := needed - self._files.keys():
            raise UserError(
                f"{folder} lacks {len(missing)} tensors of the Llama of its config.json, such as {min(missing)}"
            )

    def array(self, name: str, target: jax.ShapeDtypeStruct) -> jax.Array:
        """Read the parameter ``name`` into the shape, type and sharding of ``target``.

        ``blocks.query_DNH`` stands for all layers, stacked, and ``blocks.3.query_DNH`` for one. Only the shards of this
        process's devices are read.
        """
        assert target.sharding is not None

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            return self._read(name, target, index)

        return jax.make_array_from_callback(target.shape, target.sharding, shard)

    def _read(self, name: str, target: jax.ShapeDtypeStruct, index: tuple[slice, ...]) -> np.ndarray:
        *blocks, leaf = name.split(".")
        shape = tuple(len(range(*part.indices(size))) for part, size in zip(index, target.shape, strict=True))
        out = _aligned(shape, target.dtype)
        if blocks == ["blocks"]:
            for row, layer in enumerate(range(*index[0].indices(target.shape[0]))):
                out[row] = self._slice(stored_tensor(leaf, layer), target.shape[1:], index[1:])
        else:
            out[...] = self._slice(stored_tensor(leaf, int(blocks[1]) if blocks else None), target.shape, index)
        return out

    def _slice(self, at: StoredTensor, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
        """Return ``parameter[index]`` of a parameter of ``shape``, from its tensor."""
        n = at.inputs
        stored = (prod(shape[n:]), prod(shape[:n])) if n else shape
        # Open the file for each tensor: a mapping that stays open keeps every page that was read in memory.
        with safe_open(self._files[at.tensor]) as file:
            tensor = file.get_slice(at.tensor)
            if tuple(tensor.get_shape()) != stored:
                raise UserError(
                    f"{at.tensor} in {self._files[at.tensor]} has shape {list(tensor.get_shape())}, but its "
                    f"config.json implies {list(stored)}"
                )
            if tensor.get_dtype() not in ("F32", "BF16", "F16"):
                raise UserError(f"{at.tensor} is of type {tensor.get_dtype()}: only F32, BF16 and F16 can be read")
            if n == 0:
                return tensor[index]
            # Files are sliced only along the first axis of outputs and of inputs; the other axes are cut here.
            rows, columns = _along(shape[n:], index[n]), _along(shape[:n], index[0])
            part = tensor[rows, columns].T.reshape(-1, *shape[1:n], rows.stop - rows.start)
            part = part.reshape(*part.shape[:-1], -1, *shape[n + 1 :])
            return part[tuple(slice(None) if axis in (0, n) else cut for axis, cut in enumerate(index))]


def _file_names(folder: epath.Path) -> dict[str, str]:
    """Return the name of the file that holds each tensor, from the index or from the only file."""
    if (folder / INDEX).is_file():
        names = read_json(folder / INDEX).get("weight_map", {})
        for name in sorted(set(names.values())):
            if not (folder / name).is_file():
                raise UserError(f"{folder} lacks the file {name}, which its {INDEX} names: download it too")
        return names
    if (folder / SINGLE).is_file():
        with safe_open(folder / SINGLE) as file:
            return dict.fromkeys(file.keys(), SINGLE)
    raise UserError(f"no weights in {folder}: expected {SINGLE}, or {INDEX} with its files (.bin files are not read)")


def _along(group: tuple[int, ...], first: slice) -> slice:
    """Return the range of a flattened group of axes that corresponds to a range of its first axis."""
    start, stop, _ = first.indices(group[0])
    return slice(start * prod(group[1:]), stop * prod(group[1:]))


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an uninitialized array at a multiple of 64 bytes, which JAX uses on CPU without a copy."""
    size = prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


class _Part(NamedTuple):
    """One tensor to write: its name, and the named array, or the layer of it, that holds its values."""

    at: StoredTensor
    name: str
    layer: int | None

    def values(self, arrays: dict[str, Any]) -> Any:
        return arrays[self.name] if self.layer is None else arrays[self.name][self.layer]

    def size(self, arrays: dict[str, Any]) -> int:
        return prod(arrays[self.name].shape[0 if self.layer is None else 1 :])


def write_weights(folder: epath.Path, config: ModelConfig, arrays: dict[str, Any], dtype: Any) -> None:
    """Write a stacked model's named ``arrays`` in ``dtype``: one file, or several of `FILE_BYTES` with an index."""
    try:
        from safetensors.numpy import save_file
    except ImportError:
        raise UserError(NO_LIBRARY) from None
    parts = [_Part(stored_tensor(name), name, None) for name in MODEL_TENSORS if name in arrays]
    layers = range(config.num_layers)
    parts += [_Part(stored_tensor(name, layer), f"blocks.{name}", layer) for layer in layers for name in BLOCK_TENSORS]
    files: list[list[_Part]] = [[]]
    for part in parts:
        sizes = [other.size(arrays) for other in (*files[-1], part)]
        if files[-1] and sum(sizes) * np.dtype(dtype).itemsize > FILE_BYTES:
            files.append([])
        files[-1].append(part)
    numbers = range(1, len(files) + 1)
    names = [f"model-{k:05d}-of-{len(files):05d}.safetensors" for k in numbers] if len(files) > 1 else [SINGLE]
    for name, file_parts in zip(names, files, strict=True):
        tensors = {part.at.tensor: _tensor(part, arrays, dtype) for part in file_parts}
        save_file(tensors, str(folder / name), metadata={"format": "pt"})
    if len(files) > 1:
        weight_map = {
            part.at.tensor: name for name, file_parts in zip(names, files, strict=True) for part in file_parts
        }
        total = sum(part.size(arrays) for part in parts) * np.dtype(dtype).itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=1))


def _tensor(part: _Part, arrays: dict[str, Any], dtype: Any) -> np.ndarray:
    """Return a tensor in the layout of Hugging Face."""
    array, inputs = np.asarray(part.values(arrays)), part.at.inputs
    return np.ascontiguousarray(array.reshape(prod(array.shape[:inputs]), -1).T if inputs else array, dtype)
