"""Load a model from a run folder or from a folder of a Hugging Face Llama."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from layerskip_jax.checkpoint.arrays import named_arrays, with_arrays
from layerskip_jax.checkpoint.huggingface.config_json import CONFIG
from layerskip_jax.checkpoint.huggingface.llama_folder import LlamaFolder
from layerskip_jax.checkpoint.run_folder import RunFolder, find_checkpoint
from layerskip_jax.config import Config, ModelConfig
from layerskip_jax.data.tokenizer import Tokenizer
from layerskip_jax.errors import UserError, warn
from layerskip_jax.locations import is_regular, is_remote, locate
from layerskip_jax.model import Transformer
from layerskip_jax.sharding import check_tensor_divides, mesh_size

ModelFolder = RunFolder | LlamaFolder
"""A folder that holds a model, its config and its tokenizer."""


def open_model_folder(path: str | ModelFolder) -> ModelFolder:
    """Open a run folder, one checkpoint in it, or a local folder of a Hugging Face Llama.

    Returns ``path`` itself if it is an opened folder: functions that take a path take one too, so that a command reads
    a config once, and reads all of a model from one checkpoint. Raises `UserError` if ``path`` is none of them.
    """
    if isinstance(path, RunFolder | LlamaFolder):
        return path
    root = locate(path)
    if not is_regular(root / CONFIG):
        return RunFolder(find_checkpoint(path))
    if is_remote(root):
        raise UserError(f"{path} is a Hugging Face folder in a bucket: copy it to a local disk")
    return LlamaFolder(root)


def load_model(path: str | ModelFolder, *, unstacked: bool = False) -> tuple[Transformer, Config, epath.Path]:
    """Load a model onto the first device; return it with its config and the path of its tokenizer.

    Inside `sharding.tensor_parallel`, load one shard of it onto each device of the context.

    ``path`` is as for `open_model_folder`. Config and tokenizer are stored with the weights, so no other argument is
    needed. With ``unstacked`` the model is as `Transformer.unstacked` returns it, ready for decoding. If
    ``model.attention`` is splash or cudnn, the model uses auto instead, because this platform may not support the
    kernel; the returned config keeps the stored value. Raises `UserError` for a model that cannot be read, and
    `DamagedCheckpoint` for files that were changed after the save.
    """
    folder = open_model_folder(path)
    config, tokenizer = folder.config, folder.tokenizer
    check_tensor_divides(config.model, "--tensor_parallel", mesh_size("heads"))
    return folder.model(unstacked), config, tokenizer


def initial_model(config: Config, tokenizer: Tokenizer, abstract: Transformer) -> Callable[[], Transformer]:
    """Check that the weights of ``train.init_from`` fit the config; return a function that reads them.

    The function reads into the shapes, types and shardings of ``abstract``. Raises `UserError` for another model or
    another tokenizer.
    """
    path = config.train.init_from
    folder = open_model_folder(path)
    for name, old, new in differences(folder.config.model, config.model):
        raise UserError(
            f"the weights of {path} (train.init_from) have model.{name} {old}, but the config says {new}: set "
            f"--model.{name} {old}"
        )
    stored = {name: folder.model_folder / name for name in tokenizer.files if is_regular(folder.model_folder / name)}
    kind = next(iter(tokenizer.files))  # tokenizer.model or tokenizer.json
    other_kind = kind not in stored and is_regular(folder.tokenizer)
    if other_kind or any(file.read_bytes() != tokenizer.files[name] for name, file in stored.items()):
        raise UserError(
            f"{config.data.tokenizer} (data.tokenizer) differs from the tokenizer of {path} (train.init_from): set "
            f"--data.tokenizer {stored.get(kind, folder.tokenizer)}"
        )
    folder.check()  # here, because `agree` ends all processes; an error in `weights` would end one
    return lambda: with_arrays(abstract, folder.weights(named_arrays(abstract)))


def differences(saved: ModelConfig, wanted: ModelConfig) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, saved value and wanted value of the settings that change what a model computes from its weights."""
    for field in dataclasses.fields(saved):
        old, new = getattr(saved, field.name), getattr(wanted, field.name)
        if old != new and field.name not in ("compute_dtype", "attention", "context_length"):
            yield field.name, old, new


def context_length(config: Config) -> int:
    """Return the context length of a model [tokens]: ``model.context_length``, or else the length it was trained at."""
    return config.model.context_length or config.data.sequence_length


def warn_beyond_context(config: Config, tokens: int, what: str) -> None:
    """Warn if ``tokens`` exceed the model's context; ``what`` starts the warning, such as "data.sequence_length is"."""
    context = context_length(config)
    if tokens > context:
        warn(f"{what} {tokens} tokens, more than the model's context of {context}: expect worse predictions beyond it")
