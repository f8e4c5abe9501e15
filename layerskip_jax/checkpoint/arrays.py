"""Arrays of a model by name, and how they are read from one orbax item of a checkpoint."""

import json
import urllib.parse
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from flax import nnx

from layerskip_jax.checkpoint.digests import digests
from layerskip_jax.config import ModelConfig
from layerskip_jax.errors import UserError, bucket_error
from layerskip_jax.locations import is_remote
from layerskip_jax.model import Transformer
from layerskip_jax.sharding import named_shardings


class DamagedCheckpoint(UserError):  # noqa: N818  (named after what happened, like StopIteration)
    """The files of a checkpoint were changed after the save, or some are missing."""


def unreadable(problem: str, error: Exception) -> UserError:
    """Return `DamagedCheckpoint`, or `UserError` if a bucket does not answer: the checkpoint may then be intact."""
    refused = bucket_error(error)
    return UserError(f"the bucket cannot be used: {summarize(refused)}") if refused else DamagedCheckpoint(problem)


def named_arrays(tree: Any) -> dict[str, Any]:
    """Flatten a tree of Params and arrays to ``{"blocks.query_DNH": array}``, in the order of its leaves."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    named = {}
    for path, leaf in leaves:
        for array in jax.tree.leaves(leaf):  # none for a parameter that an optimizer masks
            named[jax.tree_util.keystr(path, simple=True, separator=".")] = array
    return named


def with_arrays(tree: Any, arrays: dict[str, Any]) -> Any:
    """Return ``tree`` with its leaves replaced by name: the inverse of `named_arrays`."""
    return jax.tree.unflatten(jax.tree.structure(tree), [arrays[name] for name in named_arrays(tree)])


def stacked_model(
    config: ModelConfig, read: Callable[[dict[str, jax.ShapeDtypeStruct]], dict[str, jax.Array]]
) -> Transformer:
    """Build a stacked model from the arrays that ``read`` returns for the result of `placed_arrays`."""
    abstract = jax.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    return with_arrays(abstract, read(placed_arrays(abstract)))


def placed_arrays(module: nnx.Module) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape, type and sharding of each array of ``module``.

    Without a current mesh, each array goes to the first device.
    """
    arrays, mesh = named_arrays(module), jax.sharding.get_mesh()
    places = dict.fromkeys(arrays, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    if not mesh.empty:
        places = named_arrays(named_shardings(module, module, mesh))
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[name]) for name, x in arrays.items()}


def prefix_names(item: str, arrays: dict[str, Any]) -> dict[str, Any]:
    """Return ``{"ITEM: NAME": array}``, the names under which digests are stored."""
    return {f"{item}: {name}": array for name, array in arrays.items()}


def read_arrays(folder: epath.Path, target: dict[str, Any]) -> dict[str, jax.Array]:
    """Read the orbax item in ``folder`` into the shapes, types and shardings of ``target``.

    Raises `DamagedCheckpoint` for files that cannot be read.
    """
    # A Checkpointer would wait for all processes at barriers, and would hang if one of them fails.
    try:
        return ocp.StandardCheckpointHandler().restore(folder, args=ocp.args.StandardRestore(target))
    except Exception as error:  # orbax, tensorstore and its drivers share no base class
        raise unreadable(
            f"the checkpoint {folder.parent} is damaged: {folder.name}: {summarize(error)}", error
        ) from error


def corrupted_array(folder: epath.Path, expected: dict[str, int], arrays: dict[str, jax.Array]) -> str:
    """Return an error that names the first array whose digest is not the ``expected`` one, or ""."""
    found, _ = digests(arrays) if arrays else ({}, True)
    corrupted = [name for name, value in found.items() if expected.get(name) != value]
    return f"the checkpoint {folder} is damaged: {corrupted[0]} is not what was saved" if corrupted else ""


def check_shapes(folder: epath.Path, wanted: dict[str, tuple[int, ...]]) -> None:
    """Raise `UserError` unless the model in a checkpoint has exactly the arrays that its config implies."""
    try:
        shapes = _stored_shapes(folder / "model")
    except Exception as error:  # any error here comes from damaged files, or from a bucket that does not answer
        raise unreadable(f"the checkpoint {folder} is damaged: {summarize(error)}", error) from error
    for name in sorted(wanted.keys() | shapes.keys()):
        stored, follows = shapes.get(name, "missing"), wanted.get(name, "no such array")
        if stored != follows:
            raise UserError(
                f"the weights of the checkpoint {folder} do not match its config: {name} is {stored}, but the config "
                f"implies {follows}"
            )


def _stored_shapes(folder: epath.Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the arrays in an orbax item, from the index (OCDBT) and the headers of the arrays (zarr).

    Orbax 0.12.8 can read them too, but where the index is damaged each of its threads prints a traceback. We found no
    upstream issue about it.
    """
    base = str(folder) if is_remote(folder) else f"file://{urllib.parse.quote(str(folder))}"
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"{base}/"}).result()
    keys = [key for key in store.list().result() if key.endswith(b"/.zarray")]
    headers = {key.decode().removesuffix("/.zarray"): json.loads(store.read(key).result().value) for key in keys}
    return {name: tuple(header["shape"]) for name, header in headers.items()}


def summarize(error: BaseException) -> str:
    """Return one line about the root cause of an error of orbax or tensorstore, shortened in the middle."""
    while isinstance(error.__cause__, Exception) and str(error.__cause__):
        error = error.__cause__
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 300 else f"{line[:120]} ... {line[-180:]}"
