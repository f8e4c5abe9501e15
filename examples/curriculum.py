"""A custom curriculum: the last exit alone in the first third of the run, then the curriculum of the config.

``python examples/curriculum.py --config configs/quickstart.py --train.run_dir runs/trunk_first``
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
class TrunkFirst:
    """``C(t, l)``: the last exit alone while ``t < start T``, then those of ``later``."""

    later: Curriculum
    start: float

    def __call__(self, step: ArrayLike, total_steps: int, num_layers: int) -> jax.Array:
        arguments = step, total_steps, num_layers
        return jnp.where(jnp.asarray(step) < self.start * total_steps, last_only(*arguments), self.later(*arguments))


def main(argv: list[str] | None = None) -> None:
    config, _ = parse_config(make_parser("Train the last exit first, then the early exits too."), argv)
    recipe = Recipe.from_config(config)
    train(config, recipe=dataclasses.replace(recipe, curriculum=TrunkFirst(recipe.curriculum, start=1 / 3)))


if __name__ == "__main__":
    run_command(main)
