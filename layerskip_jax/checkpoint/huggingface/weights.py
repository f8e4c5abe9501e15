"""Safetensors of a Llama, read slice by slice and written file by file, without a second copy of the model in memory.

Hugging Face stores a matrix ``[outputs, inputs]`` for each layer. Here the inputs come first, heads are a separate
axis, and the layers are stacked in one array.
"""

import contextlib
import json
from math import prod
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from layerskip_jax.checkpoint.huggingface.config_json import CONFIG, read_json
from layerskip_jax.config import ModelConfig
from layerskip_jax.errors import UserError
from layerskip_jax.locations import file_inside, is_regular

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
NO_LIBRARY = "safetensors files need safetensors: pip install 'layerskip-jax[huggingface]'"
READABLE = ("F64", "F32", "BF16", "F16")
COMPARED_VALUES = 1 << 24
"""Values of head and embedding that are in memory when they are compared."""
FILE_BYTES = 1 << 30
"""Maximum size of an exported file, unless one tensor is larger. An export holds one file in memory in addition to the
model."""


class StoredTensor(NamedTuple):
    """The name of a parameter's tensor, and how many leading axes of the parameter are inputs (0: no transpose)."""

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


def stored_shape(name: str, config: ModelConfig) -> tuple[int, ...]:
    """Return the shape of the tensor of the parameter ``name``, for one layer; its suffix names the axes."""
    sizes = {
        "D": config.dim,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "F": config.ffn_dim,
        "V": config.vocab_size,
    }
    shape, inputs = tuple(sizes[axis] for axis in name.split("_")[-1]), (MODEL_TENSORS | BLOCK_TENSORS)[name].inputs
    return (prod(shape[inputs:]), prod(shape[:inputs])) if inputs else shape


def safe_open(file: epath.Path) -> Any:
    """Open a safetensors file; raises `UserError` without the library, or if the file cannot be read."""
    try:
        import safetensors
    except ImportError:
        raise UserError(NO_LIBRARY) from None
    try:
        return safetensors.safe_open(str(file), "numpy")
    except (OSError, safetensors.SafetensorError) as error:
        with contextlib.suppress(OSError), file.open("rb") as opened:
            if opened.read(20).startswith(b"version https://git-"):
                raise UserError(f"{file} is a pointer of Git LFS: run `git lfs pull`") from error
        raise UserError(f"cannot read {file} as safetensors: {error}") from error


class TensorHeader(NamedTuple):
    """The entry of one tensor in a safetensors header, and the file that holds it."""

    file: epath.Path
    name: str
    shape: tuple[int, ...]
    dtype: str


