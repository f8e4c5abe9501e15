"""The optax optimizer that a config names."""

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


def decayed(params: Any) -> Any:
    """Mark with True the parameters that weight decay applies to: all but the scales of norms."""

    def of(param: nnx.Variable) -> Any:
        return jax.tree.map(lambda _: len(param.get_metadata()["axes"]) > 1, param)

    return jax.tree.map(of, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Clip the global norm of the gradients, then apply the optimizer that ``config.optimizer.name`` names."""
    settings, schedule = config.optimizer, learning_rate(config)
    transforms: dict[str, optax.GradientTransformation] = {
        "adamw": optax.adamw(
            schedule, settings.beta1, settings.beta2, weight_decay=settings.weight_decay, mask=decayed
        ),
        "lion": optax.lion(schedule, settings.beta1, settings.beta2, weight_decay=settings.weight_decay, mask=decayed),
        "adafactor": optax.adafactor(schedule),
        "sgd": optax.sgd(schedule, momentum=settings.beta1),
    }
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), transforms[settings.name])
