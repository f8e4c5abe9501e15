"""Measure a GPU or TPU host in minutes: ``python -m benchmarks.accelerator [--minutes 8] [--out FOLDER]``.

Sections, in this order:

    device     the hardware, the versions and the commit
    rates      matmul and memory throughput of one device, and its data sheet
    attention  every backend: its error against XLA's float32 attention, and its time
    training   the step of a 1.5B model, or of the largest that fits, with each recipe; on all devices
    decoding   a 1.5B model with random weights: plain, and self-speculative with forced acceptance; on one device
    trained    12 layers x 768, trained on the standard library for up to 40 % of the time left: its exits and speedup

Each part is saved to FOLDER/<device>.json as soon as it is measured; FOLDER/<device>.md shows the tables. A second call
with the same device, versions and commit measures only the missing parts. With others, it replaces the file, except
from a tree with uncommitted changes: that is an error. Delete the file to measure everything again.

A part that this device cannot run is recorded as skipped. A part that fails is recorded as an error, the next one
follows, and the exit status is 1. ``--tiny`` runs all parts with tiny shapes on any machine, as a test.
"""

import argparse
import gc
import importlib.metadata
import json
import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax

from benchmarks.accelerator_decoding import decoding, trained
from benchmarks.accelerator_page import page
from benchmarks.accelerator_sizes import FULL, TINY, Bench, ImpossibleHereError, Measured
from benchmarks.accelerator_training import BACKENDS, attention, memory_of, rates, training
from benchmarks.common import commit, replace_text, uncommitted_changes, without_nan
from layerskip_jax.command_line import make_parser, number
from layerskip_jax.errors import UserError, run_command

PARTS: dict[str, Callable[[Bench], Measured]] = {
    "rates": rates,
    **{f"attention/{backend}": partial(attention, backend) for backend in BACKENDS},
    "training": training,
    **{f"decoding/{rows}": partial(decoding, rows) for rows in (1, 8)},
    "trained": trained,
}
"""The functions that measure, by ``section/part``."""

LIBRARIES = re.compile(r"jax|jaxlib|flax|optax|libtpu|jax-cuda\d+-(plugin|pjrt)|nvidia-cudnn-cu\d+|nvidia-cublas.*")
ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "XLA_PYTHON_CLIENT_MEM_FRACTION")
STATE = ("kind", "count", "tiny", "python", "versions", "commit", "changed", "changes", "environment")
"""Fields of ``device`` that must be equal for a second call to add to the results of the first."""


def describe(options: argparse.Namespace) -> Measured:
    """Return the section ``device``: the machine, the versions and the code."""
    devices = jax.local_devices()
    installed = {distribution.name or "" for distribution in importlib.metadata.distributions()}
    versions = {name: importlib.metadata.version(name) for name in sorted(filter(LIBRARIES.fullmatch, installed))}
    memory = memory_of(devices[0])
    changes = "" if options.commit else uncommitted_changes()
    return {
        "kind": devices[0].device_kind, "platform": devices[0].platform, "count": len(devices), "tiny": options.tiny,
        "memory_bytes": memory if math.isfinite(memory) else None, "runtime": devices[0].client.platform_version,
        "host": f"{os.cpu_count()} cores, {platform.machine()}", "python": platform.python_version(),
        "versions": versions, "commit": options.commit or commit(), "changed": bool(changes),
        **({"changes": changes} if changes else {}),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        # Without --out and --commit, which do not affect the measurements.
        "command": f"python -m benchmarks.accelerator --minutes {options.minutes:g}{' --tiny' * options.tiny}",
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }  # fmt: skip


