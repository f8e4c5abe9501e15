"""The optax optimizer that a config names."""

import re
from typing import Any

import jax
import optax
from flax import nnx

from layerskip_jax.config import Config


def learning_rate(config: Config) -> optax.Schedule:
    """Linear warmup to the peak, then cosine decay to ``final_fraction`` of it at the last step."""
    peak, warmup = config.optimizer.learning_rate, config.optimizer.warmup_steps
    return optax.warmup_cosine_decay_schedule(
        init_value=peak / max(warmup, 1),  # not 0, which would waste the first step
        peak_value=peak,
        warmup_steps=warmup,
        decay_steps=max(config.train.steps, warmup + 1),
        end_value=peak * config.optimizer.final_fraction,
    )


def decay_mask(params: Any) -> Any:
    """Mark with True the parameters that weight decay applies to: those with two or more axes, so no norm scale.

    The axes are those that a parameter's name ends with: ``gate_DF`` decays, ``norm_D`` does not. A further leading
    axis is a stack of layers. Raises `ValueError` if name and shape do not agree.
    """

    def decays(path: tuple[Any, ...], param: nnx.Variable) -> Any:
        name = str(path[-1]).lstrip(".")
        axes = re.search(r"_([A-Z]+)$", name)
        if axes is None or param.ndim - len(axes[1]) not in (0, 1):
            raise ValueError(f"name a parameter after its axes, as in gate_DF: {name} has shape {param.shape}")
        return jax.tree.map(lambda _: len(axes[1]) > 1, param)

    return jax.tree_util.tree_map_with_path(decays, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def schedule_count(opt_state: Any) -> jax.Array:
    """Return how many updates the learning-rate schedule has seen; `ValueError` unless there is one schedule."""
    schedule = optax.ScaleByScheduleState
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, schedule))
    counts = [node.count for node in nodes if isinstance(node, schedule)]
    if len(counts) != 1:
        raise ValueError(f"the optimizer's state must hold one learning-rate schedule, not {len(counts)}")
    return counts[0]


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Clip the global norm of the gradients, then apply the optimizer that ``config.optimizer.name`` names."""
    settings, schedule = config.optimizer, learning_rate(config)
    beta1, beta2, decay = settings.beta1, settings.beta2, settings.weight_decay
    transforms: dict[str, optax.GradientTransformation] = {
        "adamw": optax.adamw(schedule, beta1, beta2, weight_decay=decay, mask=decay_mask),
        "lion": optax.lion(schedule, beta1, beta2, weight_decay=decay, mask=decay_mask),
        "adafactor": optax.adafactor(schedule),
        "sgd": optax.sgd(schedule, momentum=beta1),
    }
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), transforms[settings.name])
