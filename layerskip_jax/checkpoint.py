"""Checkpoints through orbax: model, optimizer, data position and config together, saved asynchronously.

Arrays are saved under the names they have in the code (``blocks.query_DNH``), in separate items, so that decoding
reads the model alone. What is stored is data: nothing is unpickled or executed when it is read. `load_model` opens
folders of Hugging Face Llamas (`layerskip_jax.llama`) as well.
"""

import dataclasses
import json
from collections.abc import Callable, Collection, Iterator
from typing import Any

import grain
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx

from layerskip_jax.config import Config, DecodeConfig, ModelConfig, experiment, from_dict
from layerskip_jax.data.position import Position
from layerskip_jax.data.tokenizer import Tokenizer, tokenizer_in
from layerskip_jax.errors import UserError, nearest
from layerskip_jax.llama.config_json import is_llama_folder, read_model_config
from layerskip_jax.llama.weights import WeightFiles
from layerskip_jax.model import Block, DecodingBlock, Transformer, compute_dtype
from layerskip_jax.train_step import TrainState

SWEPT = "decode.json"
"""What `layerskip_jax.sweep` recommends for a run, beside its checkpoints."""


def checkpoint_folder(config: Config) -> epath.Path:
    """Return where the run of ``config`` keeps its checkpoints: ``RUN_DIR/checkpoints``."""
    return epath.Path(config.train.run_dir).expanduser().resolve() / "checkpoints"


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
        path = tokenizer_in(self.folder)
        if path and Tokenizer.load(str(path)).files != tokenizer.files:
            raise UserError(
                f"the run {self._config.train.run_dir} was trained with another tokenizer than "
                f"{self._config.data.tokenizer}: continue with --data.tokenizer {path}, or start a new --train.run_dir"
            )

    def keep_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Put the tokenizer beside the checkpoints, so that they need no other file."""
        if jax.process_index() == 0:
            for name, content in tokenizer.files.items():
                (self.folder / name).write_bytes(content)

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
        for name, old, new in differences(saved.model, self._config.model):
            raise UserError(
                f"the checkpoint {self.folder / str(step)} has model.{name} {old}, but the config says "
                f"{new}: continue with --model.{name} {old}, or start a new run with another --train.run_dir"
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


def differences(saved: ModelConfig, wanted: ModelConfig) -> Iterator[tuple[str, Any, Any]]:
    """Yield name and both values of the settings in which two models are not the same function of their weights."""
    for field in dataclasses.fields(saved):
        old, new = getattr(saved, field.name), getattr(wanted, field.name)
        if old != new and field.name not in ("compute_dtype", "attention", "context_length"):
            yield field.name, old, new


def find_checkpoint(path: str) -> epath.Path:
    """Return the folder of one checkpoint: ``path`` itself, or the newest complete one of the run at ``path``.

    Raises `UserError` for a path that holds none.
    """
    root = epath.Path(path).expanduser().resolve()
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
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"the checkpoint {checkpoint} has no readable config: {error}") from error


def home(path: str) -> epath.Path:
    """Return the folder of what lies beside a model's weights: a Hugging Face folder itself, or RUN/checkpoints."""
    return epath.Path(path).expanduser().resolve() if is_llama_folder(path) else find_checkpoint(path).parent


def run_folder(path: str) -> epath.Path:
    """Return the folder that holds a model and what is drawn of it: a Hugging Face folder itself, or RUN."""
    return home(path) if is_llama_folder(path) else home(path).parent


def config_of(path: str) -> Config:
    """Return the config of a run, a checkpoint, or a Hugging Face folder, which knows of the model alone."""
    if is_llama_folder(path):
        return Config(model=read_model_config(home(path)))
    return read_config(find_checkpoint(path))


