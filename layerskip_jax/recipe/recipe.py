"""The LayerSkip recipe of a run: the few pure functions that a research variant replaces.

recipe = dataclasses.replace(Recipe.from_config(config), curriculum=my_curriculum)
train(config, recipe=recipe)
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from layerskip_jax.checks import require
from layerskip_jax.config import Config
from layerskip_jax.model import Transformer
from layerskip_jax.recipe import early_exit, layer_dropout

Guide = Callable[[Transformer, jax.Array, jax.Array], Any]
"""``(model, inputs_BT, segments_BT) -> arrays [B, T, ...]``, made before the exits run, for `Recipe.exit_loss`."""

IsSpike = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""``is_spike(objective, gradient_norm, usual)``: whether a step is not applied; ``usual`` is 0 before the first."""


@dataclasses.dataclass(frozen=True)
class Above:
    """A spike is an objective of more than ``factor`` times its moving mean; 0: nothing is one."""

    factor: float

    def __call__(self, objective: jax.Array, gradient_norm: jax.Array, usual: jax.Array) -> jax.Array:
        return jnp.logical_and(self.factor > 0, (usual > 0) & (objective > self.factor * usual))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What happens to which layer at which step; static under jit, so its functions must be pure."""

    num_layers: int
    total_steps: int
    p_max: float
    layer_scale: layer_dropout.LayerScale
    time_scale: layer_dropout.TimeScale
    curriculum: early_exit.Curriculum
    e_scale: float
    is_spike: IsSpike
    exit_scale: early_exit.ExitScale = early_exit.exit_scale
    exit_loss: early_exit.ExitLoss = early_exit.cross_entropy
    guide: Guide | None = None

    @classmethod
    def from_config(cls, config: Config) -> Self:
        exits = config.early_exit
        curricula: dict[str, early_exit.Curriculum] = {
            "rotational": early_exit.Rotational(exits.dilation, exits.always_last),
            "gradual": early_exit.gradual,
            "all": early_exit.all_exits,
            "none": early_exit.last_only,
        }
        return cls(
            num_layers=config.model.num_layers,
            total_steps=config.train.steps,
            p_max=config.layer_dropout.p_max,
            layer_scale=layer_dropout.LAYER_SCALES[config.layer_dropout.layer_scale],
            time_scale=layer_dropout.TIME_SCALES[config.layer_dropout.time_scale],
            curriculum=curricula[exits.curriculum],
            e_scale=exits.e_scale,
            is_spike=Above(config.train.skip_spikes),
        )

    def check(self) -> None:
        """Raise `UserError` where a function gives what cannot be meant, at the first, the middle or the last step."""
        L, T = self.num_layers, self.total_steps

        def parts(step: jax.Array) -> dict[str, jax.Array]:
            scales = {"layer_scale": self.layer_scale(L), "exit_scale": self.exit_scale(L, self.e_scale)}
            of_step = {"time_scale": self.time_scale(step, T), "curriculum": self.curriculum(step, T, L)}
            return {name: jnp.asarray(value) for name, value in (scales | of_step).items()}

        for name, part in jax.eval_shape(parts, jax.ShapeDtypeStruct((), jnp.int32)).items():
            shape, said = ((), "one number") if name == "time_scale" else ((L,), f"{L} numbers, one a layer")
            require(part.shape == shape, f"the recipe's {name} must give {said}, not the shape {part.shape}")
        for step in sorted({0, T // 2, T - 1}):
            rates_L, weights_L = map(np.asarray, _rates_and_weights(self, step))
            allowed = np.all((rates_L >= 0) & (rates_L < 1))
            require(bool(allowed), f"the recipe's drop rates must be in [0, 1), not {rates_L.tolist()} at step {step}")
            allowed = np.all((weights_L >= 0) & np.isfinite(weights_L))
            require(bool(allowed), f"the recipe's exit weights must not be negative: {weights_L.tolist()}, step {step}")

    def drop_rates(self, step: ArrayLike) -> jax.Array:
        """``p_L = S(t) D(l) p_max`` (LayerSkip eq. 2)."""
        return self.time_scale(step, self.total_steps) * self.layer_scale(self.num_layers) * self.p_max

    def exit_weights(self, step: ArrayLike) -> jax.Array:
        """``w_L`` (LayerSkip eq. 6) at optimizer step ``step``."""
        enabled_L = self.curriculum(step, self.total_steps, self.num_layers)
        return early_exit.exit_weights(enabled_L, self.exit_scale(self.num_layers, self.e_scale))


@partial(jax.jit, static_argnums=0)  # one small program, where a first call of each operation alone takes a second
def _rates_and_weights(recipe: Recipe, step: ArrayLike) -> tuple[jax.Array, jax.Array]:
    return recipe.drop_rates(step), recipe.exit_weights(step)
