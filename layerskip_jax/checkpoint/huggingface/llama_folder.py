"""Folders of Hugging Face Llamas: ``config.json``, safetensors and tokenizer files."""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
from etils import epath
from flax import nnx

from layerskip_jax.checkpoint.arrays import named_arrays, placed_arrays, stacked_model, with_arrays
from layerskip_jax.checkpoint.huggingface.config_json import CONFIG, read_model_config
from layerskip_jax.checkpoint.huggingface.weights import WeightFiles
from layerskip_jax.config import Config, ModelConfig
from layerskip_jax.data.load_tokenizer import find_tokenizer
from layerskip_jax.data.sentencepiece_tokenizer import TOKENIZER
from layerskip_jax.errors import warn
from layerskip_jax.model import Block, DecodingBlock, Transformer, compute_dtype


@dataclass(frozen=True)
class LlamaFolder:
    """A Hugging Face Llama; `RunFolder` has the same interface."""

    root: epath.Path

    def __str__(self) -> str:
        return str(self.root)

    @property
    def model_folder(self) -> epath.Path:
        """The folder of the tokenizer and of the swept settings: the folder itself."""
        return self.root

    @cached_property
    def config(self) -> Config:
        """The config of the model; all other settings have their defaults.

        If ``config.json`` ties the head but the files store a different head, use the head of the files.
        """
        model = read_model_config(self.root)
        if model.tied_embedding and self._files.has_own_head():
            warn(
                f"{self.root / CONFIG} says tie_word_embeddings, but the files have a head that differs from the "
                "embedding: the head of the files is used, and the model is not tied"
            )
            model = dataclasses.replace(model, tied_embedding=False)
        return Config(model=model)

    @cached_property
    def _files(self) -> WeightFiles:
        return WeightFiles(self.root)

    def check(self) -> None:
        """Raise `UserError` unless the headers of the files are those of the model; reads no weights."""
        self._files.check(self.config.model)

    @property
    def tokenizer(self) -> epath.Path:
        """The tokenizer's file."""
        return find_tokenizer(self.root) or self.root / TOKENIZER

    def weights(self, target: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Read the named arrays of the stacked model into the shapes, types and shardings of ``target``.

        Each process reads only the shards of its devices. Raises `UserError` for weights that do not match their
        ``config.json``.
        """
        self.check()
        return {name: self._files.array(name, leaf) for name, leaf in target.items()}

    def model(self, unstacked: bool = False) -> Transformer:
        """Read the model as `load_model` does, for training or (``unstacked``) for decoding.

        For decoding, blocks are read one by one in the compute type, so the host holds no second copy.
        """
        if not unstacked:
            return stacked_model(self.config.model, self.weights)
        self.check()
        return _read_unstacked(self._files, self.config.model)


def _read_unstacked(files: WeightFiles, config: ModelConfig) -> Transformer:
    def read(module: Any, prefix: str, names: Collection[str]) -> dict[str, jax.Array]:
        leaves = {name: leaf for name, leaf in placed_arrays(module).items() if name in names}
        types = {name: compute_dtype(config) if len(leaf.shape) > 1 else leaf.dtype for name, leaf in leaves.items()}
        return {name: files.array(prefix + name, leaf.update(dtype=types[name])) for name, leaf in leaves.items()}

    model = jax.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    block = jax.eval_shape(lambda: Block(config, rngs=nnx.Rngs(0)))
    block_names = named_arrays(block)
    blocks = [with_arrays(block, read(block, f"blocks.{layer}.", block_names)) for layer in range(config.num_layers)]
    model.blocks = nnx.List([DecodingBlock(block) for block in blocks])
    arrays = named_arrays(model)
    return with_arrays(model, arrays | read(model, "", [name for name in arrays if not name.startswith("blocks.")]))
