"""What a run reports, as JSON lines and to TensorBoard."""

import contextlib
import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from layerskip_jax.locations import is_remote, locate
from layerskip_jax.train_step import StepMetrics

METRICS = "metrics.jsonl"


class MetricsWriter:
    """Append metrics to ``RUN_DIR/metrics.jsonl`` and to TensorBoard; only the first process writes.

    To a file in a bucket nothing can be appended: there both are written on this machine, in a temporary folder, and
    `publish` copies them whole.
    """

    def __init__(self, run_dir: str):
        self._active = jax.process_index() == 0
        if self._active:
            from tensorboardX import SummaryWriter  # here, since it takes a second to import

            self._folder = locate(run_dir)
            self._spool = tempfile.TemporaryDirectory(prefix="metrics-") if is_remote(self._folder) else None
            folder = Path(self._spool.name if self._spool else str(self._folder))
            folder.mkdir(parents=True, exist_ok=True)
            if self._spool and (self._folder / METRICS).exists():
                (folder / METRICS).write_bytes((self._folder / METRICS).read_bytes())
            self._file = (folder / METRICS).open("a", buffering=1)
            self._board = SummaryWriter(str(folder / "tensorboard"))

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write numbers and texts for ``step`` (the number of optimizer steps done)."""
        if not self._active:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if isinstance(value, str):
                self._board.add_text(name, value, step)
            else:
                self._board.add_scalar(name, value, step)

    def publish(self) -> None:
        """Copy what was written so far to a run folder in a bucket; a local one has it already."""
        if self._active and self._spool:
            self._board.flush()
            spool = Path(self._spool.name)
            for file in (file for file in spool.rglob("*") if file.is_file()):
                target = self._folder / file.relative_to(spool).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())

    def close(self) -> None:
        if self._active:
            self._file.close()
            self._board.close()
            self.publish()
            if self._spool:
                self._spool.cleanup()


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
    }
