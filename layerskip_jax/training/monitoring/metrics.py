"""What a run reports: as JSON lines, to TensorBoard, and to Weights & Biases if asked."""

import contextlib
import hashlib
import json
import math
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from layerskip_jax.config import Config, experiment
from layerskip_jax.errors import UserError
from layerskip_jax.locations import is_remote, locate
from layerskip_jax.training.step import StepMetrics

METRICS = "metrics.jsonl"
FLUSH_SECONDS = 30
"""How far TensorBoard may be behind metrics.jsonl, which has every line at once."""


class Sink(Protocol):
    """Where numbers and texts go."""

    def write(self, step: int, values: Mapping[str, Any]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class MetricsWriter:
    """Append metrics to ``RUN_DIR/metrics.jsonl``, TensorBoard and W&B (if asked); only the first process writes.

    Each on its own: the first failure of one is said, and the run goes on without it. To a file in a bucket nothing can
    be appended: there files are written on this machine, in a temporary folder, and `publish` copies them whole.
    """

    def __init__(self, config: Config):
        self._sinks: dict[str, Sink] = {}
        self._spool: tempfile.TemporaryDirectory[str] | None = None
        if jax.process_index() == 0:
            self._folder = locate(config.train.run_dir)
            if is_remote(self._folder):
                self._spool = tempfile.TemporaryDirectory(prefix="metrics-")
            folder = Path(self._spool.name if self._spool else str(self._folder))
            if config.train.wandb_project:
                self._try("Weights & Biases", lambda: self._open("Weights & Biases", WeightsAndBiases(config)))
            self._try(METRICS, lambda: self._open(METRICS, Lines(folder, self._folder)))
            self._try("TensorBoard", lambda: self._open("TensorBoard", Board(folder)))

    def _open(self, name: str, sink: Sink) -> None:
        self._sinks[name] = sink

    def _try(self, name: str, act: Callable[[], object]) -> None:
        try:
            act()
        except UserError:  # a mistake in asking for it
            raise
        except Exception as error:
            if broken := self._sinks.pop(name, None):
                with contextlib.suppress(Exception):
                    broken.close()
            print(f"WARNING: no more is written to {name}: {error}", file=sys.stderr, flush=True)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write numbers and texts for ``step`` (the number of optimizer steps done)."""
        for name, sink in list(self._sinks.items()):
            self._try(name, partial(sink.write, step, values))

    def publish(self) -> None:
        """Copy what was written so far to a run folder in a bucket; a local one has it already."""
        if self._spool:
            for name, sink in list(self._sinks.items()):
                self._try(name, sink.flush)
            self._try(str(self._folder), self._copy)

    def _copy(self) -> None:
        assert self._spool
        spool = Path(self._spool.name)
        for file in (file for file in spool.rglob("*") if file.is_file()):
            target = self._folder / file.relative_to(spool).as_posix()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())

    def close(self) -> None:
        for name, sink in list(self._sinks.items()):
            self._try(name, sink.close)
        self._sinks.clear()
        self.publish()
        if self._spool:
            self._spool.cleanup()


class Lines:
    """One JSON line a step, in ``folder``; what ``before`` holds already is kept in front."""

    def __init__(self, folder: Path, before: Any):
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / METRICS).exists() and (before / METRICS).exists():
            (folder / METRICS).write_bytes((before / METRICS).read_bytes())
        self._file = (folder / METRICS).open("a", buffering=1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Board:
    """TensorBoard's event file, in ``folder/tensorboard``."""

    def __init__(self, folder: Path):
        from tensorboardX.proto.event_pb2 import Event  # here, since it takes a second to import
        from tensorboardX.record_writer import RecordWriter

        # Not SummaryWriter: its thread dies of a full disk, and then whoever gives it more waits for ever.
        (folder / "tensorboard").mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
        self._writer, self._flushed = RecordWriter(str(folder / "tensorboard" / name)), time.monotonic()
        try:
            self._writer.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        except Exception:
            self._writer.close()
            raise

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar, text

        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                continue  # of which it warns, a line each
            summary = text(name, value) if isinstance(value, str) else scalar(name, value)
            self._writer.write(Event(wall_time=time.time(), step=step, summary=summary).SerializeToString())
        if time.monotonic() - self._flushed > FLUSH_SECONDS:  # not every time: it waits for the disk
            self.flush()

    def flush(self) -> None:
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """The run's namesake in Weights & Biases; the environment says how (WANDB_MODE=offline)."""

    def __init__(self, config: Config):
        try:
            import wandb
        except ImportError:
            raise UserError("train.wandb_project needs wandb: pip install 'layerskip-jax[wandb]'") from None
        folder = locate(config.train.run_dir)
        self._run = wandb.init(
            project=config.train.wandb_project,
            name=folder.name,
            id=hashlib.sha256(str(folder).encode()).hexdigest()[:16],  # a resumed run goes on in the same one
            resume="allow",
            config=experiment(config),
        )

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log(dict(values), step=step)

    def flush(self) -> None:
        """Nothing: it sends by itself."""

    def close(self) -> None:
        self._run.finish()


def read_records(run_dir: str) -> list[dict[str, Any]]:
    """Return the lines of ``RUN_DIR/metrics.jsonl``, in order; none where there is no file yet.

    A line that a killed process left half written is passed over.
    """
    path = locate(run_dir) / METRICS
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def per_exit(prefix: str, loss_L: np.ndarray) -> dict[str, float]:
    """Name the losses by exit, 1..L; exits without a loss (NaN) are left out.

    >>> per_exit("train/exit_loss", np.array([float("nan"), 2.5]))
    {'train/exit_loss/2': 2.5}
    """
    return {f"{prefix}/{exit + 1}": float(loss) for exit, loss in enumerate(loss_L) if not math.isnan(loss)}


def training_values(metrics: StepMetrics) -> dict[str, float]:
    """Flatten a step's metrics, already on the host, for a `MetricsWriter`."""
    on_L = metrics.exit_weight_L > 0
    return {
        "train/objective": float(metrics.objective),
        **per_exit("train/exit_loss", np.where(on_L, metrics.exit_loss_L, np.nan)),
        "train/gradient_norm": float(metrics.gradient_norm),
        **{f"train/gradient_norm_of_block/{i}": float(norm) for i, norm in enumerate(metrics.gradient_norm_L)},
        "train/learning_rate": float(metrics.learning_rate),
        "train/mean_drop_rate": float(np.mean(metrics.drop_rate_L)),
        "train/tokens": float(metrics.tokens),
        "train/applied": float(metrics.applied),
    }
