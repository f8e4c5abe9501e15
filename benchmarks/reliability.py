"""Run long reliability tests, for docs/reliability.md: ``python -m benchmarks.reliability [kills damage buckets]``.

``kills`` and ``buckets`` kill processes that train; ``damage`` changes files and restores them in this process. Without
a name all tests run. The exit status is 1 if any count outside `EXPECTED_COUNTS` is not 0.
"""

import argparse
import contextlib
import functools
import io
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from benchmarks.bucket_server import bucket_server
from benchmarks.common import ROOT, header
from layerskip_jax.checkpoint.arrays import named_arrays
from layerskip_jax.checkpoint.reading import load_model
from layerskip_jax.checkpoint.run_folder import find_checkpoint, read_checksums
from layerskip_jax.command_line import make_parser, parse_config
from layerskip_jax.config import Config
from layerskip_jax.data.pipeline import local_batches
from layerskip_jax.data.position import DataPosition
from layerskip_jax.data.sentencepiece_tokenizer import train_tokenizer
from layerskip_jax.data.sources import open_documents
from layerskip_jax.errors import run_command
from layerskip_jax.recipe.recipe import Recipe
from layerskip_jax.sharding import make_mesh
from layerskip_jax.training.checkpoints import Checkpoints
from layerskip_jax.training.loop import train
from layerskip_jax.training.step import Trainer, TrainState

TINY = """
    --model.num_layers 2 --model.dim 16 --model.num_heads 2 --model.num_kv_heads 2 --model.ffn_dim 24
    --model.vocab_size 300 --data.sequence_length 32 --train.loss_chunk 32 --train.batch_size 8 --train.log_every 1
    --train.evaluate_batches 1 --train.evaluate_every 100000 --optimizer.warmup_steps 2
    --layer_dropout.p_max 0.3 --early_exit.curriculum rotational --early_exit.dilation 2
"""
UNFINISHED_SAVE = "*.orbax-checkpoint-tmp*"


def make_settings(folder: Path) -> list[str]:
    """Write a small corpus and its tokenizer into ``folder``; return the options of a tiny LayerSkip run on it."""
    letters = random.Random(0)
    (folder / "text").mkdir(parents=True)
    for number in range(30):
        words = ["".join(letters.choices("abcdefgh", k=letters.randrange(1, 6))) for _ in range(80)]
        (folder / "text" / f"{number}.txt").write_text(" ".join(words))
    data = ["--data.source", "text", "--data.path", str(folder / "text"), "--data.tokenizer", str(folder / "t.model")]
    config, _ = parse_config(make_parser(""), data)
    train_tokenizer(open_documents(config.data, "train"), config.data.tokenizer, 300)
    return [*TINY.split(), *data]


def contents(run: str) -> dict[str, np.ndarray]:
    """Return all parameters of a run's newest checkpoint, and the digests of its arrays."""
    sums = read_checksums(find_checkpoint(run))["arrays"]
    return named_arrays(jax.device_get(load_model(run)[0])) | {name: np.uint32(value) for name, value in sums.items()}


def same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> bool:
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


