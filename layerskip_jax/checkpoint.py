"""Checkpoints through orbax: model, optimizer, data position and config together, saved asynchronously.

Arrays are saved under the names they have in the code (``blocks.query_DNH``), in separate items, so that decoding
reads the model alone. What is stored is data: nothing is unpickled or executed when it is read.
"""

import dataclasses
import json
import urllib.parse
from collections.abc import Collection
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from flax import nnx

from layerskip_jax.config import Config, DecodeConfig, experiment, from_dict
from layerskip_jax.data.position import Position
from layerskip_jax.data.tokenizer import Tokenizer
from layerskip_jax.errors import UserError, nearest
from layerskip_jax.locations import is_remote, locate
from layerskip_jax.model import Transformer
from layerskip_jax.train_step import TrainState

TOKENIZER = "tokenizer.model"
SWEPT = "decode.json"
"""What `layerskip_jax.sweep` recommends for a run, beside its checkpoints."""


def checkpoint_folder(config: Config) -> epath.Path:
    """Return where the run of ``config`` keeps its checkpoints: ``RUN_DIR/checkpoints``."""
    return locate(config.train.run_dir) / "checkpoints"


def named_arrays(tree: Any) -> dict[str, Any]:
    """Flatten a tree of Params and arrays to ``{"blocks.query_DNH": array}``, in the order of its leaves."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    named = {}
    for path, leaf in leaves:
        (array,) = jax.tree.leaves(leaf)
        named[jax.tree_util.keystr(path, simple=True, separator=".")] = array
    return named


def with_arrays(tree: Any, arrays: dict[str, Any]) -> Any:
    """Return ``tree`` with its leaves replaced by name: the inverse of `named_arrays`."""
    return jax.tree.unflatten(jax.tree.structure(tree), [arrays[name] for name in named_arrays(tree)])


class Checkpoints:
    """The checkpoints of one run, as a context manager that waits for the last save on its way out."""

    def __init__(self, config: Config):
        self.folder = checkpoint_folder(config)
        self._config = config
        options = ocp.CheckpointManagerOptions(max_to_keep=config.train.keep_checkpoints, create=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise `UserError` if the run has another tokenizer already: one run has one."""
        path = self.folder / TOKENIZER
        if path.exists() and path.read_bytes() != tokenizer.model:
            raise UserError(
                f"the run {self._config.train.run_dir} was trained with another tokenizer than "
                f"{self._config.data.tokenizer}: continue with --data.tokenizer {path}, or start a new --train.run_dir"
            )

    def keep_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Put the tokenizer beside the checkpoints, so that they need no other file."""
        if jax.process_index() == 0:
            (self.folder / TOKENIZER).write_bytes(tokenizer.model)

    def save(self, state: TrainState, data: grain.DatasetIterator) -> None:
        """Save after the step that ``state.step`` counts; returns as soon as the arrays are copied."""
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                model=ocp.args.StandardSave(named_arrays(state.model)),
                optimizer=ocp.args.StandardSave(named_arrays({"step": state.step, "state": state.opt_state})),
                data=grain.checkpoint.CheckpointSave(Position(data)),
                config=ocp.args.JsonSave(experiment(self._config)),
            ),
        )

    def latest(self) -> int | None:
        """Return the step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def restore(self, step: int, abstract: TrainState, data: grain.DatasetIterator) -> TrainState:
        """Restore into the shapes and shardings of ``abstract``, and set ``data`` to where it was.

        After a change of the number of processes each has another part of the data, which then starts from its
        beginning. Raises `UserError` when the checkpoint holds another model.
        """
        saved = read_config(self.folder / str(step))
        for field in dataclasses.fields(saved.model):
            old, new = getattr(saved.model, field.name), getattr(self._config.model, field.name)
            if old != new and field.name not in ("compute_dtype", "attention"):
                raise UserError(
                    f"the checkpoint {self.folder / str(step)} has model.{field.name} {old}, but the config says "
                    f"{new}: continue with --model.{field.name} {old}, or start a new run with another --train.run_dir"
                )
        if saved.optimizer.name != self._config.optimizer.name:
            raise UserError(
                f"the checkpoint {self.folder / str(step)} was trained with optimizer.name {saved.optimizer.name}, but "
                f"the config says {self._config.optimizer.name}: their states differ; keep {saved.optimizer.name}"
            )
        optimizer = {"step": abstract.step, "state": abstract.opt_state}
        items = {
            "model": ocp.args.StandardRestore(named_arrays(abstract.model)),
            "optimizer": ocp.args.StandardRestore(named_arrays(optimizer)),
        }
        if self._processes(step) == jax.process_count():
            items["data"] = grain.checkpoint.CheckpointRestore(Position(data))
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        optimizer = with_arrays(optimizer, restored["optimizer"])
        model = with_arrays(abstract.model, restored["model"])
        return TrainState(step=optimizer["step"], model=model, opt_state=optimizer["state"])

    def _processes(self, step: int) -> int:
        """Return how many processes made a checkpoint: each saved its own position in its own part of the data."""
        return len(list((self.folder / str(step) / "data").glob("process_*-of-*.json")))

    def changes(self, step: int) -> list[str]:
        """Return what is said of going on from a checkpoint: changed settings, another number of processes."""
        old, new = experiment(read_config(self.folder / str(step))), experiment(self._config)
        changed = [
            f"{group}.{name} {old[group][name]} -> {value}"
            for group, settings in new.items()
            for name, value in settings.items()
            if old[group][name] != value
        ]
        said = [f"changed settings: {', '.join(changed)}"] if changed else []
        before, now = self._processes(step), jax.process_count()
        if before != now:
            said.append(f"{before} -> {now} processes, so the data start from the beginning in another order")
        return said


