"""From a `DecodeConfig` to the round that it asks for."""

from layerskip_jax.config import DecodeConfig
from layerskip_jax.decoding.confident_exit import ConfidentExit
from layerskip_jax.decoding.cost import Overhead
from layerskip_jax.decoding.policies import Adaptive, ConfidenceStop, DraftPolicy, Fixed, default_candidates
from layerskip_jax.decoding.prompt_lookup import PromptLookup
from layerskip_jax.decoding.rounds import Autoregressive, Round, SelfSpeculative
from layerskip_jax.decoding.sampling import Greedy, Sampler, Stochastic
from layerskip_jax.errors import UserError
from layerskip_jax.model import Transformer


def make_sampler(config: DecodeConfig) -> Sampler:
    """Return the sampler that ``config`` asks for: `Greedy` at temperature 0."""
    if config.temperature == 0:
        return Greedy()
    return Stochastic(config.temperature, config.top_k, config.top_p)


def exit_layer_of(config: DecodeConfig, num_layers: int) -> int:
    """Return E in 1..L: as configured, or a quarter of the layers."""
    exit_layer = config.exit_layer or max(1, num_layers // 4)
    if exit_layer > num_layers:
        raise UserError(f"exit_layer {exit_layer} must be in 1..{num_layers}, the model's layers")
    return exit_layer


def exits_of(config: DecodeConfig, num_layers: int) -> tuple[int, ...]:
    """Return the candidate exits: as configured, or `default_candidates` and the exit layer."""
    exits = config.exits or tuple(sorted({*default_candidates(num_layers), exit_layer_of(config, num_layers)}))
    if exits[-1] > num_layers:
        raise UserError(f"exits {' '.join(map(str, exits))} must be in 1..{num_layers}, the model's layers")
    return exits


def confident_exits(config: DecodeConfig, num_layers: int) -> tuple[int, ...]:
    """Return where tokens may leave by confidence: the candidates, and L for the rest."""
    return tuple(sorted({*exits_of(config, num_layers), num_layers}))


def policy_of(config: DecodeConfig, num_layers: int) -> DraftPolicy:
    """Return the draft policy that ``config`` names."""
    exit_layer, length = exit_layer_of(config, num_layers), config.draft_length
    if config.policy == "confidence":
        return ConfidenceStop(exit_layer, length, config.draft_threshold)
    if config.policy == "adaptive":
        return Adaptive(
            exit_layer, length, exits_of(config, num_layers), overhead=Overhead(config.start_cost, config.width_cost)
        )
    return Fixed(exit_layer, length)


def configured(config: DecodeConfig, model: Transformer) -> tuple[Transformer, Round]:
    """Return the model to run and the round to run with it. ``model`` is an `unstacked` one."""
    sampler, num_layers = make_sampler(config), model.config.num_layers
    for check in (exit_layer_of, exits_of):  # also where the mode does not ask for them
        check(config, num_layers)
    if config.mode == "self_speculative":
        return model, SelfSpeculative(sampler, policy_of(config, num_layers))
    if config.mode == "prompt_lookup":
        return model, PromptLookup(sampler, config.draft_length)
    if config.mode == "early_exit" and config.exit_threshold > 0:
        return model, ConfidentExit(sampler, confident_exits(config, num_layers), config.exit_threshold)
    if config.mode == "early_exit":
        model = model.first_layers(exit_layer_of(config, num_layers))
    return model, Autoregressive(sampler)
