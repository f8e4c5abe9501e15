"""What one GPU or TPU host measures within minutes: ``python -m benchmarks.accelerator [--minutes 8] [--out FOLDER]``.

Sections, in this order:

    device     what is measured here, by which versions, from which commit
    rates      matrix products and memory of one device, beside its data sheet
    attention  every backend against XLA's, and its time
    training   a step of a 1.5B model, or of the largest that fits, under each recipe; on all devices
    decoding   a 1.5B model with random weights: plain, and self-speculative at forced acceptances; on one device
    trained    12 layers x 768 trained on the standard library for what is left of the time: exits, and speed-up

Every part is saved to FOLDER/<device>.json when it is measured, and FOLDER/<device>.md has the tables. A second call
with the same device, versions and commit measures what is missing; with others it replaces the file. Delete the file to
measure all of it again. A part that fails is noted in one line, and the next one follows; the exit status is then 1.
``--tiny`` runs every part on tiny shapes, on any machine, to see that all of it works.
"""

import argparse
import gc
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax

from benchmarks.accelerator_decoding import decoding, trained
from benchmarks.accelerator_page import page
from benchmarks.accelerator_sizes import FULL, TINY, Bench, Measured
from benchmarks.accelerator_training import BACKENDS, attention, memory_of, rates, training
from layerskip_jax.command_line import make_parser, number
from layerskip_jax.errors import UserError, run_command

PARTS: dict[str, Callable[[Bench], Measured]] = {
    "rates": rates,
    **{f"attention/{backend}": partial(attention, backend) for backend in BACKENDS},
    "training": training,
    **{f"decoding/{rows}": partial(decoding, rows) for rows in (1, 8)},
    "trained": trained,
}
"""What is measured after ``device``, by section and part."""

LIBRARIES = re.compile(r"jax|jaxlib|flax|optax|libtpu|jax-cuda\d+-(plugin|pjrt)|nvidia-cudnn-cu\d+|nvidia-cublas.*")
ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "XLA_PYTHON_CLIENT_MEM_FRACTION")
SAME = ("kind", "count", "tiny", "python", "versions", "commit", "changed", "environment")
"""What must be the same for a second call to go on where the first one ended."""


def describe(options: argparse.Namespace) -> Measured:
    """Return the section ``device``: the machine, the versions and the code."""
    devices, commit = jax.local_devices(), options.commit
    installed = {distribution.name or "" for distribution in importlib.metadata.distributions()}
    versions = {name: importlib.metadata.version(name) for name in sorted(filter(LIBRARIES.fullmatch, installed))}
    memory = memory_of(devices[0])
    return {
        "kind": devices[0].device_kind, "platform": devices[0].platform, "count": len(devices), "tiny": options.tiny,
        "memory_bytes": memory if math.isfinite(memory) else None, "runtime": devices[0].client.platform_version,
        "host": f"{os.cpu_count()} cores, {platform.machine()}", "python": platform.python_version(),
        "versions": versions, "commit": commit or git("rev-parse", "HEAD") or "no checkout",
        # Of the code alone: the results are written into the same checkout.
        "changed": not commit and bool(git("status", "--porcelain", "--", "layerskip_jax", "benchmarks", "configs")),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        # Without the folder of the results and the commit: they change nothing that is measured.
        "command": f"python -m benchmarks.accelerator --minutes {options.minutes:g}{' --tiny' * options.tiny}",
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }  # fmt: skip


def git(*arguments: str) -> str:
    """Return what git says of the checkout of this file, nothing if there is no git or no checkout."""
    folder = Path(__file__).parent.parent
    try:
        said = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return said.stdout.strip()