class TrainingProcess:
    """A process that runs ``train.py``; with ``url``, in a bucket whose objects are files in ``run``."""

    def __init__(
        self, settings: list[str], run: Path, cache: Path, url: str = "", environment: dict[str, str] | None = None
    ):
        self._run, self._bucket, self.output = run, bool(url), ""
        jax_settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        self._process = subprocess.Popen(
            [sys.executable, "train.py", *settings, "--train.run_dir", url or str(run)],
            cwd=ROOT,
            env=os.environ
            | jax_settings
            | (environment or {})
            | {"JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def opening(self) -> str:
        """Wait for the line that names the step from which the run starts, and return it."""
        for line in self._process.stdout or []:
            self.output += line
            if " steps, " in line:
                return line.strip()
        raise RuntimeError("the run ended before its first step")

    def kill(self, seconds: float, in_a_save: bool) -> tuple[bool, bool]:
        """Send SIGKILL after ``seconds``, counted from the start of the next save if ``in_a_save``.

        Returns whether the process was still running, and whether it was saving.
        """
        while in_a_save and self._process.poll() is None and not self._saving():
            time.sleep(0.001)
        time.sleep(seconds)
        killed = self._process.poll() is None
        self._process.kill()
        self.output += self._process.communicate()[0]
        return killed, self._saving()

    def _saving(self) -> bool:
        if self._bucket:
            return bool(bucket_steps(self._run)[1])
        return any((self._run / "checkpoints").glob(UNFINISHED_SAVE))

    def finish(self) -> str:
        """Wait for the run to end; return its output. Raises `RuntimeError` if it fails or takes ten minutes."""
        timer = threading.Timer(600, self._process.kill)
        timer.start()
        try:
            # With a timeout, communicate would lose the lines that `opening` has read ahead.
            self.output += self._process.communicate()[0]
        finally:
            timer.cancel()
        if self._process.returncode:
            raise RuntimeError(f"the run ended with status {self._process.returncode}: {self.output[-2000:]}")
        return self.output


def newest(run: Path) -> int | None:
    return max((int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit()), default=None)


def kills(trials: int = 30, seed: int = 0, steps: int = 60) -> Counter[str]:
    """Kill runs that save at every step, at random moments and during saves; compare with an uninterrupted run."""
    moments, count = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = [*make_settings(folder), "--train.checkpoint_every", "1", "--train.steps", str(steps)]
        cache, run = folder / "cache", folder / "whole"
        TrainingProcess(settings, run, cache).finish()
        whole = contents(str(run))
        while count["kills"] < trials:
            run = folder / f"run{count['runs']}"
            complete: int | None = None
            while True:
                process = TrainingProcess(settings, run, cache)
                if count["kills"] < trials and moments.random() < 0.1:
                    killed, _ = process.kill(moments.uniform(0, 6), in_a_save=False)  # while it starts
                    saving = False  # an unfinished save may be the previous process's
                else:
                    opening = process.opening()
                    start = "from scratch" if complete is None else f"resuming after step {complete}"
                    count["starts that did not resume from the newest checkpoint"] += not opening.endswith(start)
                    if count["kills"] >= trials:
                        process.finish()
                        killed = saving = False
                    else:
                        in_a_save = moments.random() < 0.6
                        killed, saving = process.kill(moments.uniform(0, 0.05 if in_a_save else 2), in_a_save)
                count["kills"] += killed
                count["kills in a save"] += killed and saving
                complete = newest(run)
                if not killed:
                    break
            count["runs"] += 1
            count["runs that ended with other parameters"] += not same(contents(str(run)), whole)
    return count


def bucket_steps(run: Path) -> tuple[int, set[int]]:
    """Return the newest complete checkpoint of a run in a bucket, or 0, and the steps after it that have objects."""
    steps: dict[int, bool] = {}
    for file in (run / "checkpoints").rglob("*"):
        parts = file.relative_to(run / "checkpoints").parts
        if parts[0].isdigit() and file.is_file():
            steps[int(parts[0])] = steps.get(int(parts[0]), False) or parts[1:] == ("commit_success.txt",)
    newest = max((step for step, complete in steps.items() if complete), default=0)
    return newest, {step for step in steps if step > newest}


def buckets(trials: int = 20, faults: int = 200, seed: int = 0, steps: int = 20, rate: float = 0.05) -> Counter[str]:
    """Kill runs within saves into a bucket that refuses, delays and drops requests; compare with a local run."""
    moments, count = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        settings = [*make_settings(folder), "--train.checkpoint_every", "1", "--train.steps", str(steps)]
        cache, bucket = folder / "cache", folder / "buckets" / "bucket"
        TrainingProcess(settings, folder / "whole", cache).finish()
        whole = contents(str(folder / "whole"))
        bucket.mkdir(parents=True)
        environment, injected = stack.enter_context(bucket_server(bucket.parent))
        while count["kills in a save"] < trials or count["faults"] < faults:
            run, complete = f"run{count['runs']}", 0
            while True:
                injected.rate = rate
                process = TrainingProcess(settings, bucket / run, cache, f"gs://bucket/{run}", environment)
                start = f"resuming after step {complete}" if complete else "from scratch"
                opening = process.opening()
                count["starts that did not resume from the newest checkpoint"] += not opening.endswith(start)
                if count["kills in a save"] >= trials:
                    process.finish()
                else:
                    killed, saving = process.kill(moments.uniform(0, 4), in_a_save=True)
                    count["kills"] += killed
                    count["kills in a save"] += killed and saving
                complete = bucket_steps(bucket / run)[0]
                count["tracebacks"] += "Traceback" in process.output
                warnings = [re.sub(r"[\d.]+", "", line) for line in process.output.splitlines() if "WARN" in line]
                count["repeated warnings"] += len(warnings) - len(set(warnings))
                count["faults"] = injected.count.total() - injected.count["late"] - injected.count["slow"]
                print(f"  {dict(count)}", file=sys.stderr, flush=True)
                if complete == steps:
                    break
            injected.rate = 0.0
            count["runs"] += 1
            with served(environment):
                count["runs that ended with other parameters"] += not same(contents(f"gs://bucket/{run}"), whole)
        count["late requests"], count["slow requests"] = injected.count["late"], injected.count["slow"]
        count["requests"] = injected.requests
    return count


@contextlib.contextmanager
def served(environment: dict[str, str]) -> Iterator[None]:
    """Read buckets in this process too."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def damage(trials: int = 300, seed: int = 0) -> Counter[str]:
    """Damage files and folders of the newest checkpoint one at a time, restore, and compare with what was saved."""
    chance, count = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = ["--train.steps", "4", "--train.checkpoint_every", "2", "--train.run_dir", str(folder / "run")]
        config, _ = parse_config(make_parser(""), [*make_settings(folder), *options])
        with contextlib.redirect_stdout(io.StringIO()):
            train(config)
        good, checkpoints = folder / "good", folder / "run" / "checkpoints"
        checkpoints.rename(good)
        states = {}
        for step in (4, 2):
            shutil.copytree(good, checkpoints)
            if step == 2:
                shutil.rmtree(checkpoints / "4")
            states[step] = restored(config)
            shutil.rmtree(checkpoints)
        # In the order of their sizes, because orbax chooses some names at random. The sample then changes little.
        sized = sorted((path.stat().st_size, path) for path in (good / "4").rglob("*") if path.is_file())
        files = [path.relative_to(good) for _, path in sized]
        folders = sorted({parent for file in files for parent in file.parents if parent.parts})
        # Damage every file and folder once before any of them twice.
        kinds = [(damaged, path) for damaged in DAMAGES for path in (folders if damaged is halve else files)]
        kinds = [one for _ in range(-(-trials // len(kinds))) for one in chance.sample(kinds, len(kinds))]
        for damaged, path in kinds[:trials]:
            shutil.copytree(good, checkpoints)
            damaged(checkpoints / path, chance)
            stderr = io.StringIO()
            with contextlib.redirect_stderr(stderr):
                found = restored(config)
            shutil.rmtree(checkpoints)
            if same(found, states[4]):
                count["harmless"] += 1
                count["false alarms"] += "damaged" in stderr.getvalue()
            elif same(found, states[2]) and "WARNING: the checkpoint" in stderr.getvalue():
                count["detected, and the one before restored"] += 1
            else:
                count[f"wrong state after {damaged.__name__} {path}"] += 1
    return count


def restored(config: Config) -> dict[str, np.ndarray]:
    """Return all arrays that a start of ``config`` restores, and its next batch."""
    trainer, abstract = cached_trainer(config)
    with Checkpoints(config) as checkpoints:
        data = iter(local_batches(config, "train", trainer.mesh))
        state = checkpoints.restore(abstract, DataPosition(data, range(config.train.batch_size)))
        arrays = named_arrays(jax.device_get(state))
        return {name: np.asarray(array) for name, array in arrays.items()} | next(data)


@functools.cache
def cached_trainer(config: Config) -> tuple[Trainer, TrainState]:
    trainer = Trainer(config, Recipe.from_config(config), make_mesh(config))
    return trainer, trainer.abstract_state()


def flip(file: Path, chance: random.Random) -> None:
    content = bytearray(file.read_bytes())
    if content:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def truncate(file: Path, chance: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: chance.randrange(max(len(content), 1))])


def remove(file: Path, chance: random.Random) -> None:
    file.unlink()


def halve(folder: Path, chance: random.Random) -> None:
    """Delete half of the entries of a folder."""
    entries = sorted(folder.iterdir())
    for entry in chance.sample(entries, (len(entries) + 1) // 2):
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


DAMAGES = (flip, truncate, remove, halve)
TESTS: dict[str, Callable[[], Counter[str]]] = {"kills": kills, "damage": damage, "buckets": buckets}
EXPECTED_COUNTS = {
    "kills",
    "kills in a save",
    "faults",
    "late requests",
    "slow requests",
    "requests",
    "runs",
    "harmless",
    "detected, and the one before restored",
}
"""Counts that are not losses; every other count should be 0."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names", nargs="*", choices=[[], *TESTS], default=[], metavar="NAME", help="tests to run; by default all"
    )
    names = parser.parse_args().names or TESTS
    header()
    lost = 0
    for name in names:
        began = time.monotonic()
        count = TESTS[name]()
        print(f"{name}: {', '.join(f'{value} {what}' for what, value in count.items())}", flush=True)
        print(f"  {time.monotonic() - began:.0f} s", flush=True)
        lost += sum(value for what, value in count.items() if what not in EXPECTED_COUNTS)
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    run_command(main)
