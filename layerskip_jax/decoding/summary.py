"""Summarize generations: their speed, their acceptance, and the speed that the cost model predicts."""

import dataclasses
import math
import statistics
from typing import Any

from layerskip_jax.config import DecodeConfig, ModelConfig
from layerskip_jax.decoding.cost import head_share, round_cost, weight_bytes
from layerskip_jax.decoding.request import Generation
from layerskip_jax.decoding.text import Answer, TextGenerator
from layerskip_jax.model import weight_count

REPEATS = 3
"""`compare` reports medians over this many timed runs."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """Rates, acceptance and predicted speed of several generations; NaN and None stand for what was not measured."""

    mode: str
    policy: str
    prompts: int
    new_tokens: int
    tokens_per_second: float
    rounds: int
    tokens_per_round: float
    num_layers: int
    exit_rounds: dict[int, int]  # rounds (mode early_exit: tokens) per exit; with lookups, L counts lookup rounds
    exit_acceptance: dict[int, float]  # accepted / drafted tokens of each exit that drafted
    lookups: bool  # whether rounds can look their drafts up
    choices: int  # candidates at each drafted position
    drafted_per_round: float
    acceptance: float
    accepted_histogram: list[int]
    predicted_speedup: float
    predicted_tokens_per_second: float  # from the memory bandwidth
    bandwidth: float  # [bytes/s]
    plain_tokens_per_second: float = math.nan
    speedup: float = math.nan
    identical: bool | None = None  # None if texts are sampled: they differ, but have the same distribution

    @classmethod
    def from_answers(
        cls, answers: list[Answer], model: ModelConfig, config: DecodeConfig, bandwidth: float = math.nan
    ) -> "Summary":
        """Add up ``answers``, and predict their speed from the memory's ``bandwidth`` [bytes/s], if given.

        Rates cover the rounds alone, without prefill and compilation, and count tokens after a stop string too.
        """
        one = Generation.total([answer.generation for answer in answers])
        exit_rounds = one.exit_rounds
        if config.mode == "early_exit" and not config.exit_threshold:  # all rows of a round use the same exit
            exit_rounds = dict.fromkeys(exit_rounds, one.row_rounds)
        cost = mean_round_cost(one, model, config)
        seconds = weight_count(model) * weight_bytes(model, config.weights) / bandwidth * cost
        return cls(
            mode=config.mode,
            policy=config.policy,
            prompts=sum(len(answer.completions) for answer in answers),
            new_tokens=sum(len(completion.tokens) for answer in answers for completion in answer.completions),
            tokens_per_second=one.tokens_per_second,
            rounds=one.rounds,
            tokens_per_round=one.tokens_per_round,
            num_layers=model.num_layers,
            exit_rounds=exit_rounds,
            exit_acceptance={exit: one.exit_accepted[exit] / n for exit, n in one.exit_drafts.items() if n},
            lookups=config.mode == "self_speculative" and config.lookup_length > 0,
            choices=config.choices,
            drafted_per_round=one.drafted_per_round,
            acceptance=one.acceptance,
            accepted_histogram=one.accepted_histogram,
            predicted_speedup=one.tokens_per_round / cost,
            predicted_tokens_per_second=one.new_tokens / one.rounds / seconds,
            bandwidth=bandwidth,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return all numbers that are known, for JSON."""
        values = dataclasses.asdict(self)
        unknown = {name for name, v in values.items() if v is None or (isinstance(v, float) and math.isnan(v))}
        return {name: value for name, value in values.items() if name not in unknown}


def mean_round_cost(generation: Generation, model: ModelConfig, config: DecodeConfig) -> float:
    """Return the mean cost of a round [passes of the full model], see `layerskip_jax.decoding.cost`."""
    if config.mode == "early_exit":
        return _mean_exit_cost(model, generation.exit_rounds)
    if config.mode == "prompt_lookup" or not generation.drafted:
        return round_cost(model, 0, 0)
    # Without overhead, the cost is linear in d and in d E. So the mean cost is the cost of the mean d at the mean exit
    # of the drafts. Leave out lookups, which are counted under layer L: they need no draft pass.
    free = {model.num_layers} if config.lookup_length else set()
    drafts = {exit: n for exit, n in generation.exit_drafts.items() if exit not in free}
    drafted, layers = sum(drafts.values()), sum(exit * n for exit, n in drafts.items())
    return round_cost(model, layers / max(drafted, 1), drafted / generation.row_rounds)


def _mean_exit_cost(model: ModelConfig, exit_tokens: dict[int, int]) -> float:
    """Return the mean of ``(1-h) E/L + h n`` over tokens; a token that exits at E ran the heads of n exits up to E."""
    h = head_share(model)
    costs = [(1 - h) * exit_layer / model.num_layers + h * (n + 1) for n, exit_layer in enumerate(exit_tokens)]
    return sum(cost * count for cost, count in zip(costs, exit_tokens.values(), strict=True)) / sum(
        exit_tokens.values()
    )


def compare(generator: TextGenerator, plain: TextGenerator, batches: list[list[str]]) -> dict[str, Any]:
    """Time both generators alternately over all prompts; return medians and whether all texts are identical.

    ``generator`` has generated these batches before, so it is compiled. Sampled texts are not compared: the two modes
    consume random numbers differently.
    """
    ours: list[float] = []
    theirs: list[float] = []
    identical = True
    for batch in batches:
        plain.generate(batch)  # compiles
    for _ in range(REPEATS):
        own, other = ([g.generate(batch) for batch in batches] for g in (generator, plain))
        for speeds, answers in ((ours, own), (theirs, other)):
            speeds.append(Generation.total([answer.generation for answer in answers]).tokens_per_second)
        identical &= all(a.completions == b.completions for a, b in zip(own, other, strict=True))
    return {
        "tokens_per_second": statistics.median(ours),
        "plain_tokens_per_second": statistics.median(theirs),
        "speedup": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
        "identical": None if generator.config.temperature > 0 else identical,
    }
