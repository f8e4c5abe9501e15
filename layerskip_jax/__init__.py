"""LayerSkip (arXiv 2404.16710) for JAX: pretraining with layer dropout and early exits, self-speculative decoding."""

from etils import epy

with epy.lazy_api_imports(globals()):  # a module is imported when its name is first used
    from layerskip_jax.checkpoint.reading import load_model
    from layerskip_jax.config import Config
    from layerskip_jax.decoding.adaptive import AdaptiveSpeculative
    from layerskip_jax.decoding.adaptive_policy import Adaptive
    from layerskip_jax.decoding.engine import generate
    from layerskip_jax.decoding.policies import Fixed
    from layerskip_jax.decoding.rounds import SelfSpeculative
    from layerskip_jax.decoding.sampling import Greedy, Stochastic
    from layerskip_jax.decoding.text import TextGenerator
    from layerskip_jax.recipe.recipe import Recipe
    from layerskip_jax.sharding import tensor_parallel
    from layerskip_jax.training.loop import train

__version__ = "0.1.0"

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
    "tensor_parallel",
    "train",
]
