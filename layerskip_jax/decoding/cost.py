"""The cost model of self-speculation: what speedup a round's acceptance buys."""

from layerskip_jax.config import ModelConfig
from layerskip_jax.model import parameter_count


def head_share(config: ModelConfig) -> float:
    """Return h: the head's part of the weights that one token's pass through the model reads."""
    head = config.vocab_size * config.dim
    return head / (parameter_count(config) - (0 if config.tied_embedding else head))


def predicted_speedup(config: ModelConfig, exit_layer: int, drafted_per_round: float, tokens_per_round: float) -> float:
    """``S = tokens / ((1-h)(1 + d E/L) + h(1+d))``, if a pass costs the bytes of the weights that it reads.

    The draft reads E of L blocks and the head d times; the verification reads every block and the head once.
    1 is the speed of plain decoding; below 1 speculation does not pay.

    >>> config = ModelConfig(num_layers=8, vocab_size=1)
    >>> round(predicted_speedup(config, exit_layer=2, drafted_per_round=4, tokens_per_round=4), 2)
    2.0
    """
    h, d = head_share(config), drafted_per_round
    cost = (1 - h) * (1 + d * exit_layer / config.num_layers) + h * (1 + d)
    return tokens_per_round / cost
