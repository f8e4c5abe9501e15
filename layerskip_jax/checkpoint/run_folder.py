"""Run folders: ``RUN/checkpoints/STEP`` with the orbax items of a checkpoint, and the tokenizer in ``RUN/checkpoints``.

A checkpoint stores model, optimizer, data positions and config as separate items, so decoding reads only model and
config. The item ``checksums`` holds the digests of arrays (`layerskip_jax.checkpoint.digests`), config and tokenizer
(SHA-256), which every read compares; a file of data positions holds its own. Files are parsed as data: nothing is
unpickled or executed.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx

from layerskip_jax.checkpoint.arrays import (
    DamagedCheckpoint,
    check_shapes,
    corrupted_array,
    named_arrays,
    prefix_names,
    read_arrays,
    stacked_model,
    unreadable,
)
from layerskip_jax.config import Config
from layerskip_jax.config_dict import from_dict
from layerskip_jax.data.corpus import Corpus
from layerskip_jax.data.load_tokenizer import find_tokenizer
from layerskip_jax.data.position import read_corpus, read_positions
from layerskip_jax.data.sentencepiece_tokenizer import TOKENIZER
from layerskip_jax.errors import UserError, nearest
from layerskip_jax.locations import is_regular, locate, names_in, read_limited
from layerskip_jax.model import Transformer

ITEMS = {"model", "optimizer", "batches", "config", "checksums", "_CHECKPOINT_METADATA"}
"""Items of a checkpoint. A folder without any of them is not a checkpoint, whatever its name."""


class CheckpointNames(ocp.step.NameFormat):
    """Orbax's checkpoint names, such as ``4``; ignores other files and folders next to the checkpoints."""

    _standard = ocp.step.standard_name_format()

    def build_name(self, step: int) -> str:
        return self._standard.build_name(step)

    def find_all(self, base_path: epath.PathLike) -> Iterator[ocp.step.Metadata]:
        base = epath.Path(base_path)
        names = [entry.name for entry in base.iterdir()] if base.is_dir() else []
        for step in sorted((int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name)), reverse=True):
            folder = base / str(step)
            # ValueError: incomplete, in a bucket; FileNotFoundError: just removed; NotADirectoryError: a file.
            with contextlib.suppress(ValueError, FileNotFoundError, NotADirectoryError):
                if ITEMS & {item.name for item in folder.iterdir()}:
                    yield self._standard.find_step(base, step)

    def find_step(self, base_path: epath.PathLike, step: int) -> ocp.step.Metadata:
        return self._standard.find_step(base_path, step)


