"""What is done about an optimizer step that was not applied: its batch is stored, and too many in a row end the run."""

import io
import math
import sys

import jax
import numpy as np
from etils import epath

from layerskip_jax.config import Config
from layerskip_jax.errors import UserError
from layerskip_jax.training.checkpoints import Checkpoints
from layerskip_jax.training.step import StepMetrics


class BadSteps:
    """Watches the steps of a run. Every process stores its own rows of a bad batch in ``RUN_DIR/bad_batches``."""

    def __init__(self, config: Config, checkpoints: Checkpoints):
        self._limit, self._checkpoints = config.train.bad_steps, checkpoints
        self._folder = epath.Path(config.train.run_dir).expanduser() / "bad_batches"
        self.in_a_row = 0

    def after_step(self, done: int, metrics: StepMetrics, batch: dict[str, np.ndarray]) -> None:
        """Look at optimizer step number ``done``, whose metrics are on the host; `UserError` after too many."""
        if metrics.applied:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        loss, norm = float(metrics.objective), float(metrics.gradient_norm)
        why = "is a spike" if math.isfinite(loss) and math.isfinite(norm) else "is not finite"
        line = f"step {done} is not applied, since it {why}: loss {loss:.4g}, gradient norm {norm:.4g}; its batch: "
        stored = self._store(done, batch)
        if jax.process_index() == 0:
            print(line + stored, file=sys.stderr, flush=True)
        if self.in_a_row < self._limit:
            return
        kept = self._checkpoints.latest()
        where = (
            f"the checkpoint of step {kept} in {self._checkpoints.folder} is good: " if kept else "nothing is saved: "
        )
        raise UserError(
            f"{self.in_a_row} steps in a row were not applied (train.bad_steps): the loss is {loss} and the gradient "
            f"norm {norm} at step {done}; {where}lower optimizer.learning_rate or look at the data, and start again"
        )

    def _store(self, done: int, batch: dict[str, np.ndarray]) -> str:
        several = f".process_{jax.process_index()}" if jax.process_count() > 1 else ""
        file, held = self._folder / f"{done}{several}.npz", io.BytesIO()
        np.savez(held, **batch)  # type: ignore[arg-type]
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            file.write_bytes(held.getvalue())
        except OSError as error:
            return f"cannot be stored in {file}: {error}"
        return str(file)
