"""Handle bad steps: store their batches, and stop the run after too many in a row.

A step is bad, and is not applied, if its objective or its gradient norm is not finite, if no token of its batch has a
loss, or if `Recipe.is_spike` is True. The default `LossSpike` is True if the objective exceeds ``train.skip_spikes``
times its moving average; 0 turns it off.
"""

import io
import math
import sys
from collections.abc import Callable

import jax
import numpy as np

from layerskip_jax.checkpoint.run_folder import checkpoint_folder
from layerskip_jax.config import Config
from layerskip_jax.errors import UserError
from layerskip_jax.locations import locate, write_file
from layerskip_jax.training.step import StepMetrics


class Diverged(UserError):  # noqa: N818  (named after what happened, like StopIteration)
    """Too many steps in a row were not applied."""


class BadSteps:
    """Counts the bad steps in a row. Every process stores its rows of each bad batch in ``RUN_DIR/bad_batches``.

    ``latest_checkpoint`` returns the step of the newest complete checkpoint, or None.
    """

    def __init__(self, config: Config, latest_checkpoint: Callable[[], int | None]):
        self._limit, self._latest_checkpoint = config.train.bad_steps, latest_checkpoint
        self._checkpoint_folder = checkpoint_folder(config)
        self._folder = locate(config.train.run_dir) / "bad_batches"
        self._has_prompts = bool(config.data.prompt_key)
        self.in_a_row = 0

    def after_step(self, done: int, metrics: StepMetrics, batch: dict[str, np.ndarray]) -> None:
        """Check step number ``done``, whose metrics are on the host; `Diverged` after ``train.bad_steps`` in a row."""
        if metrics.applied:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        loss, norm = float(metrics.objective), float(metrics.gradient_norm)
        reason, remedy = self._explain(math.isfinite(loss) and math.isfinite(norm), bool(metrics.tokens))
        stored = self._store(done, batch)
        if jax.process_index() == 0:
            line = (
                f"step {done} is not applied ({reason}): loss {loss:.4g}, gradient norm {norm:.4g}; its batch: {stored}"
            )
            print(line, file=sys.stderr, flush=True)
        if self.in_a_row < self._limit:
            return
        step = self._latest_checkpoint()
        where = f"the newest checkpoint in {self._checkpoint_folder} is of step {step}" if step else "nothing is saved"
        raise Diverged(
            f"{self.in_a_row} steps in a row were not applied (train.bad_steps): {reason}; the loss is {loss} and the "
            f"gradient norm {norm} at step {done}; {where}: {remedy}, and restart"
        )

    def _explain(self, finite: bool, has_tokens: bool) -> tuple[str, str]:
        """Return why a step is bad, and what the user can do if many are."""
        if finite and not has_tokens:
            prompts = "raise data.sequence_length, so that responses have room"
            return "no token has a loss", prompts if self._has_prompts else "check the data"
        return "a loss spike" if finite else "not finite", "lower optimizer.learning_rate or check the data"

    def _store(self, done: int, batch: dict[str, np.ndarray]) -> str:
        suffix = f".process_{jax.process_index()}" if jax.process_count() > 1 else ""
        file, content = self._folder / f"{done}{suffix}.npz", io.BytesIO()
        np.savez(content, **batch)  # type: ignore[arg-type]
        try:
            write_file(file, content.getvalue())
        except UserError as error:
            return f"cannot be stored: {error}"
        return str(file)
