"""Write the result of ``layerskip search``: a table, ``search.json``, ``frontier.png`` and ``best.py``, a config."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from layerskip_jax.config import Config
from layerskip_jax.errors import UserError, note
from layerskip_jax.evaluation.pictures import Picture
from layerskip_jax.locations import write_file
from layerskip_jax.training.search_space import Overrides, RecipeQuality, frontier

Result = tuple[RecipeQuality, Overrides, int]
"""The quality of a recipe, its settings, and the number of its trial."""


def format_recipe(quality: RecipeQuality, overrides: Overrides) -> str:
    settings = " ".join(f"{name} {_word(value)}" for name, value in overrides.items())
    return (
        f"loss {100 * quality.loss_increase:+.2f} %, agreement {100 * quality.agreement:.1f} %, "
        f"predicted speedup {quality.speedup:.2f}x: {settings}"
    )


def _word(value: Any) -> str:
    values = value if isinstance(value, list | tuple) else [value]
    return " ".join(f"{item:.3g}" if isinstance(item, float) else str(item) for item in values)


def config_source(options: argparse.Namespace, trained: str, result: Result) -> str:
    """Return a config file: the user's config file and ``options``, and the recipe that the ``trained`` proxy found.

    The recipe's learning rate is left out unless ``--width`` is 0.
    """
    quality, overrides, trial = result
    increase, agreement = 100 * quality.loss_increase, 100 * quality.agreement
    left_out = "optimizer.learning_rate" if options.width else ""
    given = {name: value for name, value in vars(options).items() if "." in name}
    recipe = {name: value for name, value in overrides.items() if name != left_out}
    folder = f"{Path(options.folder)}/best-{trial}"  # no other run is there
    settings = {"train.run_dir": folder} | given | recipe
    lines = "\n".join(f"    {name!r}: {value!r}," for name, value in settings.items())
    file = options.config
    base = f"load_config_file({file!r})" if file else "Config()"
    imports = "from layerskip_jax.command_line import load_config_file" if file else "from layerskip_jax import Config"
    return f'''"""The recipe that layerskip search found on {trained}.

Last exit: loss {increase:+.2f} % relative to the plain model; agreement {agreement:.1f} %.
"""

{imports}
from layerskip_jax.config_dict import apply_overrides

SETTINGS = {{
{lines}
}}


def get_config():
    return apply_overrides({base}, SETTINGS)
'''


def plot(results: list[Result], file: epath.Path) -> None:
    """Plot agreement against loss, with the frontier."""

    def draw(axes: np.ndarray) -> None:
        qualities = [one for one, _, _ in results]
        axis, best = axes[0], frontier(qualities)
        points = [(100 * one.loss_increase, 100 * one.agreement) for one in qualities]
        axis.scatter(*zip(*points, strict=True), color="C9")
        front = sorted(one for one, is_best in zip(qualities, best, strict=True) if is_best)
        axis.plot([100 * one.loss_increase for one in front], [100 * one.agreement for one in front], "o-", color="C0")
        for one, _, trial in results:
            axis.annotate(str(trial), (100 * one.loss_increase, 100 * one.agreement), fontsize="small")
        axis.axvline(0, color="C9", zorder=0)
        axis.set(
            title="recipes by number of trial; the frontier in blue",
            xlabel="loss of the last exit relative to the plain model [%]",
            ylabel="agreement of the drafting exit [%]",
        )

    Picture(draw, "agreement against loss of all recipes", panels=1, size=(7, 4.5)).save(file)


def write_result(results: list[Result], proxy: Config, options: argparse.Namespace) -> None:
    """Print the ``results``, best first, and write ``search.json``, ``frontier.png`` and ``best.py``."""
    if not results:
        raise UserError(
            "no trial was trained to the end: allow more --minutes or more --trials, or lower optimizer.learning_rate "
            "if they diverged"
        )
    on_frontier = frontier([quality for quality, _, _ in results])
    rows = [
        {"trial": trial, **quality._asdict(), "frontier": best, "settings": overrides}
        for (quality, overrides, trial), best in zip(results, on_frontier, strict=True)
    ]
    folder = epath.Path(options.folder)
    trained = f"{proxy.model.num_layers} blocks x {proxy.model.dim}, {proxy.train.steps} steps"
    write_file(folder / "search.json", json.dumps(rows, indent=1) + "\n")
    write_file(folder / "best.py", config_source(options, trained, results[0]))
    plot(results, folder / "frontier.png")
    if options.json:
        for row in rows:
            print(json.dumps(row))
        return
    for (quality, settings, trial), is_best in zip(results, on_frontier, strict=True):
        print(f"{'frontier' if is_best else '':8} trial {trial:3}: {format_recipe(quality, settings)}")
    _note_tolerance(results, options.loss_tolerance)
    print(f"best: {folder}/best.py; picture: {folder}/frontier.png")
    print(f"next: layerskip train --config {folder}/best.py")


def _note_tolerance(results: list[Result], tolerance: float) -> None:
    """Print a note if the best recipe exceeds the tolerance of the loss, which only lowers its score."""
    excess = 100 * (results[0][0].loss_increase - tolerance)
    if excess <= 0:
        return
    within = next((trial for quality, _, trial in results if quality.loss_increase <= tolerance), None)
    best = "no recipe is within it" if within is None else f"trial {within} is the best within it"
    note(f"the best recipe exceeds the loss tolerance of {100 * tolerance:.2f} % by {excess:.2f} %; {best}")