class WeightFiles:
    """The tensors of a Llama folder. The constructor reads the headers only; `array` reads values."""

    def __init__(self, folder: epath.Path):
        self._folder = folder
        self._headers = _read_headers(folder)

    def has_own_head(self) -> bool:
        """Return whether the files hold a head with other values than the embedding."""
        embedding, head = (self._headers.get(stored_tensor(name).tensor) for name in ("embedding_VD", "head_DV"))
        if not embedding or not head or not {embedding.dtype, head.dtype} <= set(READABLE) or len(head.shape) != 2:
            return False
        if embedding.shape != head.shape:
            return True
        count, width = head.shape
        rows = max(1, COMPARED_VALUES // max(1, width))
        with safe_open(embedding.file) as first, safe_open(head.file) as second:
            tensors = first.get_slice(embedding.name), second.get_slice(head.name)
            for start in range(0, count, rows):
                part = slice(start, min(start + rows, count))
                one, other = (tensor[part].astype(np.float32) for tensor in tensors)
                if not np.array_equal(one, other, equal_nan=True):
                    return True
        return False

    def check(self, config: ModelConfig) -> None:
        """Raise `UserError` unless the headers describe the model of ``config``; call it before allocating the model.

        A tied model may store its matrix as the embedding or as the head.
        """
        if config.num_layers > len(self._headers):  # before the set of all names is built
            raise UserError(
                f"{self._folder / CONFIG}: num_hidden_layers is {config.num_layers}, but the files have only "
                f"{len(self._headers)} tensors"
            )
        embedding, head = stored_tensor("embedding_VD").tensor, stored_tensor("head_DV").tensor
        needed = {stored_tensor(name).tensor: stored_shape(name, config) for name in MODEL_TENSORS}
        for name in BLOCK_TENSORS:
            shape = stored_shape(name, config)
            needed |= {stored_tensor(name, layer).tensor: shape for layer in range(config.num_layers)}
        if config.tied_embedding:
            del needed[head]
            if head in self._headers:
                self._headers.setdefault(embedding, self._headers[head])
        elif head not in self._headers and embedding in self._headers:
            raise UserError(
                f"{self._folder} lacks {head}: if the embedding is also the head, set tie_word_embeddings to true in "
                f"its {CONFIG}"
            )
        others = self._headers.keys() - needed.keys() - {head}
        if unknown := [name for name in others if not name.endswith("rotary_emb.inv_freq")]:
            raise UserError(
                f"{self._folder} has tensors that do not belong to the Llama of its {CONFIG}, such as {min(unknown)}"
            )
        if missing := needed.keys() - self._headers.keys():
            raise UserError(
                f"{self._folder} lacks {len(missing)} tensors of the Llama of its {CONFIG}, such as {min(missing)}"
            )
        for tensor, shape in needed.items():
            header = self._headers[tensor]
            if header.shape != shape:
                raise UserError(
                    f"{header.name} in {header.file} has shape {list(header.shape)}, but its {CONFIG} implies "
                    f"{list(shape)}"
                )
            if header.dtype not in READABLE:
                raise UserError(f"{header.name} is of type {header.dtype}: only {', '.join(READABLE)} can be read")

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
        n, header = at.inputs, self._headers[at.tensor]
        # Reopen the file for each tensor: while a file is mapped, the pages that were read stay in memory.
        with safe_open(header.file) as file:
            tensor = file.get_slice(header.name)
            if n == 0:
                return tensor[index]
            # A tensor in a file has two axes, [outputs, inputs], and each is a group of the parameter's axes. A slice
            # of a group's first axis is one range, so read only that range, and slice the other axes afterwards.
            rows, columns = _along(shape[n:], index[n]), _along(shape[:n], index[0])
            part = tensor[rows, columns].T.reshape(-1, *shape[1:n], rows.stop - rows.start)
            part = part.reshape(*part.shape[:-1], -1, *shape[n + 1 :])
            return part[tuple(slice(None) if axis in (0, n) else cut for axis, cut in enumerate(index))]


def _read_headers(folder: epath.Path) -> dict[str, TensorHeader]:
    """Return the headers of all tensors, from the only file or else from the files of the index, as transformers does.

    The headers decide which tensors a file has, not the index: an index can be older than its files.
    """
    if is_regular(single := file_inside(folder, SINGLE)):
        files = [single]
    elif is_regular(file_inside(folder, INDEX)):
        files = _indexed_files(folder)
    else:
        raise UserError(
            f"no weights in {folder}: expected {SINGLE}, or {INDEX} with its files (.bin files are not read)"
        )
    headers = {}
    for file in files:
        with safe_open(file) as opened:
            for name in opened.keys():  # noqa: SIM118  (not a mapping)
                tensor = opened.get_slice(name)
                headers[name] = TensorHeader(file, name, tuple(tensor.get_shape()), tensor.get_dtype())
    return headers


def _indexed_files(folder: epath.Path) -> list[epath.Path]:
    """Return the files that the index names; raises `UserError` if one is missing, or not in the folder."""
    names = read_json(folder, INDEX).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{folder / INDEX} needs a weight_map of tensors and the names of their files")
    files = [file_inside(folder, name) for name in sorted(set(names.values()))]
    for file in files:
        if not is_regular(file):
            raise UserError(f"{folder} lacks the file {file.name}, which its {INDEX} names: download it too")
    return files


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
