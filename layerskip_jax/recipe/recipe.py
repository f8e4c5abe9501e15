"""The LayerSkip recipe of a run: the pure functions that a research variant replaces.

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
from layerskip_jax.config import Config, EarlyExitConfig
from layerskip_jax.model import Block, Transformer
from layerskip_jax.recipe import early_exit, layer_dropout
from layerskip_jax.recipe.distillation import (
    LOSSES,
    ConstantShare,
    SelfDistillation,
    Share,
    argmax_cross_entropy,
)
from layerskip_jax.recipe.layer_dropout import (
    ApplyDropout,
    BlockFunction,
    DropoutMask,
    Rows,
    apply_masked,
    sample_dropout_mask,
)
from layerskip_jax.recipe.skipping import apply_skipping

Teacher = Callable[[Transformer, jax.Array, jax.Array], Any]
"""``(model, inputs_BT, segments_BT) -> arrays [B, T, ...]``: the argument ``teacher`` of `Recipe.exit_loss`.

It is called once for each microbatch, and the model receives no gradient from it."""

IsSpike = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""``is_spike(objective, gradient_norm, loss_ema)``: whether to skip the update; ``loss_ema`` is 0 before the first."""


@dataclasses.dataclass(frozen=True)
class LossSpike:
    """``objective > factor * loss_ema``; ``factor`` 0 turns the test off."""

    factor: float

    def __call__(self, objective: jax.Array, gradient_norm: jax.Array, loss_ema: jax.Array) -> jax.Array:
        return jnp.logical_and(self.factor > 0, (loss_ema > 0) & (objective > self.factor * loss_ema))