class Results:
    """The file of a device: what was measured, skipped or failed, saved whole after every part, with its page."""

    def __init__(self, folder: Path, device: Measured):
        name = re.sub(r"[^a-z0-9]+", "-", device["kind"].lower()).strip("-")
        name += f"-x{device['count']}" if device["count"] > 1 else ""
        self.file = folder / f"{name}{'-tiny' if device['tiny'] else ''}.json"
        self.kept = {"device": device, "parts": {}}
        before = self._read()
        if before and all(before["device"].get(key) == device[key] for key in SAME):
            self.kept = before
        elif before:
            print(f"{self.file} is of other versions or another commit: measuring all of it again", flush=True)

    def _read(self) -> dict[str, Any] | None:
        if not self.file.exists():
            return None
        try:
            kept = json.loads(self.file.read_text(encoding="utf-8"))
            return {"device": kept["device"], "parts": kept["parts"]}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.file} is no results file: {one_line(error)}; delete it") from error

    def measured(self, part: str) -> Measured | None:
        """Return what was measured of a part, None where it was not or has failed."""
        return self.kept["parts"].get(part, {}).get("measured")

    def seconds(self, part: str) -> float:
        """Return how long a part took, 0 where it was not measured."""
        outcome = self.kept["parts"].get(part, {})
        return outcome["seconds"] if "measured" in outcome else 0.0

    def keep(self, part: str, outcome: Measured) -> None:
        self.kept["parts"][part] = outcome
        # JSON has no NaN, which the acceptance is where nothing was drafted.
        strict = json.loads(json.dumps(self.kept), parse_constant=lambda _: None)
        self._write(self.file, json.dumps(strict, indent=1, allow_nan=False) + "\n")
        self._write(self.file.with_suffix(".md"), page(strict))

    @staticmethod
    def _write(file: Path, text: str) -> None:
        begun = file.with_name(f"{file.name}.begun")
        begun.write_text(text, encoding="utf-8")
        begun.replace(file)


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def outcome_of(part: str, bench: Bench, needed: float) -> Measured:
    """Measure a part that needs so many seconds; return what came out, or in one line why nothing did."""
    left = bench.left()
    if left < needed:
        return {"skipped": f"needs about {needed:.0f} s, and {max(0.0, left):.0f} s were left"}
    began = time.monotonic()
    try:
        measured = PARTS[part](bench)
    except UserError as error:
        return {"skipped": str(error)}  # not possible here
    except Exception as error:  # whatever it is, the other parts are worth having
        return {"error": one_line(error), "seconds": time.monotonic() - began}
    return {"measured": measured, "seconds": time.monotonic() - began}


def measure_all(bench: Bench, results: Results) -> None:
    """Measure every part that is not in ``results`` yet, and keep each at once."""
    for part in PARTS:
        if results.measured(part) is None:
            section = part.split("/")[0]
            took = [results.seconds(other) for other in PARTS if other.split("/")[0] == section]
            print(f"{part}: {bench.left():.0f} s left", flush=True)
            outcome = outcome_of(part, bench, max(bench.sizes.needs[section], *took))
            results.keep(part, outcome)
            for word in ("skipped", "error"):
                if word in outcome:
                    print(f"{part}: {word}: {outcome[word]}", flush=True)
            gc.collect()  # before the next part wants the memory
        bench.measured[part] = results.measured(part) or {}


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line; raises `UserError` for what is wrong in it."""
    parser = make_parser((__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=number, default=8.0, help="the time for all of it (default: 8)")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on any machine: does it run?")
    parser.add_argument("--out", type=Path, default=Path("docs/results/accelerator"), metavar="FOLDER",
                        help="of the results (default: docs/results/accelerator)")  # fmt: skip
    parser.add_argument("--commit", metavar="ID", help="of the code, where it is a copy without git")
    options = parser.parse_known_options(argv)
    if options.minutes <= 0:
        raise UserError(f"--minutes must be positive, not {options.minutes:g}")
    return options


def make_folder(folder: Path) -> None:
    """Make the folder of the results; raises `UserError` where nothing can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written: {error}") from error


def main(argv: list[str] | None = None) -> None:
    began = time.monotonic()
    options = parse(sys.argv[1:] if argv is None else argv)
    # JAX takes three quarters of a GPU's memory otherwise. It reads this when it first sees the device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    if jax.default_backend() == "cpu" and not options.tiny:
        raise UserError("this measures a GPU or a TPU, and JAX sees none here: give --tiny to try it on a CPU")
    make_folder(options.out)
    if jax.default_backend() == "cpu":
        jax.config.update("jax_disable_most_optimizations", True)  # compiles in half the time
    # The compiler for TPU takes minutes over JAX's own random numbers for a large model, and seconds over these.
    jax.config.update("jax_default_prng_impl", "unsafe_rbg")
    device = describe(options)
    results = Results(options.out, device)
    print(f"{device['count']} x {device['kind']}, jax {jax.__version__}, commit {device['commit'][:12]}", flush=True)
    measure_all(Bench(TINY if options.tiny else FULL, began + 60 * options.minutes), results)
    print(f"{results.file} and {results.file.with_suffix('.md').name}: {time.monotonic() - began:.0f} s")
    if any("error" in outcome for outcome in results.kept["parts"].values()):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
