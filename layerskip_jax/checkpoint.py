"""One checkpoint: what is in it, and how it is read.

Arrays lie in orbax items under the names they have in the code (``blocks.query_DNH``), model and optimizer apart:
decoding reads the model alone. What is stored is data: nothing is unpickled or executed when it is read. Digests of the
arrays (`layerskip_jax.digests`), the config and the data position lie beside them and are compared when they are read.
"""

import hashlib
import json
from collections.abc import Collection
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx

from layerskip_jax.config import Config, DecodeConfig, from_dict
from layerskip_jax.data.position import read_positions
from layerskip_jax.digests import digests
from layerskip_jax.errors import UserError, nearest
from layerskip_jax.model import Transformer

TOKENIZER = "tokenizer.model"
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
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"the checkpoint {folder} is damaged: no readable {item}: {error}") from error


def read_checksums(folder: epath.Path) -> dict[str, Any]:
    checksums = _read_json(folder, "checksums")
    kinds = {"arrays": dict, "config": str, "tokenizer": str}
    if not isinstance(checksums, dict) or any(not isinstance(checksums.get(key), kind) for key, kind in kinds.items()):
        raise DamagedCheckpoint(f"the checkpoint {folder} is damaged: its checksums are not what was written")
    return checksums


def read_data_positions(folder: epath.Path) -> dict[int, Any]:
    try:
        return read_positions(folder / "data")
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
    """Read the config that travels in a checkpoint; `DamagedCheckpoint` where it is not what was saved."""
    values = _read_json(checkpoint, "config")
    if sha256_of(values) != read_checksums(checkpoint)["config"]:
        raise DamagedCheckpoint(f"the checkpoint {checkpoint} is damaged: its config is not what was saved")
    return from_dict(values, Config)


def load_model(path: str) -> tuple[Transformer, Config, epath.Path]:
    """Load the model of a checkpoint; return it with its config and its tokenizer's path.

    ``path`` is a run folder or one checkpoint in it. No model flag is needed: the config travels along. Raises
    `DamagedCheckpoint` where it, or the tokenizer, is not what was saved.
    """
    folder = find_checkpoint(path)
    config, checksums, tokenizer = read_config(folder), read_checksums(folder), folder.parent / TOKENIZER
    abstract = jax.eval_shape(lambda: Transformer(config.model, rngs=nnx.Rngs(0)))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)
        for name, leaf in named_arrays(abstract).items()
    }
    arrays = read_arrays(folder / "model", target)
    problem = wrong_array(folder, checksums["arrays"], in_item("model", arrays))
    if not problem and tokenizer.exists() and sha256(tokenizer.read_bytes()) != checksums["tokenizer"]:
        problem = f"{tokenizer} is damaged: it is not the one that the model was trained with"
    if problem:
        raise DamagedCheckpoint(problem)
    return with_arrays(abstract, arrays), config, tokenizer


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
    except (OSError, ValueError, KeyError, TypeError, UserError) as error:
        raise UserError(f"{file} is not what python -m layerskip_jax.sweep writes ({error}): remove it") from error
    together = {"mode", "policy", "exit_layer", "draft_length", "exits"}
    left_out = set(given) | (together if together & set(given) else set())
    return {name: value for name, value in settings.items() if name not in left_out}