class Results:
    """The results file of a device: every part as measured, skipped or failed. Each `keep` saves it, and its page."""

    def __init__(self, folder: Path, device: Measured):
        name = re.sub(r"[^a-z0-9]+", "-", device["kind"].lower()).strip("-")
        name += f"-x{device['count']}" if device["count"] > 1 else ""
        self.file = folder / f"{name}{'-tiny' if device['tiny'] else ''}.json"
        self.kept = {"device": device, "parts": {}}
        stored = self._read()
        if stored is None:
            return
        if all(stored["device"].get(key) == device.get(key) for key in STATE):
            self.kept = stored
        elif device["changed"]:
            raise UserError(
                f"{self.file} holds results of another state of the code or the machine, and this tree has uncommitted "
                "changes: commit them, or give another --out"
            )
        else:
            print(f"{self.file} is from other versions or another commit: measuring everything again", flush=True)

    def _read(self) -> dict[str, Any] | None:
        if not self.file.exists():
            return None
        try:
            kept = json.loads(self.file.read_text(encoding="utf-8"))
            return {"device": kept["device"], "parts": kept["parts"]}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.file} is not a results file: {one_line(error)}; delete it") from error

    def measured(self, part: str) -> Measured | None:
        """Return the figures of a part, or None if it was not measured or failed."""
        return self.kept["parts"].get(part, {}).get("measured")

    def seconds(self, part: str) -> float:
        """Return the time that a part took, or 0 if it was not measured."""
        outcome = self.kept["parts"].get(part, {})
        return outcome["seconds"] if "measured" in outcome else 0.0

    def keep(self, part: str, outcome: Measured) -> None:
        self.kept["parts"][part] = outcome
        strict = without_nan(self.kept)  # the acceptance is NaN if nothing was drafted
        replace_text(self.file, json.dumps(strict, indent=1) + "\n")
        replace_text(self.file.with_suffix(".md"), page(strict))


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def run_part(part: str, bench: Bench, needed: float) -> Measured:
    """Measure a part that takes about ``needed`` seconds; return its figures, or in one line why there are none."""
    left = bench.left()
    if left < needed:
        return {"skipped": f"needs about {needed:.0f} s, and {max(0.0, left):.0f} s were left"}
    began = time.monotonic()
    try:
        measured = PARTS[part](bench)
    except ImpossibleHereError as error:
        return {"skipped": str(error)}
    except Exception as error:  # any failure, because the other parts are still worth measuring
        return {"error": one_line(error), "seconds": time.monotonic() - began}
    return {"measured": measured, "seconds": time.monotonic() - began}


def measure_all(bench: Bench, results: Results) -> None:
    """Measure the parts that ``results`` lacks, and save each as soon as it is measured."""
    for part in PARTS:
        if results.measured(part) is None:
            section = part.split("/")[0]
            took = [results.seconds(other) for other in PARTS if other.split("/")[0] == section]
            print(f"{part}: {bench.left():.0f} s left", flush=True)
            outcome = run_part(part, bench, max(bench.sizes.needs[section], *took))
            results.keep(part, outcome)
            for word in ("skipped", "error"):
                if word in outcome:
                    print(f"{part}: {word}: {outcome[word]}", flush=True)
            gc.collect()  # frees the memory for the next part
        bench.measured[part] = results.measured(part) or {}


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line. Raises `UserError` if it is invalid."""
    parser = make_parser((__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=number, default=8.0, help="time for all parts (default: 8)")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on any machine, as a test")
    parser.add_argument("--out", type=Path, default=Path("docs/results/accelerator"), metavar="FOLDER",
                        help="folder of the results (default: docs/results/accelerator)")  # fmt: skip
    parser.add_argument("--commit", metavar="ID", help="commit of the code, if it is a copy without git")
    options = parser.parse_known_options(argv)
    if options.minutes <= 0:
        raise UserError(f"--minutes must be positive, got {options.minutes:g}")
    return options


def make_folder(folder: Path) -> None:
    """Create the folder of the results. Raises `UserError` if it is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--out {folder} is not writable: {error}") from error


def main(argv: list[str] | None = None) -> None:
    began = time.monotonic()
    options = parse(sys.argv[1:] if argv is None else argv)
    # The default is three quarters of a GPU's memory. JAX reads this when it initializes the device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    if jax.default_backend() == "cpu" and not options.tiny:
        raise UserError("JAX found no GPU or TPU to measure: add --tiny to test this command on a CPU")
    make_folder(options.out)
    if jax.default_backend() == "cpu":
        jax.config.update("jax_disable_most_optimizations", True)  # halves the compile time
    # With JAX's default generator, XLA:TPU takes minutes to compile a large model's initialization.
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
