"""Terminal output of generation: text with colored drafts, and a summary of the numbers."""

import dataclasses
import math
import sys
from typing import Any

from layerskip_jax.config import Config, DecodeConfig, ModelConfig
from layerskip_jax.decoding.configure import resolve_exit_layer, resolve_exits
from layerskip_jax.decoding.cost import head_share, round_cost, weight_bytes
from layerskip_jax.decoding.request import Generation
from layerskip_jax.decoding.text import Answer, Completion, Piece, TextGenerator
from layerskip_jax.model import weight_count

GREEN, YELLOW, DIM, END = "\033[32m", "\033[33m", "\033[2m", "\033[0m"


def _paint(text: str, colour: str) -> str:
    return f"{colour}{text}{END}" if sys.stdout.isatty() else text


def shown(completion: Completion, chat: bool = False) -> str:
    """Return the prompt and the text, with the prompt dimmed on a terminal; a chat has a line for each."""
    between = "\n" if chat else ""
    return f"{_paint(completion.prompt, DIM)}{between}{completion.text}\n{'-' * 40}"


def warn_untrained_exit(config: Config, settings: DecodeConfig) -> None:
    """Print a line to stderr for each exit of ``settings`` that is not among the exits which the run chose to train.

    Without trained exits in the config, print nothing: a Hugging Face folder does not say how it was trained.
    """
    trained, layers = config.early_exit.trained_exits, config.model.num_layers
    if not trained or settings.mode not in ("self_speculative", "early_exit"):
        return
    several = settings.policy == "adaptive" or (settings.mode == "early_exit" and settings.exit_threshold > 0)
    used = resolve_exits(settings, layers) if several else (resolve_exit_layer(settings, layers),)
    for exit_layer in sorted({*used} - {*trained, layers}):
        listed = " ".join(map(str, trained))
        print(
            f"note: exit {exit_layer} had no loss in training, so it drafts badly; trained: {listed}", file=sys.stderr
        )


def stream(generator: TextGenerator, prompt: str, config: DecodeConfig) -> Answer:
    """Print one completion as it is generated; self-speculation prints accepted drafts in green."""
    if config.mode == "self_speculative" and sys.stdout.isatty():
        print(_paint("accepted drafts of the early layers", GREEN), "/", _paint("tokens of the full model", YELLOW))
    print(_paint(prompt, DIM), end="\n" if config.chat else "", flush=True)

    def show(piece: Piece) -> None:
        speculates = config.mode == "self_speculative"
        colour = GREEN if piece.drafted else YELLOW
        print(_paint(piece.text, colour) if speculates else piece.text, end="", flush=True)

    answer = generator.generate([prompt], show)
    print()
    return answer


@dataclasses.dataclass(frozen=True)
class Report:
    """The numbers of all generations of a command; NaN and None stand for what was not measured."""

    mode: str
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
    ) -> "Report":
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
            drafted_per_round=one.drafted / one.row_rounds,
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

    def text(self) -> str:
        """Return the numbers as a few lines, with a hint where speculation does not pay."""
        lines = [f"{self.new_tokens} tokens from {self.prompts} prompt(s), {self.tokens_per_second:.0f} tokens/s"]
        if not math.isnan(self.bandwidth):
            share = self.tokens_per_second / self.predicted_tokens_per_second
            lines.append(
                f"reading the weights from memory at {self.bandwidth / 1e9:.1f} GB/s allows "
                f"{self.predicted_tokens_per_second:.0f} tokens/s; this is {share:.0%} of it"
                + (": the weights are so small that they stay in the cache" if share > 1 else "")
            )
        rounds = dict(self.exit_rounds)
        looked_up = rounds.pop(self.num_layers, 0) if self.lookups else 0
        at_exits = ", ".join(f"{exit} of {self.num_layers} ({n})" for exit, n in rounds.items() if n)
        if self.mode == "early_exit":
            lines.append(f"lossy, not the full model's text; tokens exited after layer {at_exits}")
        if self.mode in ("self_speculative", "prompt_lookup"):
            plain = self.rounds - sum(self.exit_rounds.values())
            parts = ["self-speculative", f"exit {at_exits}" if at_exits else "", f"no draft ({plain})" if plain else ""]
            if looked_up:
                parts.append(f"prompt lookup ({looked_up}, {self.exit_acceptance[self.num_layers]:.1%} accepted)")
            mode = ", ".join(filter(None, parts)) if self.mode == "self_speculative" else "prompt lookup"
            accepted = "nothing drafted" if math.isnan(self.acceptance) else f"acceptance {self.acceptance:.1%}"
            lines.append(
                f"{mode}: {self.drafted_per_round:.2f} drafts a round, {accepted}, "
                f"{self.tokens_per_round:.2f} tokens a round, {self.rounds} rounds"
            )
            lines.append(_histogram(self.accepted_histogram))
        if not math.isnan(self.speedup):
            texts = {True: "identical texts", False: "the texts DIFFER", None: "sampled texts are not compared"}
            lines.append(
                f"plain decoding {self.plain_tokens_per_second:.0f} tokens/s; speedup {self.speedup:.2f}x "
                f"(the cost model says {self.predicted_speedup:.2f}x); {texts[self.identical]}"
            )
        measured = self.speedup if not math.isnan(self.speedup) else self.predicted_speedup
        if measured < 1 and self.mode == "self_speculative":
            how = "measured" if not math.isnan(self.speedup) else "by the cost model"
            policy = "--choices 1" if self.choices > 1 else "--policy adaptive"  # the adaptive policy needs choices 1
            lines.append(
                f"speculation does not pay here ({measured:.2f}x, {how}): try {policy}, another "
                "--exit_layer or a smaller --draft_length, or --mode autoregressive"
            )
        return "\n".join(lines)


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


def _histogram(counts: list[int], width: int = 40) -> str:
    total = max(sum(counts), 1)
    rows = [
        f"  {accepted:>3} accepted {count / total:6.1%} {'#' * round(width * count / total)}"
        for accepted, count in enumerate(counts)
    ]
    return "\n".join(["rounds by accepted drafts:", *rows])
