"""One checkpoint: what is in it, and how it is read.

Arrays lie in orbax items under the names they have in the code (``blocks.query_DNH``), model and optimizer apart:
decoding reads the model alone. What is stored is data: nothing is unpickled or executed when it is read. Digests of
the arrays (`layerskip_jax.checkpoint.digests`), the config and the data position are stored with them and compared when
they are read.
`load_model` opens folders of Hugging Face Llamas (`layerskip_jax.checkpoint.huggingface`) as well.
"""

import dataclasses
import hashlib
import json
import urllib.parse
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from flax import nnx

from layerskip_jax.checkpoint.digests import digests
from layerskip_jax.checkpoint.huggingface.config_json import is_llama_folder, read_model_config
from layerskip_jax.checkpoint.huggingface.weights import WeightFiles
from layerskip_jax.config import Config, DecodeConfig, ModelConfig, from_dict
from layerskip_jax.data.load_tokenizer import tokenizer_in
from layerskip_jax.data.position import read_positions
from layerskip_jax.data.sentencepiece_tokenizer import TOKENIZER
from layerskip_jax.data.tokenizer import Tokenizer
from layerskip_jax.errors import UserError, nearest
from layerskip_jax.locations import is_remote, locate
from layerskip_jax.model import Block, DecodingBlock, Transformer, compute_dtype

SWEPT = "decode.json"
"""What `layerskip_jax.commands.sweep` recommends for a run, beside its checkpoints."""


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


class DamagedCheckpoint(UserError):  # noqa: N818  (as the user reads it)
    """A checkpoint does not hold what was written to it, or not all of it."""


def in_item(item: str, arrays: dict[str, Any]) -> dict[str, Any]:
    return {f"{item}: {name}": array for name, array in arrays.items()}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_of(values: Any) -> str:
    return sha256(json.dumps(values, sort_keys=True).encode())


def in_short(error: BaseException) -> str:
    """Return what was the cause of an error of orbax or tensorstore, in a line: its beginning, and its end."""
    while isinstance(error.__cause__, Exception) and str(error.__cause__):
        error = error.__cause__
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 300 else f"{line[:120]} ... {line[-180:]}"


def _read_json(folder: epath.Path, item: str) -> Any:
    try:
        return json.loads((folder / item / "metadata").read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"the checkpoint {folder} is damaged: no readable {item}: {error}") from error


def read_checksums(folder: epath.Path) -> dict[str, Any]:
    checksums = _read_json(folder, "checksums")
    kinds = {"arrays": dict, "config": str, "tokenizer": dict}
    if not isinstance(checksums, dict) or any(not isinstance(checksums.get(key), kind) for key, kind in kinds.items()):
        raise DamagedCheckpoint(f"the checkpoint {folder} is damaged: its checksums are not what was written")
    return checksums


def read_data_positions(folder: epath.Path) -> dict[int, Any]:
    try:
        return read_positions(folder / "batches")
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"the checkpoint {folder} is damaged: no data position: {error}") from error


def read_arrays(folder: epath.Path, abstract: dict[str, Any]) -> dict[str, jax.Array]:
    """Read one item: by its handler, since a process that fails would leave the others waiting at orbax's barriers."""
    try:
        return ocp.StandardCheckpointHandler().restore(folder, args=ocp.args.StandardRestore(abstract))
    except Exception as error:  # orbax, tensorstore and its drivers have no common one
        raise DamagedCheckpoint(
            f"the checkpoint {folder.parent} is damaged: {folder.name}: {in_short(error)}"
        ) from error


def wrong_array(folder: epath.Path, expected: dict[str, int], arrays: dict[str, jax.Array]) -> str:
    """Return what is said of an array that is not what was saved, or nothing."""
    found, _ = digests(arrays) if arrays else ({}, True)
    wrong = [name for name, value in found.items() if expected.get(name) != value]
    return f"the checkpoint {folder} is damaged: {wrong[0]} is not what was saved" if wrong else ""


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
    """Read the config that travels in a checkpoint; `DamagedCheckpoint` where it is not what was saved."""
    values = _read_json(checkpoint, "config")
    if sha256_of(values) != read_checksums(checkpoint)["config"]:
        raise DamagedCheckpoint(f"the checkpoint {checkpoint} is damaged: its config is not what was saved")
    try:
        return from_dict(values, Config)
    except UserError as error:
        raise UserError(f"the checkpoint {checkpoint} has no readable config: {error}") from error


