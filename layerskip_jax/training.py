"""The training loop: from a config to a trained, evaluated and saved model. Read it from top to bottom."""

import contextlib
import itertools
import math
import sys
import time
from collections.abc import Iterable
from functools import partial

import grain
import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from layerskip_jax.checkpoint import Checkpoints
from layerskip_jax.config import Config
from layerskip_jax.data.pipeline import make_batches
from layerskip_jax.data.tokenizer import Tokenizer
from layerskip_jax.decoding.text import TextGenerator
from layerskip_jax.errors import UserError
from layerskip_jax.losses import Batch
from layerskip_jax.metrics import (
    MetricsWriter,
    flops_per_token,
    peak_flops,
    per_exit,
    training_values,
)
from layerskip_jax.model import Transformer, parameter_count
from layerskip_jax.recipe import Recipe
from layerskip_jax.sharding import batch_sharding, make_mesh
from layerskip_jax.train_step import StepMetrics, Trainer, TrainState


def train(config: Config, recipe: Recipe | None = None) -> TrainState:
    """Train as ``config`` says, from the newest checkpoint in its run folder if there is one; return the last state.

    ``recipe`` replaces the functions that the config names, for research variants. Raises `UserError` for what the
    user can mend: a corpus, a tokenizer, a mesh or a checkpoint that does not fit, or a loss that is not finite.
    """
    mesh = make_mesh(config)
    tokenizer = Tokenizer.load(config.data.tokenizer)
    tokenizer.check_vocabulary(config.model.vocab_size)
    trainer = Trainer(config, recipe or Recipe.from_config(config), mesh)
    data = iter(local_batches(config, config.data.train_split))
    local_batches(config, config.data.validation_split, epochs=1)  # a split that cannot be read is said now, not later

    with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(config))
        checkpoints.keep_tokenizer(tokenizer)
        resumed = checkpoints.latest()
        state = trainer.init() if resumed is None else checkpoints.restore(resumed, trainer.abstract_state(), data)
        first = int(state.step)
        progress = stack.enter_context(Progress(config, mesh, first))
        progress.say(_opening_line(config, mesh, resumed, checkpoints.changed_settings(resumed) if resumed else []))

        pending: StepMetrics | None = None
        for step in range(first, config.train.steps):
            state, metrics = trainer.step(state, to_devices(next(data), mesh))
            # The device works on this step while the host looks at the one before.
            if pending is not None:
                progress.after_step(step, pending, checkpoints)
            pending, done = metrics, step + 1

            evaluates = _due(done, config.train.evaluate_every, config.train.steps)
            saves = _due(done, config.train.checkpoint_every, config.train.steps)
            samples = config.train.sample_every and done % config.train.sample_every == 0
            if evaluates or saves or samples:
                progress.after_step(done, pending, checkpoints)  # before saving, so that no bad state is saved
                pending = None
            if evaluates:
                progress.after_evaluation(done, evaluate(trainer, state.model))
            if saves:
                checkpoints.save(state, data)
            if samples:
                progress.after_sample(done, _sample(config, state.model, tokenizer))
            if evaluates or saves or samples:
                progress.restart_clock()
    return state


def local_batches(config: Config, split: str, epochs: int | None = None) -> grain.IterDataset:
    """Return this process's part of the batches: forever and shuffled, or ``epochs`` passes in order."""
    return make_batches(
        config,
        split,
        batch_size=config.train.batch_size // jax.process_count(),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        epochs=epochs,
        shuffle=epochs is None,
        seed=config.train.seed,
    )


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> Batch:
    """Lay a batch out over the mesh, each process giving its own rows."""
    lay = partial(jax.make_array_from_process_local_data, batch_sharding(mesh))
    return Batch(*(lay(batch[name]) for name in Batch._fields))


def evaluate(trainer: Trainer, model: Transformer, split: str | None = None) -> np.ndarray:
    """Return ``loss_L``: the mean cross-entropy of every exit on held-out text [nats a token].

    The same first ``evaluate_batches`` batches of the validation split every time.
    """
    config = trainer.config
    batches: Iterable[dict[str, np.ndarray]] = local_batches(config, split or config.data.validation_split, epochs=1)
    total_L, tokens = np.zeros(config.model.num_layers), 0.0
    with jax.set_mesh(trainer.mesh):
        for batch in itertools.islice(batches, config.train.evaluate_batches):
            loss_L, count = jax.device_get(trainer.evaluate(model, to_devices(batch, trainer.mesh)))
            total_L, tokens = total_L + loss_L, tokens + float(count)
    return total_L / tokens


