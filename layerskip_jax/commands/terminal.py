"""Terminal output of generation: text with colored drafts, and a summary of the numbers."""

import math
import sys

from layerskip_jax.config import Config, DecodeConfig
from layerskip_jax.decoding.configure import resolve_exit_layer, resolve_exits
from layerskip_jax.decoding.summary import Summary
from layerskip_jax.decoding.text import Answer, Completion, Piece, TextGenerator
from layerskip_jax.errors import note

GREEN, YELLOW, DIM, END = "\033[32m", "\033[33m", "\033[2m", "\033[0m"


def _paint(text: str, color: str) -> str:
    return f"{color}{text}{END}" if sys.stdout.isatty() else text


def format_completion(completion: Completion, chat: bool = False) -> str:
    """Return the prompt and the text, with the prompt dimmed on a terminal; a chat has a line for each."""
    between = "\n" if chat else ""
    return f"{_paint(completion.prompt, DIM)}{between}{completion.text}\n{'-' * 40}"


def warn_untrained_exit(config: Config, settings: DecodeConfig) -> None:
    """Print a note for each exit that ``settings`` uses and that the run did not choose to train.

    Without trained exits in the config, print nothing: a Hugging Face folder does not say how it was trained.
    """
    trained, layers = config.early_exit.trained_exits, config.model.num_layers
    if not trained or settings.mode not in ("self_speculative", "early_exit"):
        return
    effect = "few of its drafts are accepted" if settings.mode == "self_speculative" else "its text is poor"
    several = settings.policy == "adaptive" or (settings.mode == "early_exit" and settings.exit_threshold > 0)
    used = resolve_exits(settings, layers) if several else (resolve_exit_layer(settings, layers),)
    for exit_layer in sorted({*used} - {*trained, layers}):
        listed = " ".join(map(str, trained))
        note(f"exit {exit_layer} had no loss in training, so {effect}; trained: {listed}")


def stream(generator: TextGenerator, prompt: str, config: DecodeConfig) -> Answer:
    """Print one completion as it is generated; self-speculation prints accepted drafts in green."""
    if config.mode == "self_speculative" and sys.stdout.isatty():
        lookups = " and lookups" * bool(config.lookup_length)
        print(_paint(f"accepted drafts{lookups}", GREEN), "/", _paint("tokens of the full model", YELLOW))
    print(_paint(prompt, DIM), end="\n" if config.chat else "", flush=True)

    def show(piece: Piece) -> None:
        speculates = config.mode == "self_speculative"
        color = GREEN if piece.drafted else YELLOW
        print(_paint(piece.text, color) if speculates else piece.text, end="", flush=True)

    answer = generator.generate([prompt], show)
    print()
    return answer


def summary_text(summary: Summary) -> str:
    """Return the numbers as a few lines, with a hint where speculation does not pay."""
    lines = [f"{summary.new_tokens} tokens from {summary.prompts} prompt(s), {summary.tokens_per_second:.0f} tokens/s"]
    if not math.isnan(summary.bandwidth):
        share = summary.tokens_per_second / summary.predicted_tokens_per_second
        lines.append(
            f"reading the weights from memory at {summary.bandwidth / 1e9:.1f} GB/s allows "
            f"{summary.predicted_tokens_per_second:.0f} tokens/s; the measured speed is {share:.0%} of that"
            + (": the weights are so small that they stay in the cache" if share > 1 else "")
        )
    rounds = dict(summary.exit_rounds)
    looked_up = rounds.pop(summary.num_layers, 0) if summary.lookups else 0
    at_exits = ", ".join(f"{exit} of {summary.num_layers} ({n})" for exit, n in rounds.items() if n)
    if summary.mode == "early_exit":
        lines.append(f"lossy, not the full model's text; tokens exited after layer {at_exits}")
    if summary.mode in ("self_speculative", "prompt_lookup"):
        plain = summary.rounds - sum(summary.exit_rounds.values())
        parts = ["self-speculative", f"exit {at_exits}" if at_exits else "", f"no draft ({plain})" if plain else ""]
        if looked_up:
            parts.append(f"prompt lookup ({looked_up}, {summary.exit_acceptance[summary.num_layers]:.1%} accepted)")
        mode = ", ".join(filter(None, parts)) if summary.mode == "self_speculative" else "prompt lookup"
        accepted = "nothing drafted" if math.isnan(summary.acceptance) else f"acceptance {summary.acceptance:.1%}"
        lines.append(
            f"{mode}: {summary.drafted_per_round:.2f} drafts a round, {accepted}, "
            f"{summary.tokens_per_round:.2f} tokens a round, {summary.rounds} rounds"
        )
        lines.append(_histogram(summary.accepted_histogram))
    if not math.isnan(summary.speedup):
        texts = {True: "identical texts", False: "the texts DIFFER", None: "sampled texts are not compared"}
        lines.append(
            f"plain decoding {summary.plain_tokens_per_second:.0f} tokens/s; speedup {summary.speedup:.2f}x "
            f"(the cost model says {summary.predicted_speedup:.2f}x); {texts[summary.identical]}"
        )
    measured = summary.speedup if not math.isnan(summary.speedup) else summary.predicted_speedup
    if measured < 1 and summary.mode == "self_speculative":
        how = "measured" if not math.isnan(summary.speedup) else "by the cost model"
        policy = "--choices 1" if summary.choices > 1 else "--policy adaptive"  # the adaptive policy needs choices 1
        others = f"{policy}, another --exit_layer or a smaller --draft_length"
        if summary.policy == "adaptive":
            others = "other --exits"
        lines.append(f"speculation does not pay here ({measured:.2f}x, {how}): try {others}, or --mode autoregressive")
    return "\n".join(lines)


def _histogram(counts: list[int], width: int = 40) -> str:
    total = max(sum(counts), 1)
    rows = [
        f"  {accepted:>3} accepted {count / total:6.1%} {'#' * round(width * count / total)}"
        for accepted, count in enumerate(counts)
    ]
    return "\n".join(["rounds by accepted drafts:", *rows])
