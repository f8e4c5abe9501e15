"""What a run reports, as JSON lines and to TensorBoard."""

import contextlib
import json
import math
import socket
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from layerskip_jax.train_step import StepMetrics

FLUSH_SECONDS = 30
"""How far TensorBoard may be behind metrics.jsonl, which has every line at once."""


class MetricsWriter:
    """Append metrics to ``RUN_DIR/metrics.jsonl`` and to TensorBoard; only the first process writes.

    Each on its own: the first failure of one is said, and the run goes on without it.
    """

    def __init__(self, run_dir: str):
        self._folder = Path(run_dir)
        self._sinks: dict[str, Any] = {}
        self._flushed = time.monotonic()
        if jax.process_index() == 0:
            self._try("metrics.jsonl", self._open_lines)
            self._try("TensorBoard", self._open_board)

    def _open_lines(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._sinks["metrics.jsonl"] = (self._folder / "metrics.jsonl").open("a", buffering=1)

    def _open_board(self) -> None:
        from tensorboardX.proto.event_pb2 import Event  # here, since it takes a second to import
        from tensorboardX.record_writer import RecordWriter

        # Not SummaryWriter: its thread dies of a full disk, and then whoever gives it more waits for ever.
        (self._folder / "tensorboard").mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
        self._sinks["TensorBoard"] = RecordWriter(str(self._folder / "tensorboard" / name))
        header = Event(wall_time=time.time(), file_version="brain.Event:2")
        self._sinks["TensorBoard"].write(header.SerializeToString())

    def _try(self, sink: str, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:
            broken = self._sinks.pop(sink, None)
            with contextlib.suppress(Exception):
                broken.close()
            print(f"WARNING: no more is written to {sink}: {error}", file=sys.stderr, flush=True)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write numbers and texts for ``step`` (the number of optimizer steps done)."""
        write_to = {"metrics.jsonl": self._write_line, "TensorBoard": self._write_to_board}
        for sink in list(self._sinks):
            self._try(sink, partial(write_to[sink], step, values))

    def _write_line(self, step: int, values: Mapping[str, Any]) -> None:
        self._sinks["metrics.jsonl"].write(json.dumps({"step": step, **values}) + "\n")

    def _write_to_board(self, step: int, values: Mapping[str, Any]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar, text

        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                continue  # of which it warns, a line each
            summary = text(name, value) if isinstance(value, str) else scalar(name, value)
            event = Event(wall_time=time.time(), step=step, summary=summary)
            self._sinks["TensorBoard"].write(event.SerializeToString())
        if time.monotonic() - self._flushed > FLUSH_SECONDS:  # not every time: it waits for the disk
            self._sinks["TensorBoard"].flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        for sink in list(self._sinks):
            self._try(sink, self._sinks[sink].close)


def read_records(run_dir: str) -> list[dict[str, Any]]:
    """Return the lines of ``RUN_DIR/metrics.jsonl``, in order; none where there is no file yet.

    A line that a killed process left half written is passed over.
    """
    path = Path(run_dir) / "metrics.jsonl"
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
