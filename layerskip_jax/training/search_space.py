"""The recipes that ``layerskip search`` tries, how it scores one, and which of them form the frontier."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from layerskip_jax.config import Config

Overrides = dict[str, Any]
"""Dotted settings, such as ``{"layer_dropout.p_max": 0.1}``."""


class Trial(Protocol):
    """The part of `optuna.Trial` that a search space uses."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


SearchSpace = Callable[[Trial, Config, Sequence[int]], Overrides]
"""``(trial, config, exits) -> settings``: one recipe for ``config`` that drafts from one of ``exits``."""


RECOMMENDED: dict[str, Any] = {
    "weight": 0.5,
    "second_exit": False,
    "distillation": "kl",
    "distillation_weight": 1.0,
    "agreement_weight": 0.1,
    "p_max": 0.1,
    "time_scale": "exponential",
    "learning_rate_factor": 1.0,
}
"""The point of `default_space` that a search tries first: `presets.trained_to_draft` of `presets.pretraining`."""


def default_space(trial: Trial, config: Config, exits: Sequence[int]) -> Overrides:
    """Vary exit, weight, distillation, agreement, a second exit at L/2, layer dropout and learning rate."""
    exit_layer, middle = trial.suggest_categorical("exit", list(exits)), config.model.num_layers // 2
    chosen = {exit_layer: trial.suggest_float("weight", 0.1, 2.0, log=True)}
    if middle > exit_layer and trial.suggest_categorical("second_exit", [False, True]):
        chosen[middle] = trial.suggest_float("second_weight", 0.05, 0.5, log=True)
    settings: Overrides = {
        "early_exit.curriculum": "fixed",
        "early_exit.exits": tuple(chosen),
        "early_exit.exit_weights": tuple(chosen.values()),
        "early_exit.distillation": trial.suggest_categorical("distillation", ["none", "kl", "acceptance"]),
        "early_exit.agreement_weight": trial.suggest_float("agreement_weight", 0.0, 0.15),
        "layer_dropout.p_max": trial.suggest_categorical("p_max", [0.0, 0.1, 0.2]),
        "optimizer.learning_rate": config.optimizer.learning_rate
        * trial.suggest_float("learning_rate_factor", 0.5, 2.0, log=True),
    }
    if settings["early_exit.distillation"] != "none":
        settings["early_exit.distillation_weight"] = trial.suggest_float("distillation_weight", 0.25, 1.0)
    if settings["layer_dropout.p_max"] > 0:
        scales = ["exponential", "constant", "decaying"]
        settings["layer_dropout.time_scale"] = trial.suggest_categorical("time_scale", scales)
    return settings


class RecipeQuality(NamedTuple):
    """The measured quality of one trained recipe."""

    loss_increase: float
    """Loss of the last exit relative to that of the plain model after the same steps, minus 1."""
    agreement: float
    """Fraction of held-out tokens for which the drafting exit predicts what the last exit predicts."""
    speedup: float
    """Predicted for the user's config (`cost.best_speedup`), with the agreement as the acceptance."""

    def score(self, tolerance: float) -> float:
        """``speedup - 100 max(0, loss_increase - tolerance)``: 1 % of loss beyond the tolerance costs 1.0x.

        This is a penalty and not a limit, so that the pruner can rank recipes whose early losses exceed the tolerance.
        A loss that is not finite scores -inf.
        """
        if not math.isfinite(self.loss_increase):
            return -math.inf
        return self.speedup - 100 * max(0.0, self.loss_increase - tolerance)


def frontier(qualities: Sequence[RecipeQuality]) -> list[bool]:
    """Return for each recipe whether it is on the frontier.

    It is on it unless another recipe has a loss as low and an agreement as high, and is better in one of them.

    >>> frontier([RecipeQuality(0.0, 0.6, 1.0), RecipeQuality(0.01, 0.7, 1.0), RecipeQuality(0.01, 0.5, 1.0)])
    [True, True, False]
    """
    return [
        not any(
            other.loss_increase <= one.loss_increase and other.agreement >= one.agreement and other[:2] != one[:2]
            for other in qualities
        )
        for one in qualities
    ]