def load_weights(path: str, target: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Read the named arrays of a stacked model into the shapes, types and shardings of ``target``.

    Each process reads what its devices hold, and no array twice.
    """
    if is_llama_folder(path):
        files = WeightFiles(home(path), read_model_config(home(path)))
        return {name: files.array(name, leaf) for name, leaf in target.items()}
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(find_checkpoint(path) / "model", target)


def load_model(path: str, *, unstacked: bool = False) -> tuple[Transformer, Config, epath.Path]:
    """Load a model; return it with its config and its tokenizer's path.

    ``path`` is a run folder, one checkpoint in it, or a local folder of a Hugging Face Llama. No model flag is needed:
    the config travels along. With ``unstacked`` the model is as `Transformer.unstacked` returns it; from a Hugging Face
    folder it is then read block by block in the compute type, with no other copy.
    """
    config = config_of(path)
    tokenizer = tokenizer_in(home(path)) or home(path) / "tokenizer.model"
    if unstacked and is_llama_folder(path):
        return _read_unstacked(WeightFiles(home(path), config.model), config.model), config, tokenizer
    abstract = jax.eval_shape(lambda: Transformer(config.model, rngs=nnx.Rngs(0)))
    target = {name: _on_one_device(leaf) for name, leaf in named_arrays(abstract).items()}
    model = with_arrays(abstract, load_weights(path, target))
    return model.unstacked() if unstacked else model, config, tokenizer


def _on_one_device(leaf: Any, dtype: jnp.dtype | None = None) -> jax.ShapeDtypeStruct:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if dtype is None else dtype, sharding=device)


def _read_unstacked(files: WeightFiles, config: ModelConfig) -> Transformer:
    def read(module: Any, prefix: str, names: Collection[str]) -> dict[str, jax.Array]:
        leaves = {name: leaf for name, leaf in named_arrays(module).items() if name in names}
        types = {name: compute_dtype(config) if leaf.ndim > 1 else leaf.dtype for name, leaf in leaves.items()}
        return {name: files.array(prefix + name, _on_one_device(leaf, types[name])) for name, leaf in leaves.items()}

    model = jax.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    block = jax.eval_shape(lambda: Block(config, rngs=nnx.Rngs(0)))
    of_block = named_arrays(block)
    layers = range(config.num_layers)
    model.blocks = nnx.List([DecodingBlock(with_arrays(block, read(block, f"blocks.{k}.", of_block))) for k in layers])
    whole = named_arrays(model)
    return with_arrays(model, whole | read(model, "", [name for name in whole if not name.startswith("blocks.")]))


def initial_model(config: Config, tokenizer: Tokenizer, abstract: Transformer) -> Callable[[], Transformer]:
    """Check that the weights of ``train.init_from`` are those of the config's model; return how to read them.

    Raises `UserError` for another model or another tokenizer.
    """
    path = config.train.init_from
    for name, old, new in differences(config_of(path).model, config.model):
        raise UserError(
            f"the weights of {path} (train.init_from) have model.{name} {old}, but the config says {new}: set "
            f"--model.{name} {old}"
        )
    for name, content in tokenizer.files.items():
        kept = home(path) / name
        if kept.is_file() and kept.read_bytes() != content:
            raise UserError(
                f"{config.data.tokenizer} (data.tokenizer) is another one than that of {path} (train.init_from): set "
                f"--data.tokenizer {kept}"
            )
    return lambda: with_arrays(abstract, load_weights(path, named_arrays(abstract)))


def store_swept(path: str, settings: dict[str, Any], measured: dict[str, Any]) -> epath.Path:
    """Store `DecodeConfig` fields that were found best, and what was measured with them; return the file."""
    file = home(path) / SWEPT
    file.write_text(json.dumps({"decode": settings, "measured": measured}, indent=1) + "\n")
    return file


def swept_settings(path: str, given: Collection[str]) -> dict[str, Any]:
    """Return what `store_swept` stored, without what gives way to settings that the user has ``given``.

    Mode, policy, exit and draft length go together: if the user gives one of them, none of them is taken from there.
    """
    file = home(path) / SWEPT
    if not file.exists():
        return {}
    try:
        settings = json.loads(file.read_text())["decode"]
        from_dict(settings, DecodeConfig)
    except (OSError, ValueError, KeyError, TypeError, UserError) as error:
        raise UserError(f"{file} is not what python -m layerskip_jax.sweep writes ({error}): remove it") from error
    together = {"mode", "policy", "exit_layer", "draft_length", "exits"}
    left_out = set(given) | (together if together & set(given) else set())
    return {name: value for name, value in settings.items() if name not in left_out}
