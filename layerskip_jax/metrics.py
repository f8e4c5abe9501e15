"""What a run reports: metrics to JSON lines and TensorBoard, and the model FLOPs utilisation (MFU)."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layerskip_jax.config import Config
from layerskip_jax.model import parameter_count
from layerskip_jax.train_step import StepMetrics

PEAK_FLOPS = {
    # bfloat16 FLOP/s of a chip, from its maker's data sheet
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def flops_per_token(config: Config) -> float:
    """``6 N + 12 L D T`` [FLOP a trained token]: the standard rule (PaLM, arXiv 2204.02311, appendix B).

    N leaves the embedding table out, which is looked up and not multiplied. Exits and dropout do not enter, so MFU
    compares with the same model trained plainly.
    """
    model = config.model
    lookup = 0 if model.tied_embedding else model.vocab_size * model.dim
    multiplied = parameter_count(model) - lookup
    return 6 * multiplied + 12 * model.num_layers * model.dim * config.data.sequence_length


def peak_flops(seconds: float = 0.3) -> float:
    """Return the peak of all devices together [FLOP/s]: the data sheet's, or where there is none a measured product's.

    A CPU has no useful data sheet, so the best of repeated float32 products of 1024 x 1024 matrices stands in for it.
    """
    kind = jax.devices()[0].device_kind
    if kind in PEAK_FLOPS:
        return PEAK_FLOPS[kind] * jax.device_count()
    multiply = jax.jit(jnp.matmul)
    a = jax.block_until_ready(multiply(jnp.ones((1024, 1024)), jnp.ones((1024, 1024))))
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        jax.block_until_ready(multiply(a, a))
        best = min(best, time.perf_counter() - began)
    return 2 * 1024**3 / best


class MetricsWriter:
    """Append metrics to ``RUN_DIR/metrics.jsonl`` and to TensorBoard; only the first process writes."""

    def __init__(self, run_dir: str):
        self._active = jax.process_index() == 0
        if self._active:
            from tensorboardX import SummaryWriter  # here, since it takes a second to import

            folder = Path(run_dir)
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

    def close(self) -> None:
        if self._active:
            self._file.close()
            self._board.close()


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
