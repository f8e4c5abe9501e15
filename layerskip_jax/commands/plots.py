"""``layerskip plots RUN`` draws the plots of a run from its metrics, its config and its newest checkpoint."""

import dataclasses
import math
from collections import defaultdict
from functools import cached_property
from typing import Any

import jax
import numpy as np
from etils import epath

from layerskip_jax.checkpoint.run_folder import RunFolder, find_checkpoint, newest_step
from layerskip_jax.checkpoint.swept import decode_settings
from layerskip_jax.checks import require
from layerskip_jax.command_line import OneLineParser, add_run, make_parser
from layerskip_jax.config import Config, DecodeConfig
from layerskip_jax.decoding.configure import resolve_exit_layer
from layerskip_jax.errors import UserError, warn
from layerskip_jax.evaluation.exits import ExitQuality, checkpoint_quality
from layerskip_jax.evaluation.pictures import PLAIN, Picture, exit_color, smooth, ticks
from layerskip_jax.locations import locate
from layerskip_jax.model import Transformer
from layerskip_jax.recipe.recipe import Recipe
from layerskip_jax.training.monitoring.metrics import METRICS, read_records


def read_metrics(run_dir: str, last_step: float = math.inf) -> dict[str, dict[int, float]]:
    """Read ``metrics.jsonl`` as ``{name: {step: value}}`` up to ``last_step``.

    The last value counts if a step was repeated.
    """
    path = locate(run_dir) / METRICS
    if not path.exists():
        raise UserError(f"no metrics at {path}: expected a run folder of `layerskip train`")
    values: dict[str, dict[int, float]] = defaultdict(dict)
    for record in read_records(run_dir, last_step):
        for name, value in record.items():
            if isinstance(value, float):
                values[name][record["step"]] = value
    return values


@dataclasses.dataclass(frozen=True)
class Run:
    """The stored results of a run: one checkpoint with its config, the metrics, and the decode settings."""

    source: RunFolder
    config: Config
    metrics: dict[str, dict[int, float]]
    decode: DecodeConfig

    @classmethod
    def open(cls, path: str) -> "Run":
        """Read the run at ``path``; raises `UserError` if there is none.

        ``path`` is a run folder, or one checkpoint in it: then the metrics end at its step.
        """
        checkpoint = find_checkpoint(path)
        require(checkpoint.name.isdigit(), f"{path} is not in a run folder: give the run, or RUN/checkpoints/STEP")
        last_step = int(checkpoint.name) if checkpoint == locate(path) else math.inf
        source = RunFolder(checkpoint)
        config, metrics = source.config, read_metrics(str(source.root), last_step)
        return cls(source, config, metrics, decode_settings(source, config))

    @property
    def checkpoint(self) -> epath.Path:
        return self.source.checkpoint

    @property
    def folder(self) -> epath.Path:
        return self.source.root

    @property
    def layers(self) -> int:
        return self.config.model.num_layers

    @property
    def draft_exit(self) -> int:
        return resolve_exit_layer(self.decode, self.layers)

    @cached_property
    def exit_weights(self) -> tuple[np.ndarray, np.ndarray]:
        """The weights of the exits, ``weight_LN``, and the N steps that they belong to."""
        config, steps = self.config, self.config.train.steps
        # Show the first four rotations in full; for the other curricula, sample 200 steps of the run.
        rotates = config.early_exit.curriculum == "rotational"
        last = min(steps, 4 * config.early_exit.dilation) if rotates else steps
        shown = np.unique(np.linspace(0, last - 1, last if rotates else min(last, 200)).round().astype(int))
        return np.asarray(jax.vmap(Recipe.from_config(config).exit_weights, out_axes=1)(shown)), shown

    @cached_property
    def exits_with_loss(self) -> list[int]:
        """The exits that had a loss in training, the last included."""
        return (np.flatnonzero(self.exit_weights[0].max(axis=1) > 0) + 1).tolist()

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the steps and the finite values of a metric."""
        points = {step: value for step, value in sorted(self.metrics.get(name, {}).items()) if math.isfinite(value)}
        return np.array(list(points)), np.array(list(points.values()))

    def last_quality(self) -> ExitQuality:
        """Return the last held-out losses of training, and NaN for the agreements, which training does not measure."""
        last = [self.series(f"validation/exit_loss/{exit_layer}")[1] for exit_layer in range(1, self.layers + 1)]
        loss_L = np.array([values[-1] if len(values) else math.nan for values in last])
        return ExitQuality(loss_L, np.full(self.layers, math.nan))

    def measured_quality(
        self, batches: int, loaded: tuple[Transformer, Config, epath.Path] | None = None
    ) -> tuple[ExitQuality, str]:
        """Return `checkpoint_quality` and ""; if the measurement fails, `last_quality` and the reason."""
        try:
            return checkpoint_quality(self.source, batches, loaded=loaded), ""
        except UserError as error:
            return self.last_quality(), str(error)


def find_plain(run: str, given: str | None) -> str:
    """Return the run of the plain model: ``given``, else ``RUN_plain`` if it has metrics and a checkpoint, else ""."""
    if given:
        return given
    plain = f"{locate(run)}_plain"
    usable = (locate(plain) / METRICS).exists() and newest_step(locate(plain) / "checkpoints") is not None
    return plain if usable else ""


def open_runs(run_dir: str, plain_dir: str | None) -> tuple[Run, Run | None]:
    """Open a run and the plain model's, see `find_plain`."""
    run = Run.open(run_dir)
    plain = find_plain(str(run.folder), plain_dir)
    return run, Run.open(plain) if plain else None


