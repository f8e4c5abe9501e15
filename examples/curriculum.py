"""A custom curriculum: the early exits have a loss at every second step only, which halves their FLOPs.

A `period` that has a common factor with the dilation of the paper's rotation would leave some exits without a loss.

``python examples/curriculum.py --config configs/quickstart.py --train.run_dir runs/every_second``
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from layerskip_jax.command_line import make_parser, parse_config
from layerskip_jax.errors import run_command
from layerskip_jax.recipe.early_exit import Curriculum, last_only
from layerskip_jax.recipe.recipe import Recipe
from layerskip_jax.training.loop import train


@dataclasses.dataclass(frozen=True)
class EveryNth:
    """``C(t, l)``: the exits of ``inner`` if t is a multiple of ``period``, else the last exit alone."""

    inner: Curriculum
    period: int

    def __call__(self, step: ArrayLike, total_steps: int, num_layers: int) -> jax.Array:
        arguments = step, total_steps, num_layers
        return jnp.where(jnp.asarray(step) % self.period == 0, self.inner(*arguments), last_only(*arguments))


def main(argv: list[str] | None = None) -> None:
    config, _ = parse_config(make_parser("Train the early exits at every second step."), argv)
    recipe = Recipe.from_config(config)
    curriculum = EveryNth(recipe.curriculum, period=2)
    # With an agreement, an early exit would teach the last exit at the other steps too.
    train(config, recipe=dataclasses.replace(recipe, curriculum=curriculum, agreement=None))


if __name__ == "__main__":
    run_command(main)