def home(path: str) -> epath.Path:
    """Return the folder of what lies beside a model's weights: a Hugging Face folder itself, or RUN/checkpoints."""
    return locate(path) if is_llama_folder(path) else find_checkpoint(path).parent


def run_folder(path: str) -> epath.Path:
    """Return the folder that holds a model and what is drawn of it: a Hugging Face folder itself, or RUN."""
    return home(path) if is_llama_folder(path) else home(path).parent


def config_of(path: str) -> Config:
    """Return the config of a run, a checkpoint, or a Hugging Face folder, which knows of the model alone."""
    if is_llama_folder(path):
        return Config(model=read_model_config(home(path)))
    return read_config(find_checkpoint(path))


def context_length(config: Config) -> int:
    """Return the length of the longest text that a model is made for [tokens]: by its own word, or as trained."""
    return config.model.context_length or config.data.sequence_length


def load_weights(path: str, target: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Read the named arrays of a stacked model into the shapes, types and shardings of ``target``.

    Each process reads what its devices hold, and no array twice. Raises `UserError` where weights are not those of
    their config, and `DamagedCheckpoint` where they, or the tokenizer, are not what was saved.
    """
    if is_llama_folder(path):
        files = WeightFiles(home(path), read_model_config(home(path)))
        return {name: files.array(name, leaf) for name, leaf in target.items()}
    folder = find_checkpoint(path)
    checksums = read_checksums(folder)
    check_shapes(folder, {name: leaf.shape for name, leaf in target.items()})
    arrays = read_arrays(folder / "model", target)
    problem = wrong_array(folder, checksums["arrays"], in_item("model", arrays))
    for name, digest in checksums["tokenizer"].items():
        file = folder.parent / epath.Path(name).name
        if not problem and file.exists() and sha256(file.read_bytes()) != digest:
            problem = f"{file} is damaged: it is not the one that the model was trained with"
    if problem:
        raise DamagedCheckpoint(problem)
    return arrays


def load_model(path: str, *, unstacked: bool = False) -> tuple[Transformer, Config, epath.Path]:
    """Load a model; return it with its config and its tokenizer's path.

    ``path`` is a run folder, one checkpoint in it, or a local folder of a Hugging Face Llama. No model flag is needed:
    the config travels along, and so does the tokenizer, beside the weights: no path that the config names is followed.
    Raises as `load_weights` does. With ``unstacked`` the model is as `Transformer.unstacked` returns it; from a Hugging
    Face folder it is then read block by block in the compute type, with no other copy.
    """
    config = config_of(path)
    tokenizer = tokenizer_in(home(path)) or home(path) / TOKENIZER
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


def check_shapes(folder: epath.Path, wanted: dict[str, tuple[int, ...]]) -> None:
    """Compare the arrays that a checkpoint holds with those that follow from its config."""
    try:
        shapes = _stored_shapes(folder / "model")
    except Exception as error:  # whatever is stumbled over, it is in the files
        raise DamagedCheckpoint(f"the checkpoint {folder} is damaged: {in_short(error)}") from error
    for name in sorted(wanted.keys() | shapes.keys()):
        stored, follows = shapes.get(name, "missing"), wanted.get(name, "no such array")
        if stored != follows:
            raise UserError(
                f"the weights of the checkpoint {folder} are not those of its config: {name} is {stored}, and from the "
                f"config follows {follows}"
            )


def _stored_shapes(folder: epath.Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the arrays that orbax stored in ``folder``, from its index (OCDBT) and theirs (zarr).

    Not by orbax, whose threads each write a traceback of their own where the index is damaged.
    """
    base = str(folder) if is_remote(folder) else f"file://{urllib.parse.quote(str(folder))}"
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"{base}/"}).result()
    keys = [key for key in store.list().result() if key.endswith(b"/.zarray")]
    headers = {key.decode().removesuffix("/.zarray"): json.loads(store.read(key).result().value) for key in keys}
    return {name: tuple(header["shape"]) for name, header in headers.items()}


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
    except (OSError, ValueError, KeyError, TypeError, RecursionError, UserError) as error:
        raise UserError(f"{file} is not what python -m layerskip_jax sweep writes ({error}): remove it") from error
    together = {"mode", "policy", "exit_layer", "draft_length", "exits"}
    left_out = set(given) | (together if together & set(given) else set())
    return {name: value for name, value in settings.items() if name not in left_out}
