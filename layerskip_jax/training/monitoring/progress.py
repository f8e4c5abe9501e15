"""Progress of a run: lines or a bar for people, and metrics."""

import contextlib
import sys
import time
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from layerskip_jax.config import Config
from layerskip_jax.model import parameter_count
from layerskip_jax.recipe.recipe import Recipe
from layerskip_jax.training.monitoring.flops import flops_per_token, step_flops
from layerskip_jax.training.monitoring.goodput import Goodput, Phase
from layerskip_jax.training.monitoring.metrics import MetricsWriter, per_exit
from layerskip_jax.training.monitoring.watch import Watchdog
from layerskip_jax.training.step import StepMetrics


class Progress:
    """Reports a run that starts after step ``first``, on process 0 only.

    ``peak`` is the denominator of MFU and HFU [FLOP/s over all devices].
    """

    def __init__(self, config: Config, recipe: Recipe, first: int, goodput: Goodput, peak: float):
        self._config, self._recipe = config, recipe
        self._writer = MetricsWriter(config)
        self._goodput, self._watchdog = goodput, Watchdog(config.train.hang_seconds)
        self._flops, self._peak = flops_per_token(config), peak
        self._on = jax.process_index() == 0
        self._done_here = 0
        # A bar on a terminal, lines otherwise.
        self._bar = tqdm(
            initial=first,
            total=config.train.steps,
            unit="step",
            dynamic_ncols=True,
            disable=not (self._on and sys.stderr.isatty()),
        )
        self._restart_clock()

    def log(self, line: str) -> None:
        """Print a line above the bar."""
        if self._on:
            self._bar.write(line, file=sys.stdout)
            sys.stdout.flush()

    @contextlib.contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Assign the time of the body to ``phase``; the tokens/s include only training and data."""
        with self._goodput.during(phase):
            yield
        if phase != "data":
            self._watchdog.tick()
            self._restart_clock()

    def _restart_clock(self) -> None:
        self._clock, self._tokens, self._steps, self._computed = time.perf_counter(), 0.0, 0, 0.0

    def after_step(self, done: int, metrics: StepMetrics) -> None:
        """Report optimizer step number ``done``, whose metrics are on the host."""
        self._watchdog.tick()
        self._done_here += 1
        self._tokens, self._steps = self._tokens + float(metrics.tokens), self._steps + 1
        weight_L, drop_rate_L = np.asarray(metrics.exit_weight_L), np.asarray(metrics.drop_rate_L)
        self._computed += step_flops(self._config, self._recipe, weight_L, drop_rate_L).hardware
        seconds = time.perf_counter() - self._clock
        rate = self._tokens / seconds
        mfu, hfu = rate * self._flops / self._peak, self._computed / seconds / self._peak
        loss = float(metrics.exit_loss_L[-1]) if metrics.exit_weight_L[-1] > 0 else float(metrics.objective)
        if self._done_here == 1:  # its time includes compilation, so the bar must not estimate from it
            self._bar.initial = self._bar.n = self._bar.last_print_n = done
            self._bar.unpause()
        else:
            self._bar.update(1)
        self._bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tok/s, MFU {mfu:.0%}")
        if done == 1 or done % self._config.train.log_every == 0 or done == self._config.train.steps:
            timed = self._done_here > 1  # the first step's time includes compilation
            speed = {"train/tokens_per_second": rate, "train/mfu": mfu, "train/hfu": hfu} if timed else {}
            self._writer.write(done, training_values(metrics) | speed)
            if self._bar.disable:
                line = f"step {done}/{self._config.train.steps}  loss {loss:.3f}"
                if timed:
                    left = (self._config.train.steps - done) * seconds / self._steps
                    line += f"  {rate:,.0f} tok/s  MFU {mfu:.0%}  {left / 60:.0f} min left"
                self.log(line)
        if self._done_here == 1:
            self._goodput.end_start()
            self._restart_clock()  # leave compilation out of the tokens/s

    def after_evaluation(self, done: int, losses: dict[str, np.ndarray]) -> None:
        """Report ``losses[""]``, the held-out ``loss_L`` of the whole split, and those of each mixture component."""
        values = per_exit("validation/exit_loss", losses[""])
        self.log(f"step {done}  held-out loss by exit: {_by_exit(losses[''])}")
        for name, loss_L in losses.items():
            if name:
                values |= per_exit(f"validation/component_exit_loss/{name}", loss_L)
                self.log(f"step {done}  held-out loss of {name} by exit: {_by_exit(loss_L)}")
        self._writer.write(done, values)

    def after_sample(self, done: int, text: str) -> None:
        self._writer.write(done, {"sample": text})
        self.log(f"step {done}  sample: {self._config.train.sample_prompt + text!r}")

    def after_save(self, done: int) -> None:
        """Write the goodput, which a resume from this step reads back."""
        self._writer.write(done, self._goodput.values())
        self._writer.publish()

    def __enter__(self) -> "Progress":
        self._watchdog.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._watchdog.__exit__()
        self._bar.close()
        self._writer.close()


def _by_exit(loss_L: np.ndarray) -> str:
    return "  ".join(f"{x + 1}: {v:.3f}" for x, v in enumerate(loss_L))


def opening_line(config: Config, mesh: Mesh, recipe: Recipe, start: str) -> str:
    """Describe the model, the recipe, the devices and the length of a run; ``start`` describes its initial state."""
    shape = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    size = parameter_count(config.model) / 1e6
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return (
        f"{size:.1f}M parameters, {config.model.num_layers} layers ({_summarized(config, recipe)}), on {mesh.size} "
        f"{jax.devices()[0].device_kind} device(s){processes} ({shape}); {config.train.steps} steps, {start}"
    )


def _summarized(config: Config, recipe: Recipe) -> str:
    early, dropout = config.early_exit, config.layer_dropout.p_max
    if recipe != Recipe.from_config(config):
        return "a recipe of its own"
    if early.curriculum == "none" and not dropout:
        return "plain model: no layer dropout, no early exits"
    exits = " ".join(map(str, early.exits))
    return f"layer dropout up to {dropout:g}, early exits: {early.curriculum} {exits}".rstrip()


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
