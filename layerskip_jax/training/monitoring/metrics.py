"""Write the metrics of a run as JSON lines, for TensorBoard, and optionally for Weights & Biases."""

import contextlib
import json
import math
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from layerskip_jax.config import Config
from layerskip_jax.config_dict import saved_settings
from layerskip_jax.errors import UserError, warn
from layerskip_jax.locations import is_regular, is_remote, locate, read_limited, write_file

METRICS = "metrics.jsonl"
WANDB_ID = "wandb_id"
"""File in the run folder with the ID of its W&B run."""
FLUSH_SECONDS = 30
"""Seconds that TensorBoard may lag behind metrics.jsonl, which is written line by line."""


class Sink(Protocol):
    """A destination of numbers and texts."""

    def write(self, step: int, values: Mapping[str, Any]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class MetricsWriter:
    """Append metrics to ``RUN_DIR/metrics.jsonl``, TensorBoard and, if configured, W&B; only process 0 writes.

    If a sink fails, the run prints one warning and continues without that sink. A file in a bucket cannot be appended
    to, so files for a bucket are written to a local temporary folder, and `publish` copies them.
    """

    def __init__(self, config: Config):
        self._sinks: dict[str, Sink] = {}
        self._delayed = False
        self._spool: tempfile.TemporaryDirectory[str] | None = None
        if jax.process_index() == 0:
            self._folder = locate(config.train.run_dir)
            if is_remote(self._folder):
                self._spool = tempfile.TemporaryDirectory(prefix="metrics-")
            folder = Path(self._spool.name if self._spool else str(self._folder))
            makers: dict[str, Callable[[], Sink]] = {
                METRICS: partial(JsonLinesSink, folder, self._folder),
                "TensorBoard": partial(TensorBoardSink, folder),
            }
            if config.train.wandb_project:
                makers = {"Weights & Biases": partial(WandbSink, config), **makers}
            for name, make in makers.items():
                self._try(name, partial(self._open, name, make))

    def _open(self, name: str, make: Callable[[], Sink]) -> None:
        self._sinks[name] = make()

    def _try(self, name: str, act: Callable[[], object]) -> None:
        try:
            act()
        except UserError:  # a wrong setting
            raise
        except Exception as error:
            if broken := self._sinks.pop(name, None):
                with contextlib.suppress(Exception):
                    broken.close()
            warn(f"no more metrics are written to {name}: {error}")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write numbers and texts for ``step`` (the number of optimizer steps done)."""
        for name, sink in list(self._sinks.items()):
            self._try(name, partial(sink.write, step, values))

    def publish(self) -> None:
        """Copy the files to a run folder in a bucket; does nothing for a local run folder."""
        if self._spool:
            for name, sink in list(self._sinks.items()):
                self._try(name, sink.flush)
            try:
                self._copy()
                self._delayed = False
            except Exception as error:
                if not self._delayed:
                    warn(f"metrics are not copied to {self._folder} yet: {error}; each checkpoint tries again")
                self._delayed = True

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
            if self._delayed:
                kept = shutil.copytree(self._spool.name, tempfile.mkdtemp(prefix="kept-metrics-"), dirs_exist_ok=True)
                warn(f"metrics could not be copied to {self._folder}: they are in {kept}")
            self._spool.cleanup()


def _is_json(value: Any) -> bool:
    """Return whether JSON has the value: it has no NaN and no infinity."""
    return not isinstance(value, float) or math.isfinite(value)


class JsonLinesSink:
    """Appends a JSON line to `METRICS` in ``folder`` for each `write`, with null for numbers that are not finite.

    A new file starts as a copy of the one in ``earlier``.
    """

    def __init__(self, folder: Path, earlier: Any):
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / METRICS).exists() and (earlier / METRICS).exists():
            (folder / METRICS).write_bytes((earlier / METRICS).read_bytes())
        self._file = (folder / METRICS).open("a", buffering=1)
        with (folder / METRICS).open("rb") as written:
            if written.seek(0, os.SEEK_END) and written.seek(-1, os.SEEK_END) >= 0 and written.read(1) != b"\n":
                self._file.write("\n")  # a killed process left half a line

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        known = {name: value if _is_json(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **known}) + "\n")

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardSink:
    """Writes a TensorBoard event file in ``folder/tensorboard``."""

    def __init__(self, folder: Path):
        from tensorboardX.proto.event_pb2 import Event  # importing takes a second
        from tensorboardX.record_writer import RecordWriter

        # Do not use SummaryWriter: after an error such as a full disk its thread is dead, and the next write blocks.
        (folder / "tensorboard").mkdir(parents=True, exist_ok=True)
        # Make the name unique: a restart within a second, or after the clock was set back, would overwrite the file.
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
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
            if not _is_json(value):
                continue  # tensorboardX prints a warning for each
            summary = text(name, value) if isinstance(value, str) else scalar(name, value)
            self._writer.write(Event(wall_time=time.time(), step=step, summary=summary).SerializeToString())
        if time.monotonic() - self._flushed > FLUSH_SECONDS:  # not every step: flushing waits for the disk
            self.flush()

    def flush(self) -> None:
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Logs to a Weights & Biases run named after the run folder; reads W&B's environment (WANDB_MODE=offline)."""

    def __init__(self, config: Config):
        try:
            import wandb
        except ImportError:
            raise UserError("train.wandb_project needs wandb: pip install 'layerskip-jax[wandb]'") from None
        folder = locate(config.train.run_dir)
        # A resumed run continues the same W&B run. The path cannot be the ID: a folder may be removed and used again.
        if not is_regular(folder / WANDB_ID):
            try:
                write_file(folder / WANDB_ID, uuid.uuid4().hex)
            except UserError as error:  # no wrong setting, so the run continues without W&B
                raise OSError(str(error)) from error
        self._run = wandb.init(
            project=config.train.wandb_project,
            name=folder.name,
            id=read_limited(folder / WANDB_ID).decode().strip(),
            resume="allow",
            config=saved_settings(config),
        )

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log(dict(values), step=step)

    def flush(self) -> None:
        """Do nothing: W&B uploads in the background."""

    def close(self) -> None:
        self._run.finish()


def read_records(run_dir: str, last_step: float = math.inf) -> list[dict[str, Any]]:
    """Return the records of ``RUN_DIR/metrics.jsonl`` up to ``last_step``, in order; none without the file.

    Skips lines that are no records, such as one that a killed process left half written.
    """
    path = locate(run_dir) / METRICS
    records = []
    for line in path.read_bytes().splitlines() if is_regular(path) else []:
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            step = record.get("step") if isinstance(record, dict) else None
            if type(step) is int and 0 <= step < 2**63 and step <= last_step:
                records.append(record)
    return records


def per_exit(prefix: str, loss_L: np.ndarray) -> dict[str, float]:
    """Name the losses by exit, 1..L, without exits that have no loss (NaN).

    >>> per_exit("train/exit_loss", np.array([float("nan"), 2.5]))
    {'train/exit_loss/2': 2.5}
    """
    return {f"{prefix}/{exit + 1}": float(loss) for exit, loss in enumerate(loss_L) if not math.isnan(loss)}
