"""Functions that the benchmarks share: a header that identifies a measurement, timing in turn, and ``--json FILE``."""

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from layerskip_jax.config import ModelConfig
from layerskip_jax.model import Transformer

T = TypeVar("T")

ROOT = Path(__file__).parent.parent
CODE = ("layerskip_jax", "benchmarks", "configs", "tpu")
LIBRARIES = ("jax", "jaxlib", "libtpu", "flax", "optax")
MODELS = {
    "narrow": ModelConfig(16, 128, 4, 4, 344, 2048, compute_dtype="float32"),
    "small": ModelConfig(12, 256, 4, 4, 688, 4096, compute_dtype="float32"),
    "medium": ModelConfig(12, 384, 6, 6, 1024, 8192, compute_dtype="float32"),
    "large": ModelConfig(16, 768, 12, 12, 2048, 32000, compute_dtype="float32"),
}
"""The models of the decoding benchmarks on CPU."""


def git(*arguments: str) -> str:
    """Return the output of git in this checkout, or "" without git or a checkout."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def commit() -> str:
    return git("rev-parse", "HEAD") or "no checkout"


def uncommitted_changes() -> str:
    """Return a digest of the uncommitted changes of the code, or "" if there are none."""
    status = git("status", "--porcelain", "--untracked-files=all", "--", *CODE)
    if not status:
        return ""
    untracked = [line[3:] for line in status.splitlines() if line.startswith("??")]
    contents = [(ROOT / name).read_bytes() for name in untracked if (ROOT / name).is_file()]
    parts = [status.encode(), git("diff", "HEAD", "--", *CODE).encode(), *contents]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


def short_commit() -> str:
    """Return the short commit, with a "+" if the code has uncommitted changes."""
    return (git("rev-parse", "--short=7", "HEAD") or "no checkout") + "+" * bool(uncommitted_changes())


def machine() -> str:
    if jax.default_backend() != "cpu":
        return f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores, {names[0] if names else platform.machine()}"


def command() -> str:
    """Return the command line of this process, as ``python -m benchmarks.NAME ...``."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"-m {spec.name}" if spec else sys.argv[0]
    return f"python {program} {shlex.join(sys.argv[1:])}".rstrip()


def installed(libraries: Sequence[str]) -> dict[str, str]:
    """Return the versions of those ``libraries`` that are installed."""
    versions = {}
    for name in libraries:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def header(*libraries: str) -> dict[str, Any]:
    """Print and return what identifies a measurement: command, versions, machine and commit.

    ``libraries`` are packages to name in addition to JAX's.
    """
    about = {
        "command": command(),
        "versions": {"Python": platform.python_version(), **installed([*LIBRARIES, *libraries])},
        "machine": machine(),
        "commit": commit(),
        "changes": uncommitted_changes(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }
    print(about["command"])
    print(", ".join(f"{name} {version}" for name, version in about["versions"].items()))
    changed = " with uncommitted changes" if about["changes"] else ""
    print(f"{about['machine']}; commit {about['commit'][:12]}{changed}; {about['date']}", flush=True)
    return about


@dataclasses.dataclass(frozen=True)
class Timings:
    """Seconds of each alternative, in the order of the turns."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, baseline: str) -> float:
        """Return the median over turns of the time of ``name`` over that of ``baseline``.

        Both times of a pair come from one turn, so that a slow phase of the machine affects both.
        """
        pairs = zip(self.seconds[name], self.seconds[baseline], strict=True)
        return statistics.median(ours / theirs for ours, theirs in pairs)


def called_in_turn(
    functions: Mapping[str, Callable[[], T]],
    turns: int,
    warm_up: int = 1,
    out_of_time: Callable[[], bool] = lambda: False,
) -> dict[str, list[T]]:
    """Call every function once per turn, in the order given; return the results of each over ``turns`` turns.

    Run ``warm_up`` turns first and drop their results. After the second of the other turns and each later one, stop if
    ``out_of_time`` returns True.
    """
    results: dict[str, list[T]] = {name: [] for name in functions}
    for turn in range(-warm_up, turns):
        for name, function in functions.items():
            result = function()
            if turn >= 0:
                results[name].append(result)
        if turn >= 1 and out_of_time():
            break
    return results


def timed_in_turn(
    functions: Mapping[str, Callable[[], Any]],
    turns: int,
    warm_up: int = 1,
    out_of_time: Callable[[], bool] = lambda: False,
) -> Timings:
    """Time every function as `called_in_turn` calls it. A call ends when its result is ready on the device."""

    def seconds(function: Callable[[], Any]) -> float:
        began = time.perf_counter()
        jax.block_until_ready(function())
        return time.perf_counter() - began

    timed = {name: partial(seconds, function) for name, function in functions.items()}
    return Timings(called_in_turn(timed, turns, warm_up, out_of_time))


def model_with_tail(config: ModelConfig, exit_layer: int, tail: float) -> Transformer:
    """Return a random model whose blocks after the exit add ``tail`` times as much to the residual stream.

    This sets the acceptance of drafts from that exit: with 0, those blocks are identities.
    """
    return scale_tail(Transformer(config, rngs=nnx.Rngs(0)), exit_layer, tail)


def scale_tail(model: Transformer, exit_layer: int, tail: float) -> Transformer:
    """Scale in place what the blocks after the exit add to the residual stream, and return the model."""
    scale_L = jnp.where(jnp.arange(model.config.num_layers) < exit_layer, 1.0, tail)
    model.blocks.output_NHD[...] *= scale_L[:, None, None, None]
    model.blocks.down_FD[...] *= scale_L[:, None, None]
    return model


def equal_tokens(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the number of equal leading tokens.

    >>> equal_tokens([1, 2, 3], [1, 2, 4]), equal_tokens([1], [1, 2])
    (2, 1)
    """
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def add_json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the header and all results to FILE")


def write_json(file: Path | None, about: Mapping[str, Any], results: Any) -> None:
    """Write the `header` and the results to the file of ``--json``."""
    if file is not None:
        replace_text(file, json.dumps(without_nan({"about": about, "results": results}), indent=1) + "\n")


def without_nan(value: Any) -> Any:
    """Return a value as JSON stores it, with null in place of NaN and infinity, which JSON lacks."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def replace_text(file: Path, text: str) -> None:
    """Write a file atomically: a reader, or a crash, never sees half of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
