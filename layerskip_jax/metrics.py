"""What a run reports: as JSON lines, to TensorBoard, and to Weights & Biases if asked."""

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from layerskip_jax.config import Config, experiment
from layerskip_jax.errors import UserError
from layerskip_jax.train_step import StepMetrics


class MetricsWriter:
    """Append metrics to ``RUN_DIR/metrics.jsonl``, TensorBoard and W&B (if asked); only the first process writes."""

    def __init__(self, config: Config):
        self._active = jax.process_index() == 0
        if self._active:
            from tensorboardX import SummaryWriter  # here, since it takes a second to import

            folder = Path(config.train.run_dir)
            self._wandb = _wandb_run(config) if config.train.wandb_project else None
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / "metrics.jsonl").open("a", buffering=1)
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
        if self._wandb:
            self._wandb.log(dict(values), step=step)

    def close(self) -> None:
        if self._active:
            self._file.close()
            self._board.close()
            if self._wandb:
                self._wandb.finish()


def _wandb_run(config: Config) -> Any:
    """Start or go on with the run's namesake in Weights & Biases; the environment says how (WANDB_MODE=offline)."""
    try:
        import wandb
    except ImportError:
        raise UserError("train.wandb_project needs wandb: pip install 'layerskip-jax[wandb]'") from None
    folder = str(Path(config.train.run_dir).resolve())
    return wandb.init(
        project=config.train.wandb_project,
        name=Path(folder).name,
        id=hashlib.sha256(folder.encode()).hexdigest()[:16],  # a resumed run goes on in the same one
        resume="allow",
        config=experiment(config),
    )


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
    }