def find_checkpoint(path: str) -> epath.Path:
    """Return the folder of one checkpoint: ``path`` itself, or the newest complete one of the run at ``path``.

    Raises `UserError` for a path that holds none.
    """
    root = locate(path)
    if not root.exists():
        parent = root.parent
        others = [str(epath.Path(path).parent / other.name) for other in parent.iterdir()] if parent.is_dir() else []
        raise UserError(f"no checkpoint at {path}: there is no such folder{nearest(path, others)}")
    if (root / "model").exists() and (root / "config").exists():
        return root
    folder = root / "checkpoints" if (root / "checkpoints").is_dir() else root
    steps = ocp.utils.checkpoint_steps(folder) if folder.is_dir() else []
    complete = [step for step in steps if (folder / str(step) / "model").exists()]
    if not complete:
        raise UserError(f"no checkpoint at {path}: expected a run folder with checkpoints/STEP, as train.py writes it")
    return folder / str(max(complete))


def read_config(checkpoint: epath.Path) -> Config:
    """Read the config that travels in a checkpoint."""
    file = checkpoint / "config" / "metadata"
    try:
        return from_dict(json.loads(file.read_text()), Config)
    except (OSError, ValueError, RecursionError, UserError) as error:
        raise UserError(f"the checkpoint {checkpoint} has no readable config: {error}") from error


def load_model(path: str) -> tuple[Transformer, Config, epath.Path]:
    """Load the model of a checkpoint; return it with its config and its tokenizer's path.

    ``path`` is a run folder or one checkpoint in it. No model flag is needed: the config travels along, and so does
    the tokenizer, beside the checkpoint: no path that the config names is followed. Raises `UserError` where there is
    no checkpoint, or its weights cannot be read or are not those of its config.
    """
    folder = find_checkpoint(path)
    config = read_config(folder)
    abstract = jax.eval_shape(lambda: Transformer(config.model, rngs=nnx.Rngs(0)))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)
        for name, leaf in named_arrays(abstract).items()
    }
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            shapes = _stored_shapes(folder / "model")
        except Exception as error:  # whatever is stumbled over, it is in the files
            raise _unreadable(folder, error) from error
        for name in sorted(target.keys() | shapes.keys()):
            wanted = target[name].shape if name in target else "no such array"
            if shapes.get(name, "missing") != wanted:
                raise UserError(
                    f"the weights of the checkpoint {folder} are not those of its config: {name} is "
                    f"{shapes.get(name, 'missing')}, and from the config follows {wanted}"
                )
        try:
            arrays = checkpointer.restore(folder / "model", target)
        except Exception as error:
            raise _unreadable(folder, error) from error
    return with_arrays(abstract, arrays), config, folder.parent / TOKENIZER


def _stored_shapes(folder: epath.Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the arrays that orbax stored in ``folder``, from its index (OCDBT) and theirs (zarr).

    Not by orbax, whose threads each write a traceback of their own where the index is damaged.
    """
    base = str(folder) if is_remote(folder) else f"file://{urllib.parse.quote(str(folder))}"
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"{base}/"}).result()
    keys = [key for key in store.list().result() if key.endswith(b"/.zarray")]
    headers = {key.decode().removesuffix("/.zarray"): json.loads(store.read(key).result().value) for key in keys}
    return {name: tuple(header["shape"]) for name, header in headers.items()}


def _unreadable(folder: epath.Path, error: Exception) -> UserError:
    said = (str(error).splitlines() or [""])[0]
    return UserError(
        f"the weights of the checkpoint {folder} cannot be read ({type(error).__name__}: {said:.200}): it is damaged "
        "or incomplete; take another one"
    )


def store_swept(path: str, settings: dict[str, Any], measured: dict[str, Any]) -> epath.Path:
    """Store `DecodeConfig` fields that were found best, and what was measured with them; return the file."""
    file = find_checkpoint(path).parent / SWEPT
    file.write_text(json.dumps({"decode": settings, "measured": measured}, indent=1) + "\n")
    return file


def swept_settings(path: str, given: Collection[str]) -> dict[str, Any]:
    """Return what `store_swept` stored, without what gives way to settings that the user has ``given``.

    Mode, policy, exit and draft length go together: if the user gives one of them, none of them is taken from there.
    """
    file = find_checkpoint(path).parent / SWEPT
    if not file.exists():
        return {}
    try:
        settings = json.loads(file.read_text())["decode"]
        from_dict(settings, DecodeConfig)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, UserError) as error:
        raise UserError(f"{file} is not what python -m layerskip_jax.sweep writes ({error}): remove it") from error
    together = {"mode", "policy", "exit_layer", "draft_length", "exits"}
    left_out = set(given) | (together if together & set(given) else set())
    return {name: value for name, value in settings.items() if name not in left_out}