def _due(done: int, every: int, last: int) -> bool:
    return done % every == 0 or done == last


def _sample(config: Config, model: Transformer, tokenizer: Tokenizer) -> str:
    generator = TextGenerator(model.unstacked(), tokenizer, config.decode)
    return generator.generate([config.train.sample_prompt]).completions[0].text


def _opening_line(config: Config, mesh: Mesh, resumed: int | None, changed: list[str]) -> str:
    shape = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    size = parameter_count(config.model) / 1e6
    start = f"resuming after step {resumed}" if resumed else "from scratch"
    with_changes = f"; changed settings: {', '.join(changed)}" if changed else ""
    return (
        f"{size:.1f}M parameters, {config.model.num_layers} layers, on {mesh.size} {jax.devices()[0].device_kind} "
        f"device(s) ({shape}); {config.train.steps} steps, {start}{with_changes}"
    )


class Progress:
    """What a person sees and what is written while a run goes on; knows nothing of how training works."""

    def __init__(self, config: Config, mesh: Mesh, first: int):
        self._config = config
        self._writer = MetricsWriter(config.train.run_dir)
        self._flops, self._peak = flops_per_token(config), peak_flops()
        self._on = jax.process_index() == 0
        self._done_here = 0
        # A bar on a terminal, lines elsewhere.
        self._bar = tqdm(
            initial=first, total=config.train.steps, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty()
        )
        self.restart_clock()

    def say(self, line: str) -> None:
        if self._on:
            self._bar.write(line, file=sys.stdout)
            sys.stdout.flush()

    def restart_clock(self) -> None:
        """Leave what was not training (evaluation, saving, sampling) out of the rate."""
        self._clock, self._tokens, self._steps = time.perf_counter(), 0.0, 0

    def after_step(self, done: int, device_metrics: StepMetrics, checkpoints: Checkpoints) -> None:
        """Report optimizer step number ``done``; stop the run with a clear line if its numbers are not finite."""
        metrics = jax.device_get(device_metrics)
        if not (math.isfinite(metrics.objective) and math.isfinite(metrics.gradient_norm)):
            kept = checkpoints.latest()
            raise UserError(
                f"the loss is {float(metrics.objective)} and the gradient norm {float(metrics.gradient_norm)} at step "
                f"{done}; "
                + (
                    f"the checkpoint of step {kept} in {checkpoints.folder} is good: "
                    if kept
                    else "nothing was saved: "
                )
                + "lower optimizer.learning_rate or look at the data, and start again"
            )
        self._done_here += 1
        self._tokens, self._steps = self._tokens + float(metrics.tokens), self._steps + 1
        rate = self._tokens / (time.perf_counter() - self._clock)
        mfu = rate * self._flops / self._peak
        loss = float(metrics.exit_loss_L[-1]) if metrics.exit_weight_L[-1] > 0 else float(metrics.objective)
        self._bar.update(1)
        self._bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tok/s, MFU {mfu:.0%}")
        if done == 1 or _due(done, self._config.train.log_every, self._config.train.steps):
            speed = {"train/tokens_per_second": rate, "train/mfu": mfu}
            self._writer.write(done, training_values(metrics) | speed)
            if self._bar.disable:
                left = (self._config.train.steps - done) * (time.perf_counter() - self._clock) / self._steps
                self.say(
                    f"step {done}/{self._config.train.steps}  loss {loss:.3f}  {rate:,.0f} tok/s  MFU {mfu:.0%}  "
                    f"{left / 60:.0f} min left"
                )
        if self._done_here == 1:
            self.restart_clock()  # the first step compiled

    def after_evaluation(self, done: int, loss_L: np.ndarray) -> None:
        self._writer.write(done, per_exit("validation/exit_loss", loss_L))
        self.say(f"step {done}  held-out loss by exit: " + "  ".join(f"{x + 1}: {v:.3f}" for x, v in enumerate(loss_L)))

    def after_sample(self, done: int, text: str) -> None:
        self._writer.write(done, {"sample": text})
        self.say(f"step {done}  sample: {self._config.train.sample_prompt + text!r}")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._writer.close()
