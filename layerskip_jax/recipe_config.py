"""The settings of LayerSkip's recipe: `LayerDropoutConfig` and `EarlyExitConfig`."""

import dataclasses
from typing import Literal

from layerskip_jax.checks import ANY, check_fields, require, require_rising, setting


@dataclasses.dataclass(frozen=True)
class LayerDropoutConfig:
    """LayerSkip eq. 1-4: block l is skipped, for a whole sequence, with probability S(t) D(l) p_max."""

    p_max: float = setting(
        0.0, "drop probability of the last block where S(t) = 1, in [0, 1); 0 turns dropout off", "[0, 1)"
    )
    layer_scale: Literal["exponential", "linear"] = setting(
        "exponential", "D(l): exponential 2^(l/(L-1)) - 1 (eq. 3), or linear l/(L-1)"
    )
    time_scale: Literal["exponential", "constant", "decaying"] = setting(
        "exponential", "S(t): exponential 2^(t/(T-1)) - 1 (eq. 4, scratch), constant 1, or decaying 1 - t/(T-1)"
    )
    rescale: bool = setting(False, "multiply the output of a kept block by 1/(1-p) in training (not in the paper)")
    form: Literal["masked", "skipping"] = setting(
        "masked",
        "masked computes every block and multiplies by 0 or 1; skipping leaves out the compute of dropped blocks",
    )
    row_groups: int = setting(4, "skipping: groups of sequences that a device computes or skips; divides its sequences")

    def __post_init__(self) -> None:
        check_fields(self, "layer_dropout")


@dataclasses.dataclass(frozen=True)
class EarlyExitConfig:
    """LayerSkip eq. 5-6: a weighted loss at the exits that the curriculum turns on."""

    curriculum: Literal["rotational", "gradual", "all", "fixed", "none"] = setting(
        "none",
        "which exits have a loss at a step. fixed: exits and the last layer, at every step; rotational: every R-th, "
        "shifted by one each step; gradual: from the last down; all; none: only the last layer (an ordinary model)",
    )
    dilation: int = setting(8, "R of the rotational curriculum: every R-th layer, shifted by one each step")
    e_scale: float = setting(
        1.0, "e_scale of eq. 6, if the exits have no exit_weights; 0 leaves only the loss of the last layer", "[0, inf)"
    )
    always_last: bool = setting(True, "rotational: the last layer has a loss at every step")
    exits: tuple[int, ...] = setting((), "fixed: the exits; rotational: those that take turns (empty: all)", ANY)
    exit_weights: tuple[float, ...] = setting(
        (),
        "weight of each of exits relative to the last layer's 1, or one number for all; empty: 0.5 for fixed, e(l) of "
        "eq. 6 for rotational",
        "[0, inf)",
    )
    distillation: Literal["none", "kl", "argmax", "acceptance"] = setting(
        "none",
        "what early exits learn from the last exit, detached, in the same forward pass. none: nothing; kl: its "
        "distribution; argmax: its most likely token; acceptance: to maximize the accepted share of drafts. Without "
        "effect if curriculum is none",
    )
    distillation_weight: float = setting(
        1.0, "share of distillation in the loss of an early exit; the rest is cross-entropy with the data", "[0, 1]"
    )
    agreement_weight: float = setting(
        0.0,
        "share of the last exit's loss that is cross-entropy with the most likely token of the drafting exit (of "
        "the exits with a loss, the one nearest to L/4); raises acceptance, at a small cost in loss",
        "[0, 1)",
    )

    def __post_init__(self) -> None:
        check_fields(self, "early_exit")
        exits, weights = self.exits, self.exit_weights
        shown = " ".join(map(str, exits))
        require_rising("early_exit.exits", exits)
        chooses = self.curriculum in ("fixed", "rotational")
        require(not exits or chooses, f"early_exit.exits {shown} needs early_exit.curriculum fixed or rotational")
        require(
            bool(exits) or self.curriculum != "fixed", "early_exit.curriculum fixed needs early_exit.exits, such as 3"
        )
        agrees = self.agreement_weight > 0
        require(bool(exits) or not agrees, "early_exit.agreement_weight needs early_exit.exits, such as 3")
        skips_last = self.curriculum == "rotational" and not self.always_last
        require(
            not (skips_last and exits), "early_exit.exits needs early_exit.always_last true, to train the last layer"
        )
        listed = " ".join(f"{weight:g}" for weight in weights)
        require(
            not weights or (bool(exits) and len(weights) in (1, len(exits))),
            f"early_exit.exit_weights must be one number, or one for each of early_exit.exits ({shown or 'none'}), "
            f"got {listed}",
        )
        require(not weights or max(weights) > 0, f"early_exit.exit_weights must not all be 0, got {listed}")

    def check_trained(self) -> None:
        """Raise `UserError` if none of ``exits`` has a loss. A new run checks this; stored configs may be like that."""
        shown = " ".join(map(str, self.exits))
        require(
            not self.exits or bool(self.trained_exits),
            f"early_exit.exits {shown} have no loss, because e(l) of eq. 6 is 0 at exit 1, and at all inner exits if "
            "early_exit.e_scale is 0: set early_exit.exit_weights",
        )

    @property
    def trained_exits(self) -> tuple[int, ...]:
        """The ``exits`` whose weight is not 0. Without chosen weights, eq. 6 gives weight 0 to exit 1, and to all inner
        exits if ``e_scale`` is 0."""
        if self.chosen_weights:
            return tuple(e for e, weight in zip(self.exits, self.chosen_weights, strict=True) if weight > 0)
        return tuple(e for e in self.exits if e > 1 and self.e_scale > 0)

    @property
    def chosen_weights(self) -> tuple[float, ...]:
        """The weight of each of ``exits``, relative to the last layer's 1; empty if eq. 6 gives the weights."""
        weights = self.exit_weights or ((0.5,) if self.curriculum == "fixed" else ())
        return weights if len(weights) > 1 else weights * len(self.exits)
