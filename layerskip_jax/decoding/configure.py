"""Build the decoding strategy that a `DecodeConfig` asks for."""

from layerskip_jax.checks import require_exits
from layerskip_jax.config import DecodeConfig
from layerskip_jax.decoding.adaptive import AdaptiveSpeculative
from layerskip_jax.decoding.adaptive_policy import Adaptive, default_candidates
from layerskip_jax.decoding.branching import Branching, GreedyBranches, StochasticBranches
from layerskip_jax.decoding.confident_exit import ConfidentExit
from layerskip_jax.decoding.hybrid import Hybrid
from layerskip_jax.decoding.policies import ConfidenceStop, DraftPolicy, Fixed
from layerskip_jax.decoding.prompt_lookup import PromptLookup
from layerskip_jax.decoding.rounds import Autoregressive, SelfSpeculative, Strategy
from layerskip_jax.decoding.sampling import Greedy, Stochastic
from layerskip_jax.model import Transformer


def make_sampler(config: DecodeConfig) -> Greedy | Stochastic:
    """Return the sampler that ``config`` asks for: `Greedy` at temperature 0."""
    if config.temperature == 0:
        return Greedy()
    return Stochastic(config.temperature, config.top_k, config.top_p)


def default_exit(num_layers: int) -> int:
    """Return a quarter of the layers, the exit to draft from if none is configured."""
    return max(1, num_layers // 4)


def resolve_exit_layer(config: DecodeConfig, num_layers: int) -> int:
    """Return E in 1..L: the configured one, or `default_exit`."""
    exit_layer = config.exit_layer or default_exit(num_layers)
    require_exits("exit_layer", [exit_layer], num_layers)
    return exit_layer


def resolve_exits(config: DecodeConfig, num_layers: int) -> tuple[int, ...]:
    """Return the candidate exits: the configured ones, or `default_candidates` and the exit layer."""
    exits = config.exits or tuple(sorted({*default_candidates(num_layers), resolve_exit_layer(config, num_layers)}))
    require_exits("exits", exits, num_layers)
    return exits


def check_exits(config: DecodeConfig, num_layers: int) -> None:
    """Raise `UserError` if ``exit_layer`` or ``exits`` is not in 1..L, even if the mode does not use it."""
    resolve_exit_layer(config, num_layers)
    resolve_exits(config, num_layers)


def make_policy(config: DecodeConfig, num_layers: int) -> DraftPolicy:
    """Return the draft policy that ``config`` names."""
    exit_layer, length = resolve_exit_layer(config, num_layers), config.draft_length
    if config.policy == "confidence":
        return ConfidenceStop(exit_layer, length, config.draft_threshold)
    if config.policy == "adaptive":
        return Adaptive(resolve_exits(config, num_layers), length, overhead=config.round_costs)
    return Fixed(exit_layer, length)


def configure(config: DecodeConfig, model: Transformer) -> tuple[Transformer, Strategy]:
    """Return the model to decode with and the strategy that ``config`` asks for. ``model`` is an `unstacked` one."""
    sampler, num_layers = make_sampler(config), model.config.num_layers
    check_exits(config, num_layers)
    if config.mode == "self_speculative" and config.choices > 1:
        exit_layer = resolve_exit_layer(config, num_layers)
        if isinstance(sampler, Greedy):
            return model, Branching(GreedyBranches(), exit_layer, config.draft_length, config.choices)
        # With top_k, only that many tokens can be accepted.
        choices = min(config.choices, config.top_k or config.choices)
        return model, Branching(StochasticBranches(sampler), exit_layer, config.draft_length, choices)
    if config.mode == "self_speculative":
        # With a fixed draft length, one verification width is enough.
        kind = SelfSpeculative if config.policy == "fixed" else AdaptiveSpeculative
        strategy = kind(sampler, make_policy(config, num_layers))
        if config.lookup_length:
            lookup = PromptLookup(sampler, config.lookup_length)
            return model, Hybrid(lookup, strategy, num_layers, config.round_costs)
        return model, strategy
    if config.mode == "prompt_lookup":
        return model, PromptLookup(sampler, config.draft_length)
    if config.mode == "early_exit" and config.exit_threshold > 0:
        exits = tuple(sorted({*resolve_exits(config, num_layers), num_layers}))  # the remaining tokens exit at L
        return model, ConfidentExit(sampler, exits, config.exit_threshold)
    if config.mode == "early_exit":
        model = model.first_layers(resolve_exit_layer(config, num_layers))
    return model, Autoregressive(sampler)
