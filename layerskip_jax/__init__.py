"""LayerSkip (arXiv 2404.16710) for JAX: pretraining with layer dropout and early exits, self-speculative decoding."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerskip_jax.checkpoint.reading import load_model
    from layerskip_jax.config import Config
    from layerskip_jax.decoding.adaptive import AdaptiveSpeculative
    from layerskip_jax.decoding.engine import generate
    from layerskip_jax.decoding.policies import Adaptive, Fixed
    from layerskip_jax.decoding.rounds import SelfSpeculative
    from layerskip_jax.decoding.sampling import Greedy, Stochastic
    from layerskip_jax.decoding.text import TextGenerator
    from layerskip_jax.recipe.recipe import Recipe
    from layerskip_jax.training.loop import train

__version__ = "0.1.0"

MODULES = {
    "Config": "config",
    "Recipe": "recipe.recipe",
    "train": "training.loop",
    "load_model": "checkpoint.reading",
    "generate": "decoding.engine",
    "TextGenerator": "decoding.text",
    "Greedy": "decoding.sampling",
    "Stochastic": "decoding.sampling",
    "Fixed": "decoding.policies",
    "Adaptive": "decoding.policies",
    "SelfSpeculative": "decoding.rounds",
    "AdaptiveSpeculative": "decoding.adaptive",
}
"""The public names, and the module of each. A module is imported when its name is first used."""

__all__ = [
    "Adaptive",
    "AdaptiveSpeculative",
    "Config",
    "Fixed",
    "Greedy",
    "Recipe",
    "SelfSpeculative",
    "Stochastic",
    "TextGenerator",
    "generate",
    "load_model",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *MODULES])
