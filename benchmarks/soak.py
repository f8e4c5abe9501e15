"""Look for leaks in a loop: ``python -m benchmarks.soak [--seconds 3600] [--out runs/soak]``.

Trains and generates in a loop in one process: ``train`` from scratch with evaluations, checkpoints and samples,
``train`` again to restore, and four ``decode`` commands. ``--kind loops`` runs steps and texts only, without
checkpoints. Records memory, open files, threads, memory maps and compiled programs after every iteration. Prints a
table of the iterations after the warm-up, in which a leak shows as growth, and the slope of the memory: the median of
the slopes between all pairs of iterations (Theil-Sen). Writes ``soak.jsonl`` and ``soak.png`` to the folder.
"""

import argparse
import contextlib
import gc
import io
import json
import os
import shutil
import statistics
import sysconfig
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from benchmarks.common import header
from layerskip_jax.commands import decode
from layerskip_jax.config import (
    Config,
    DataConfig,
    DecodeConfig,
    EarlyExitConfig,
    LayerDropoutConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.data.pipeline import local_batches, to_devices
from layerskip_jax.data.sentencepiece_tokenizer import train_tokenizer
from layerskip_jax.data.sources import open_documents
from layerskip_jax.decoding.text import TextGenerator
from layerskip_jax.errors import run_command
from layerskip_jax.model import Transformer
from layerskip_jax.recipe.recipe import Recipe
from layerskip_jax.sharding import make_mesh
from layerskip_jax.training.loop import train
from layerskip_jax.training.step import Trainer

Iteration = Callable[[], None]
VOCABULARY = 512
STEPS = 8
COUNTS = ("files", "threads", "maps", "programs")
DECODE_OPTIONS = [
    ["--prompt", "def f(x):"],  # streams
    ["--prompt", "import ", "--prompt", "class A", "--batch_size", "2", "--policy", "adaptive", "--stop", "return"],
    ["--prompt", "for i in", "--mode", "prompt_lookup", "--temperature", "0.8", "--top_p", "0.9"],
    ["--held_out", "1", "--mode", "autoregressive", "--json"],
]


class Programs:
    """Counts the programs that this process has compiled."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._count)

    def _count(self, event: str, seconds: float, **_: object) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


def make_config(folder: Path) -> Config:
    """Copy files of Python's standard library to ``folder`` and train a tokenizer; return a small run on them."""
    texts = folder / "texts"
    texts.mkdir(parents=True)
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]:
        shutil.copy(file, texts)
    data = DataConfig(
        source="text", path=str(texts), tokenizer=str(folder / "tokenizer.model"), sequence_length=32, shuffle_window=16
    )
    train_tokenizer(open_documents(data, "train"), data.tokenizer, VOCABULARY, sample_bytes=200_000)
    return Config(
        model=ModelConfig(4, 16, 2, 1, 24, VOCABULARY, compute_dtype="float32"),
        layer_dropout=LayerDropoutConfig(p_max=0.2),
        early_exit=EarlyExitConfig("rotational", 3),
        data=data,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
        train=TrainConfig(
            run_dir=str(folder / "run"),
            steps=STEPS,
            batch_size=8,
            loss_chunk=8,
            log_every=2,
            evaluate_every=4,
            evaluate_batches=2,
            checkpoint_every=2,
            sample_every=4,
            sample_prompt="def ",
        ),
        decode=DecodeConfig(exit_layer=2, draft_length=3, max_new_tokens=24),
    )


def commands(config: Config, options: Sequence[Sequence[str]] = DECODE_OPTIONS) -> Iteration:
    """Return a function that trains a run from scratch, restores it, and runs ``decode`` with each of ``options``."""

    def iterate() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            shutil.rmtree(config.train.run_dir, ignore_errors=True)
            train(config)
            train(config)  # restores, and has no step left
            for words in options:
                decode.main(["--checkpoint", config.train.run_dir, *words])

    return iterate