def plot_run(run_dir: str, plain_dir: str | None = None, measure: bool = False) -> list[epath.Path]:
    """Write PNG plots to ``RUN/plots`` and return their paths.

    ``plain_dir`` is as for `find_plain`. With ``measure``, the plot of the exits shows `Run.measured_quality`; without
    it, the last losses of training.
    """
    run, plain = open_runs(run_dir, plain_dir)

    def quality(one: Run) -> ExitQuality:
        found, problem = (
            one.measured_quality(run.config.train.evaluate_batches) if measure else (one.last_quality(), "")
        )
        if problem:
            warn(f"the exits of {one.folder} are not measured: {problem}")
        return found

    pictures = {
        "loss": loss_picture(run, plain),
        "exits": exits_picture(run, quality(run), quality(plain) if plain else None),
        "schedules": schedules_picture(run),
    }
    return [picture.save(run.folder / "plots" / f"{name}.png") for name, picture in pictures.items()]


def loss_picture(run: Run, plain: Run | None = None) -> Picture:
    """Return a picture of the training loss, smoothed, and the held-out loss of a few exits and of a plain model."""
    trained, layers = run.exits_with_loss, run.layers
    wanted = (run.draft_exit, max(1, layers // 2), layers)
    shown = sorted({min(trained, key=lambda e: abs(e - exit_layer)) for exit_layer in wanted} | {layers})
    notes = {layers: ", full model"} | ({run.draft_exit: ", drafts"} if run.draft_exit != layers else {})

    smoothed = len(run.series(f"train/exit_loss/{layers}")[1]) > 20
    # The training loss of a distilled exit is no cross-entropy with the data, which the axis shows.
    in_training = [layers] if run.config.early_exit.distillation != "none" else shown

    def plot(axis: Any, run: Run, name: str, **style: Any) -> None:
        steps, values = run.series(name)
        if not len(values):  # `log_every` can skip all steps at which a rotation trains this exit
            return
        if name.startswith("train") and smoothed:
            axis.plot(steps, values, color=style["color"], alpha=0.25, linewidth=0.7)
            axis.plot(steps, smooth(values), linewidth=2, **style)
        else:
            axis.plot(steps, values, marker="o", linewidth=1.6, **style)

    def draw(axes: np.ndarray) -> None:
        titles = {"train": "Training loss" + ", smoothed" * smoothed, "validation": "Held-out loss"}
        for axis, (kind, title) in zip(axes, titles.items(), strict=True):
            for exit_layer in in_training if kind == "train" else shown:
                label, color = f"exit {exit_layer}{notes.get(exit_layer, '')}", exit_color(exit_layer, layers)
                mixed = kind == "train" and exit_layer == layers and run.config.early_exit.agreement_weight > 0
                label += ", with agreement" * mixed
                plot(axis, run, f"{kind}/exit_loss/{exit_layer}", color=color, label=label)
            if plain:
                plot(axis, plain, f"{kind}/exit_loss/{plain.layers}", label="plain model", **PLAIN)
            axis.set(title=title, xlabel="optimizer step", ylabel="cross-entropy [nats/token]")
            axis.set_xlim(0, 1.03 * int(run.checkpoint.name))
            if axis.lines:
                axis.legend()

    ends = {exit_layer: run.series(f"validation/exit_loss/{exit_layer}")[1] for exit_layer in shown}
    described = ", ".join(
        f"at exit {exit_layer} from {values[0]:.2f} to {values[-1]:.2f}"
        for exit_layer, values in ends.items()
        if len(values)
    )
    return Picture(draw, f"Training and held-out loss over optimizer steps. Held-out loss {described}.")


def exits_picture(
    run: Run, quality: ExitQuality, plain: ExitQuality | None = None, acceptance_L: np.ndarray | None = None
) -> Picture:
    """Return a picture of loss and agreement by exit, with the acceptance and a plain model if given.

    If neither agreement nor acceptance is known, as at the end of training, the picture has the loss only.
    """
    has_agreement = acceptance_L is not None or not np.isnan(quality.agreement_L).all()
    lines = [(quality, {"color": "C0", "label": "this model"})] + (
        [(plain, {"label": "plain model"} | PLAIN)] if plain else []
    )

    def draw(axes: np.ndarray) -> None:
        for line, style in lines:
            exits = np.arange(1, len(line.loss_L) + 1)
            axes[0].plot(exits, line.loss_L, marker="o", **style)
            if has_agreement:
                axes[1].plot(exits, line.agreement_L, marker="o", **style)
        if acceptance_L is not None:
            label = f"acceptance, {run.decode.draft_length} drafts a round"
            exits = np.arange(1, run.layers + 1)
            axes[1].plot(exits[:-1], acceptance_L[:-1], color="C0", linestyle=":", marker="s", label=label)
        axes[0].set(title="Held-out loss by exit", ylabel="cross-entropy [nats/token]")
        if has_agreement:
            axes[1].set(title="Same next token as the full model", ylabel="share of tokens", ylim=(0, 1.05))
        for axis in axes:
            axis.axvline(run.draft_exit, color="C1", linewidth=1.4, label=f"draft exit {run.draft_exit}")
            axis.set_xlabel("exit (blocks that run)")
            axis.set_xticks(ticks(run.layers))
            axis.legend()

    at = run.draft_exit - 1
    agreed = quality.agreement_L[at]
    described = "" if np.isnan(agreed) else f", the full model's next token in {agreed:.0%} of the cases"
    if acceptance_L is not None and not np.isnan(acceptance_L[at]):
        described += f", {acceptance_L[at]:.0%} of its drafts accepted"
    return Picture(
        draw,
        f"Loss{' and agreement' * has_agreement} by exit. Draft exit {run.draft_exit}: loss {quality.loss_L[at]:.2f}"
        f"{described}. Full model: {quality.loss_L[-1]:.2f}.",
        panels=1 + has_agreement,
        size=(5.5 * (1 + has_agreement), 4),
    )


def schedules_picture(run: Run) -> Picture:
    """Return a picture of the drop rates by block, and of the exit weights over steps.

    Blocks count from 1, so that exit E follows block E.
    """
    recipe, layers = Recipe.from_config(run.config), run.layers
    (weight_LN, steps), counted = run.exit_weights, range(1, layers + 1)
    whole = run.config.train.steps == steps[-1] + 1

    def draw(axes: np.ndarray) -> None:
        for number, fraction in enumerate((0.0, 0.5, 1.0), start=1):
            step = round(fraction * (run.config.train.steps - 1))
            label, color = f"step {step + 1}", exit_color(number, 3)
            axes[0].plot(counted, recipe.drop_rates(step), marker="o", color=color, label=label)
        axes[0].set(title="Layer dropout", xlabel="block", ylabel="drop rate (eq. 2)")
        axes[0].set_xticks(ticks(layers))
        axes[0].legend()
        extent = (0.5, steps[-1] + 1.5, 0.5, layers + 0.5)
        shown = np.where(weight_LN > 0, weight_LN, np.nan)
        image = axes[1].imshow(shown, aspect="auto", origin="lower", interpolation="nearest", extent=extent, vmin=0)
        axes[1].set(
            title="Early-exit loss" + ("" if whole else ", first steps"), xlabel="optimizer step", ylabel="exit"
        )
        axes[1].set_yticks(ticks(layers))
        axes[1].grid(visible=False)
        axes[1].figure.colorbar(image, ax=axes[1], label="weight (eq. 6)")

    rates = recipe.drop_rates(run.config.train.steps - 1)
    return Picture(
        draw,
        f"Drop rates by block, up to {float(np.max(rates)):.0%} at the last step, and the weights of the exits over "
        f"steps. Exits with a loss: {' '.join(map(str, run.exits_with_loss))}.",
    )


def add_plain(parser: OneLineParser) -> None:
    parser.add_argument(
        "--plain", metavar="RUN", help="run of a plain model to compare with (default: RUN_plain, if any)"
    )


def main(argv: list[str] | None = None) -> None:
    parser = make_parser("Redraw the plots of a run from its metrics, its config and its newest checkpoint.", "plots")
    add_run(parser, "run folder of `layerskip train`")
    add_plain(parser)
    options = parser.parse_known_options(argv)
    for path in plot_run(options.run, options.plain, measure=True):
        print(path)
