"""A custom curriculum: losses only at the exits that decoding drafts from, and at the last one.

``python examples/curriculum.py --config configs/quickstart.py --train.run_dir runs/drafting_exits``
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from layerskip_jax.command_line import make_parser, parse_config
from layerskip_jax.errors import run_command
from layerskip_jax.recipe.recipe import Recipe
from layerskip_jax.training.loop import train


@dataclasses.dataclass(frozen=True)
class Alternating:
    """``C(t, l)``: the last layer at every step, and one of ``exits`` per step, in rotation."""

    exits: tuple[int, ...]  # counted from 1, as in decoding: exit E follows block E - 1

    def __call__(self, step: ArrayLike, total_steps: int, num_layers: int) -> jax.Array:
        layer_L = jnp.arange(num_layers)
        rotating = jnp.array(self.exits)[jnp.asarray(step) % len(self.exits)] - 1
        on_L = (layer_L == rotating) | (layer_L == num_layers - 1)
        return on_L.astype(jnp.float32)


def main(argv: list[str] | None = None) -> None:
    config, _ = parse_config(make_parser("Train with losses at the exits that decoding drafts from."), argv)
    layers = config.model.num_layers
    exits = config.decode_settings.exits or (
        config.decode_settings.exit_layer or max(2, layers // 4),
        max(2, layers // 2),
    )
    train(config, recipe=dataclasses.replace(Recipe.from_config(config), curriculum=Alternating(exits)))


if __name__ == "__main__":
    run_command(main)
