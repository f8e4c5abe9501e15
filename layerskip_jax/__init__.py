"""LayerSkip (arXiv 2404.16710) for JAX: pretraining with layer dropout and early exits, self-speculative decoding."""

__version__ = "0.1.0"