def loops(config: Config) -> Iteration:
    """Return a function that runs 200 steps and generates 50 texts, without checkpoints."""
    mesh = make_mesh(config)
    trainer, tokenizer = Trainer(config, Recipe.from_config(config), mesh), load_tokenizer(config.data.tokenizer)
    state, data = trainer.init(), iter(local_batches(config, config.data.train_split, trainer.mesh))
    model = Transformer(config.model, rngs=nnx.Rngs(0)).unstacked()
    generator = TextGenerator(model, tokenizer, config.decode_settings)

    def iterate() -> None:
        nonlocal state
        for _ in range(200):
            state, metrics = trainer.step(state, to_devices(next(data), mesh))
            jax.device_get(metrics)
        for _ in range(50):
            generator.generate(["def f(x):"])

    return iterate


def resources(programs: Programs) -> dict[str, float]:
    """Return the resources of this process [MB, and counts]; memory is its private pages, resident or swapped out."""
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "memory_mb": sum(int(status[name].split()[0]) for name in ("RssAnon", "VmSwap")) / 2**10,
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "python_threads": threading.active_count(),
        "maps": len(Path("/proc/self/maps").read_text().splitlines()),
        "programs": programs.count,
    }


def soak(
    folder: Path,
    seconds: float,
    kind: Callable[[Config], Iteration] = commands,
    record: Callable[[dict[str, float]], None] = lambda row: None,
) -> list[dict]:
    """Iterate for ``seconds``, and at least eight times; return the `resources` after each iteration."""
    iterate, programs, began, rows = kind(make_config(folder)), Programs(), time.monotonic(), []
    while len(rows) < 8 or time.monotonic() - began < seconds:
        iterate()
        rows.append({"turn": len(rows) + 1, "seconds": time.monotonic() - began, **resources(programs)})
        record(rows[-1])
    return rows


def after_warm_up(rows: list[dict]) -> list[dict]:
    """Drop the first two iterations, which compile, or the first fifth of a long soak."""
    return rows[max(2, len(rows) // 5) :]


def slope_per_hour(rows: list[dict]) -> float:
    """Return the growth of memory [MB/hour]: the median of the slopes between all pairs (Theil-Sen)."""
    at, size = (np.array([row[name] for row in rows]) for name in ("seconds", "memory_mb"))
    first, second = np.triu_indices(len(rows), k=1)
    return float(np.median((size[second] - size[first]) / (at[second] - at[first]))) * 3600


def table(rows: list[dict]) -> str:
    steady = after_warm_up(rows)
    tenth = max(1, len(steady) // 10)
    lines = [f"{'':<16}{'first tenth':>14}{'last tenth':>14}{'least':>10}{'most':>10}"]
    for name in ("memory_mb", "python_threads", *COUNTS):
        values = [row[name] for row in steady]
        ends = statistics.median(values[:tenth]), statistics.median(values[-tenth:])
        lines.append(f"{name:<16}{ends[0]:>14.1f}{ends[1]:>14.1f}{min(values):>10.1f}{max(values):>10.1f}")
    hours = (steady[-1]["seconds"] - steady[0]["seconds"]) / 3600
    lines.append(f"memory: {slope_per_hour(steady):+.1f} MB/hour over {hours:.2f} hours, {len(steady)} iterations")
    return "\n".join(lines) + " after the warm-up"


def plot(rows: list[dict], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    minutes = [row["seconds"] / 60 for row in rows]
    axes[0].plot(minutes, [row["memory_mb"] for row in rows])
    axes[0].set(title="memory", xlabel="minutes", ylabel="MB", ylim=(0, None))
    for name in COUNTS:
        axes[1].plot(minutes, [row[name] for row in rows], label=name)
    axes[1].set(title="counts, which must not grow", xlabel="minutes", yscale="log")
    axes[1].legend()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600, help="duration (default: an hour)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/soak"), help="folder for the results (default: runs/soak)"
    )
    parser.add_argument("--kind", choices=("commands", "loops"), default="commands", help="work of an iteration")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    work = options.out / "work"
    shutil.rmtree(work, ignore_errors=True)
    with (options.out / "soak.jsonl").open("w") as file:
        header()
        kind = {"commands": commands, "loops": loops}[options.kind]
        rows = soak(work, options.seconds, kind, lambda row: print(json.dumps(row), file=file, flush=True))
    print(table(rows))
    plot(rows, options.out / "soak.png")


if __name__ == "__main__":
    run_command(main)