@dataclass(frozen=True)
class RunFolder:
    """The model of one checkpoint of a run; `LlamaFolder` has the same interface."""

    checkpoint: epath.Path
    """``RUN/checkpoints/STEP``."""

    def __str__(self) -> str:
        return str(self.checkpoint)

    @property
    def model_folder(self) -> epath.Path:
        """The folder of the tokenizer and of the swept settings: ``RUN/checkpoints``."""
        return self.checkpoint.parent

    @property
    def root(self) -> epath.Path:
        """The folder that plots go to: ``RUN``."""
        return self.model_folder.parent

    @cached_property
    def config(self) -> Config:
        """The config of the run, as stored in the checkpoint."""
        return read_config(self.checkpoint, self._checksums)

    @cached_property
    def _checksums(self) -> dict[str, Any]:
        return read_checksums(self.checkpoint)

    @property
    def tokenizer(self) -> epath.Path:
        """The tokenizer's file. A path in the config is never followed, because anyone may have written it."""
        return find_tokenizer(self.model_folder) or self.model_folder / TOKENIZER

    def check(self) -> None:
        """Raise `UserError` unless the checkpoint has the arrays that its config implies; reads no weights."""
        model = jax.eval_shape(lambda: Transformer(self.config.model, rngs=nnx.Rngs(0)))
        check_shapes(self.checkpoint, {name: leaf.shape for name, leaf in named_arrays(model).items()})

    def weights(self, target: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Read the named arrays of the stacked model into the shapes, types and shardings of ``target``.

        Each process reads only the shards of its devices. Raises `UserError` for weights that do not match their config
        and `DamagedCheckpoint` for weights or a tokenizer that were changed after the save.
        """
        folder, checksums = self.checkpoint, self._checksums
        check_shapes(folder, {name: leaf.shape for name, leaf in target.items()})
        arrays = read_arrays(folder / "model", target)
        problem = corrupted_array(folder, checksums["arrays"], prefix_names("model", arrays))
        for name, digest in checksums["tokenizer"].items():
            file = self.model_folder / epath.Path(name).name
            if not problem and is_regular(file) and sha256(file.read_bytes()) != digest:
                problem = f"{file} is damaged: it is not the tokenizer that the model was trained with"
        if problem:
            raise DamagedCheckpoint(problem)
        return arrays

    def model(self, unstacked: bool = False) -> Transformer:
        """Read the model as `load_model` does, for training or (``unstacked``) for decoding."""
        config = self.config.model
        if config.attention != "xla":  # a kernel of the chips that trained it may not fit this platform or length
            config = dataclasses.replace(config, attention="auto")
        model = stacked_model(config, self.weights)
        return model.unstacked() if unstacked else model


def checkpoint_folder(config: Config) -> epath.Path:
    """Return the folder of a run's checkpoints: ``RUN_DIR/checkpoints``."""
    return locate(config.train.run_dir) / "checkpoints"


def newest_step(folder: epath.Path) -> int | None:
    """Return the step of the newest complete checkpoint in a folder, or None."""
    return next((found.step for found in CheckpointNames().find_all(folder)), None)


def checkpoint_steps(folder: epath.Path) -> list[int]:
    """Return the steps of the complete checkpoints in a folder, the newest first."""
    return [found.step for found in CheckpointNames().find_all(folder)]


def find_checkpoint(path: str) -> epath.Path:
    """Return the folder of one checkpoint: ``path`` itself, or the newest complete checkpoint of the run at ``path``.

    Raises `UserError` if there is none.
    """
    root = locate(path)
    if not root.exists():
        others = [str(epath.Path(path).parent / name) for name in names_in(root.parent)]
        raise UserError(f"no checkpoint at {path}: the folder does not exist{nearest(path, others)}")
    if (root / "model").exists() and (root / "config").exists():
        return root
    folder = root / "checkpoints" if (root / "checkpoints").is_dir() else root
    # One by one, the newest first: in a bucket, each takes several round trips.
    steps = (found.path for found in CheckpointNames().find_all(folder))
    newest = next((step for step in steps if (step / "model").exists()), None)
    if newest is None:
        raise UserError(f"no checkpoint at {path}: expected a run folder with checkpoints/STEP of layerskip train")
    return newest


def read_config(checkpoint: epath.Path, checksums: dict[str, Any] | None = None) -> Config:
    """Read the config that is stored in a checkpoint; raises `DamagedCheckpoint` if it was changed after the save.

    ``checksums`` is the result of `read_checksums`, if the caller has it.
    """
    values, digest = _read_json(checkpoint, "config"), (checksums or read_checksums(checkpoint))["config"]
    try:
        if json_sha256(values) == digest:
            return from_dict(values, Config)
    except (UserError, OverflowError, RecursionError) as error:
        raise UserError(f"the checkpoint {checkpoint} has no readable config: {error}") from error
    raise DamagedCheckpoint(f"the checkpoint {checkpoint} is damaged: its config is not what was saved")


def read_checksums(checkpoint: epath.Path) -> dict[str, Any]:
    """Read the digests of a checkpoint: ``{"arrays": {NAME: int}, "config": str, "tokenizer": {FILE: str}}``."""
    checksums = _read_json(checkpoint, "checksums")
    kinds = {"arrays": dict, "config": str, "tokenizer": dict}
    if not isinstance(checksums, dict) or any(not isinstance(checksums.get(key), kind) for key, kind in kinds.items()):
        raise DamagedCheckpoint(f"the checkpoint {checkpoint} is damaged: its checksums are not what was saved")
    return checksums


def read_data_positions(checkpoint: epath.Path) -> tuple[dict[int, Any], Corpus | None]:
    """Read the data position of every row of the batch, and what it counts (`layerskip_jax.data.position`)."""
    try:
        return read_positions(checkpoint / "batches"), read_corpus(checkpoint / "batches")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise unreadable(f"the checkpoint {checkpoint} is damaged: no data position: {error}", error) from error


def _read_json(checkpoint: epath.Path, item: str) -> Any:
    try:
        return json.loads(read_limited(checkpoint / item / "metadata"))
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(f"the checkpoint {checkpoint} is damaged: no readable {item}: {error}", error) from error


def sha256(data: bytes) -> str:
    """Return the SHA-256 of bytes in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def json_sha256(values: Any) -> str:
    """Return the SHA-256 of JSON values, whatever the order of their keys."""
    return sha256(json.dumps(values, sort_keys=True).encode())
