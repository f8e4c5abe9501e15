"""A custom teacher: each exit, the last one too, also learns the probabilities of the last exit,
computed without layer dropout.

The setting ``early_exit.distillation kl`` needs no second forward pass, but layer dropout changes its teacher.

``python examples/distillation.py --config configs/quickstart.py --train.run_dir runs/distilled``
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from layerskip_jax.command_line import make_parser, parse_config
from layerskip_jax.errors import run_command
from layerskip_jax.model import Transformer
from layerskip_jax.recipe.early_exit import cross_entropy
from layerskip_jax.recipe.recipe import Recipe
from layerskip_jax.training.loop import train

WEIGHT = 0.5
"""Weight a of the distillation term in an exit's loss; cross-entropy has weight 1 - a."""


def last_hidden(model: Transformer, inputs_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """Return ``x_BTD`` after the last block: one more forward pass per step, but no [batch, length, vocab] array."""
    return model.run_uncached(inputs_BT, segments_BT)[0]


def distilled(
    g: Callable[[jax.Array], jax.Array], x_BCD: jax.Array, targets_BC: jax.Array, mask_BC: jax.Array, last_BCD: Any
) -> jax.Array:
    """``(1 - a) CE(g(x), Y) + a KL(g(x_L) || g(x))``, without a gradient through the teacher g(x_L)."""
    teacher_BCV = jax.lax.stop_gradient(jax.nn.log_softmax(g(last_BCD), axis=-1))
    student_BCV = jax.nn.log_softmax(g(x_BCD), axis=-1)
    kl_BC = jnp.sum(jnp.exp(teacher_BCV) * (teacher_BCV - student_BCV), axis=-1)
    return (1 - WEIGHT) * cross_entropy(g, x_BCD, targets_BC, mask_BC) + WEIGHT * jnp.sum(kl_BC * mask_BC)


def main(argv: list[str] | None = None) -> None:
    config, _ = parse_config(make_parser("Train every exit to predict the last exit's probabilities too."), argv)
    recipe = Recipe.from_config(config)
    # `distillation` and `agreement` are losses with a teacher in the same pass. This example has its own teacher.
    recipe = dataclasses.replace(recipe, exit_loss=distilled, teacher=last_hidden, distillation=None, agreement=None)
    train(config, recipe=recipe)


if __name__ == "__main__":
    run_command(main)
