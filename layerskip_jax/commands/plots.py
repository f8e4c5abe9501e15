"""``layerskip plots RUN`` draws the plots of a run from its metrics and its config."""

import math
from collections import defaultdict
from functools import partial

import jax
import numpy as np
from etils import epath

from layerskip_jax.checkpoint.run_folder import find_checkpoint, read_config
from layerskip_jax.command_line import add_run, make_parser
from layerskip_jax.config import Config
from layerskip_jax.errors import UserError
from layerskip_jax.evaluation.pictures import save_picture
from layerskip_jax.locations import locate
from layerskip_jax.recipe.recipe import Recipe
from layerskip_jax.training.monitoring.metrics import METRICS, read_records


def read_metrics(run_dir: str) -> dict[str, dict[int, float]]:
    """Read ``metrics.jsonl`` as ``{name: {step: value}}``; the last value counts if a step was repeated."""
    path = locate(run_dir) / METRICS
    if not path.exists():
        raise UserError(f"no metrics at {path}: expected a run folder of `layerskip train`")
    values: dict[str, dict[int, float]] = defaultdict(dict)
    for record in read_records(run_dir):
        for name, value in record.items():
            if isinstance(value, float):
                values[name][record["step"]] = value
    return values


def plot_run(run_dir: str) -> list[epath.Path]:
    """Write PNG plots to ``RUN/plots`` and return their paths."""
    config = read_config(find_checkpoint(run_dir))
    metrics, folder = read_metrics(run_dir), locate(run_dir) / "plots"
    pictures = {"loss": _draw_losses, "exits": _draw_exits, "schedules": _draw_schedules}
    return [
        save_picture(folder / f"{name}.png", partial(draw, metrics=metrics, config=config))
        for name, draw in pictures.items()
    ]


def _draw_losses(axes: np.ndarray, metrics: dict[str, dict[int, float]], config: Config) -> None:
    for axis, prefix, title in zip(
        axes,
        ("train/exit_loss/", "validation/exit_loss/"),
        ("training loss by exit", "held-out loss by exit"),
        strict=True,
    ):
        for exit_layer in range(1, config.model.num_layers + 1):
            points = metrics.get(f"{prefix}{exit_layer}", {})
            if points:
                shade = _shade(exit_layer, config)
                axis.plot(list(points), list(points.values()), color=shade, label=f"exit {exit_layer}", marker=".")
        axis.set(title=title, xlabel="optimizer step", ylabel="cross-entropy [nats/token]")
        if axis.lines:
            axis.legend(ncols=2, fontsize="small")


def _draw_exits(axes: np.ndarray, metrics: dict[str, dict[int, float]], config: Config) -> None:
    exits = range(1, config.model.num_layers + 1)
    last = [metrics.get(f"validation/exit_loss/{exit_layer}", {}) for exit_layer in exits]
    loss = [points[max(points)] if points else math.nan for points in last]
    axes[0].plot(exits, loss, marker="o")
    axes[0].set(title="held-out loss by exit, at the end", xlabel="exit layer", ylabel="cross-entropy [nats/token]")
    axes[1].plot(exits, np.exp(loss), marker="o")
    axes[1].set(title="held-out perplexity by exit, at the end", xlabel="exit layer", ylabel="perplexity")


def _draw_schedules(axes: np.ndarray, metrics: dict[str, dict[int, float]], config: Config) -> None:
    recipe = Recipe.from_config(config)
    for fraction in (0.0, 0.5, 1.0):
        step = round(fraction * (config.train.steps - 1))
        axes[0].plot(range(config.model.num_layers), recipe.drop_rates(step), marker="o", label=f"step {step}")
    axes[0].set(title="layer dropout: drop rate (eq. 2)", xlabel="block", ylabel="probability")
    axes[0].legend()
    steps, rotates = config.train.steps, config.early_exit.curriculum == "rotational"
    # A rotation has a short period: plot the first few in full. Sample the whole run for the other curricula.
    last = min(steps, 4 * config.early_exit.dilation) if rotates else steps
    shown = np.unique(np.linspace(0, last - 1, last if rotates else min(last, 200)).round().astype(int))
    weights = np.asarray(jax.vmap(recipe.exit_weights, out_axes=1)(shown))
    extent = (-0.5, last - 0.5, -0.5, config.model.num_layers - 0.5)
    image = axes[1].imshow(weights, aspect="auto", origin="lower", interpolation="nearest", extent=extent)
    axes[1].set(title="early-exit loss: weights (eq. 6)", xlabel="optimizer step", ylabel="block")
    axes[1].figure.colorbar(image, ax=axes[1])


def _shade(exit_layer: int, config: Config) -> tuple[float, float, float]:
    depth = exit_layer / config.model.num_layers
    return (0.9 * (1 - depth), 0.25 + 0.3 * depth, 0.2 + 0.7 * depth)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser("Redraw the plots of a run from its metrics and its config.", "plots")
    add_run(parser, "run folder of `layerskip train`")
    for path in plot_run(parser.parse_known_options(argv).run):
        print(path)
