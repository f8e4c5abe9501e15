"""Build the optax optimizer that a config names."""

import re
from typing import Any

import jax
import optax
import optax.contrib
from flax import nnx

from layerskip_jax.config import Config


def learning_rate(config: Config) -> optax.Schedule:
    """Warm up linearly to the peak, then follow ``optimizer.schedule`` down to ``final_fraction`` of it."""
    settings, peak, warmup = config.optimizer, config.optimizer.learning_rate, config.optimizer.warmup_steps
    steps, end, start = max(config.train.steps - warmup, 1), peak * settings.final_fraction, peak / max(warmup, 1)
    decay = max(round(settings.decay_fraction * config.train.steps), 1)
    parts = [optax.linear_schedule(start, peak, warmup)]  # not from 0, which would waste the first step
    if settings.schedule == "cosine":
        parts.append(optax.cosine_decay_schedule(peak, steps, alpha=settings.final_fraction))
    elif settings.schedule == "linear":
        parts.append(optax.linear_schedule(peak, end, steps))
    else:
        parts.append(optax.constant_schedule(peak))
    boundaries = [warmup]
    if settings.schedule == "wsd":
        parts.append(optax.linear_schedule(peak, end, decay))
        boundaries.append(max(config.train.steps - decay, warmup))
    return optax.join_schedules(parts, boundaries)


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


def matrix_axes(params: Any) -> Any:
    """Return which axes of a parameter muon treats as the rows and columns of a matrix; None: adamw updates it.

    The matrices of the blocks map D to other axes (``query_DNH``, ``gate_DF``) or back (``output_NHD``, ``down_FD``).
    Each layer of the stack is a matrix of its own.
    """

    def axes(path: tuple[Any, ...], param: nnx.Variable) -> Any:
        letters = str(path[-1]).rpartition("_")[2]
        if not any(str(part) == ".blocks" for part in path) or len(letters) < 2:
            return jax.tree.map(lambda _: None, param)
        inputs = 1 if letters[0] == "D" else len(letters) - 1
        places = tuple(range(param.ndim - len(letters), param.ndim))
        numbers = optax.contrib.MuonDimensionNumbers(places[:inputs], places[inputs:])
        return jax.tree.map(lambda _: numbers, param)

    return jax.tree_util.tree_map_with_path(axes, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def muon(schedule: optax.Schedule, beta1: float, beta2: float, decay: float) -> optax.GradientTransformation:
    """Muon for the matrices of the blocks, adamw for the rest.

    Muon's updates are scaled to an RMS of 0.2, about that of adamw's, so that both share one learning rate
    (arXiv 2502.16982).
    """
    directions = optax.contrib.muon(
        learning_rate=1.0,
        beta=beta1,
        adam_b1=beta1,
        adam_b2=beta2,
        muon_weight_dimension_numbers=matrix_axes,
        consistent_rms=0.2,
    )
    # Apply weight decay and the schedule once, after both optimizers. Each would otherwise hold a schedule of its own,
    # and `schedule_count` needs exactly one. Muon's updates are negated already, so negate the decay too.
    return optax.chain(directions, optax.add_decayed_weights(-decay, decay_mask), optax.scale_by_schedule(schedule))


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
        "muon": muon(schedule, beta1, beta2, decay),
        "adafactor": optax.adafactor(schedule),
        "sgd": optax.sgd(schedule, momentum=beta1),
    }
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), transforms[settings.name])