@dataclasses.dataclass(frozen=True)
class Skipping:
    """The skipping form of layer dropout; ``row_groups`` must divide the rows of a microbatch on a device."""

    row_groups: int

    def __call__(self, f: BlockFunction, block: Block, rows: Rows, keep_B: jax.Array, scale: jax.Array) -> jax.Array:
        return apply_skipping(f, block, rows, keep_B, scale, groups=self.row_groups)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Layer dropout and exit losses as functions of the step; static under jit, so they must be pure and hashable."""

    num_layers: int
    total_steps: int
    p_max: float
    layer_scale: layer_dropout.LayerScale
    time_scale: layer_dropout.TimeScale
    curriculum: early_exit.Curriculum
    exit_scale: early_exit.ExitScale
    is_spike: IsSpike
    exit_loss: early_exit.ExitLoss = early_exit.cross_entropy
    teacher: Teacher | None = None
    distillation: early_exit.ExitLoss | None = None
    """The loss of inner exits in place of ``exit_loss``, such as `SelfDistillation`; its teacher is the last exit."""
    distillation_share: Share = ConstantShare(1.0)  # noqa: RUF009 (frozen)
    agreement: early_exit.ExitLoss | None = None
    """The loss of the last exit in place of ``exit_loss``; its teacher is ``agreement_exit``."""
    agreement_exit: int = 0
    agreement_share: Share = ConstantShare(0.0)  # noqa: RUF009 (frozen)
    rescale: bool = False
    """Multiply a kept block's output by ``1 / (1 - p_{l,t})`` (not in the paper)."""
    apply_dropout: ApplyDropout = apply_masked
    """The masked form of eq. 1, or `Skipping`."""

    @classmethod
    def from_config(cls, config: Config) -> Self:
        early, dropout, layers = config.early_exit, config.layer_dropout, config.model.num_layers
        curricula: dict[str, early_exit.Curriculum] = {
            "rotational": early_exit.Rotational(early.dilation, early.always_last, early.exits),
            "gradual": early_exit.gradual,
            "all": early_exit.all_exits,
            "fixed": early_exit.FixedExits(early.exits),
            "none": early_exit.last_only,
        }
        distills = early.distillation != "none" and early.curriculum != "none"
        return cls(
            num_layers=layers,
            total_steps=config.train.steps,
            p_max=dropout.p_max,
            layer_scale=layer_dropout.LAYER_SCALES[dropout.layer_scale],
            time_scale=layer_dropout.TIME_SCALES[dropout.time_scale],
            curriculum=curricula[early.curriculum],
            exit_scale=_exit_scale(early),
            is_spike=LossSpike(config.train.skip_spikes),
            distillation=SelfDistillation(LOSSES[early.distillation]) if distills else None,
            distillation_share=ConstantShare(early.distillation_weight),
            agreement=SelfDistillation(argmax_cross_entropy) if early.agreement_weight else None,
            agreement_exit=config.trained_draft_exit,
            agreement_share=ConstantShare(early.agreement_weight),
            rescale=dropout.rescale,
            apply_dropout=Skipping(dropout.row_groups) if dropout.form == "skipping" else apply_masked,
        )

    @property
    def skips(self) -> bool:
        """Whether layer dropout leaves out the compute of dropped blocks."""
        return isinstance(self.apply_dropout, Skipping)

    def check(self) -> None:
        """Raise `UserError` for a bad shape, or a bad value in the first 100 steps or at 100 spread over the run."""
        L, T = self.num_layers, self.total_steps

        def parts(step: jax.Array) -> dict[str, jax.Array]:
            constant = {"layer_scale": self.layer_scale(L), "exit_scale": self.exit_scale(L)}
            scheduled = {"time_scale": self.time_scale(step, T), "curriculum": self.curriculum(step, T, L)}
            return {name: jnp.asarray(value) for name, value in (constant | scheduled).items()}

        for name, part in jax.eval_shape(parts, jax.ShapeDtypeStruct((), jnp.int32)).items():
            shape, wanted = ((), "one number") if name == "time_scale" else ((L,), f"{L} numbers, one per layer")
            require(part.shape == shape, f"the recipe's {name} must return {wanted}, not the shape {part.shape}")
        steps = np.unique([*range(min(T, 100)), *np.linspace(0, T - 1, 100)]).astype(int)
        rates_SL, weights_SL, *shares = map(np.asarray, _schedules(self, steps))
        for step, rates_L, weights_L in zip(steps, rates_SL, weights_SL, strict=True):
            allowed = np.all((rates_L >= 0) & (rates_L < 1))
            require(bool(allowed), f"the recipe's drop rates must be in [0, 1), not {rates_L.tolist()} at step {step}")
            allowed = np.all((weights_L >= 0) & np.isfinite(weights_L))
            require(
                bool(allowed),
                f"the recipe's exit weights must be finite and at least 0, not {weights_L.tolist()} at step {step}",
            )
            require(bool(np.any(weights_L > 0)), f"the recipe's curriculum leaves no exit with a loss at step {step}")
        for name, share_S in zip(("distillation_share", "agreement_share"), shares, strict=True):
            wrong = share_S[~((share_S >= 0) & (share_S <= 1))].tolist()
            require(not wrong, f"the recipe's {name} must be in [0, 1], not {wrong[:3]}")
        if self.agreement is not None:
            inner = 1 <= self.agreement_exit < L
            require(inner, f"the recipe's agreement_exit must be in 1..{L - 1}, not {self.agreement_exit}")
            require(shares[1].max() > 0, "the recipe's agreement_share must be positive at some step")

    def check_rows(self, rows: int) -> None:
        """Raise `UserError` if dropout cannot split ``rows``, the sequences of a microbatch on one device."""
        if self.p_max > 0 and isinstance(self.apply_dropout, Skipping):
            groups = self.apply_dropout.row_groups
            require(
                rows % groups == 0,
                f"layer_dropout.row_groups {groups} must divide the {rows} sequences of a microbatch on a device",
            )

    def drop_rates(self, step: ArrayLike) -> jax.Array:
        """``p_L = S(t) D(l) p_max`` (LayerSkip eq. 2)."""
        return self.time_scale(step, self.total_steps) * self.layer_scale(self.num_layers) * self.p_max

    def sample_dropout(
        self, key: jax.Array, drop_rate_L: jax.Array, batch_size: int, shards: int
    ) -> DropoutMask | None:
        """Draw which sequences skip which block; None without dropout.

        Every one of the batch's ``shards`` gets the same mask, as in `sample_dropout_mask`.
        """
        if self.p_max == 0:
            return None
        keep_LB = sample_dropout_mask(key, drop_rate_L, batch_size, shards)
        scale_L = 1 / (1 - drop_rate_L) if self.rescale else jnp.ones_like(drop_rate_L)
        return DropoutMask(keep_LB, scale_L)

    def exit_weights(self, step: ArrayLike) -> jax.Array:
        """``w_L`` (LayerSkip eq. 6) at optimizer step ``step``."""
        enabled_L = self.curriculum(step, self.total_steps, self.num_layers)
        return early_exit.exit_weights(enabled_L, self.exit_scale(self.num_layers))


def _exit_scale(early: EarlyExitConfig) -> early_exit.ExitScale:
    if not early.chosen_weights:
        return early_exit.PaperScale(early.e_scale)
    return early_exit.ChosenScale(early.exits, early.chosen_weights)


@partial(jax.jit, static_argnums=0)  # one program for all steps; op by op, the first calls take a second
def _schedules(recipe: Recipe, steps: jax.Array) -> tuple[jax.Array, ...]:
    def at(step: jax.Array) -> tuple[jax.Array, ...]:
        shares = (share(step, recipe.total_steps) for share in (recipe.distillation_share, recipe.agreement_share))
        return recipe.drop_rates(step), recipe.exit_weights(step), *map(jnp.asarray, shares)

    return jax.lax.map(at, steps)
