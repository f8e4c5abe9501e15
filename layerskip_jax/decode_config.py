"""The settings of decoding."""

import dataclasses
from typing import Literal

from layerskip_jax.checks import ANY, check_fields, require, require_rising, setting


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Settings of text generation."""

    mode: Literal["self_speculative", "autoregressive", "prompt_lookup", "early_exit"] = setting(
        "self_speculative",
        "self_speculative: lossless, early layers draft and the rest verify; autoregressive: all layers, one token "
        "at a time; prompt_lookup: lossless, drafts come from earlier text; early_exit: lossy, every token exits at "
        "exit_layer, or at the first of exits where it passes exit_threshold",
    )
    policy: Literal["fixed", "confidence", "adaptive"] = setting(
        "fixed",
        "self_speculative: fixed exit_layer and draft_length; confidence: also stop drafting after a token below "
        "draft_threshold; adaptive: choose the exit (of exits) before every round, and draft while it pays (up to "
        "draft_length)",
    )
    exit_layer: int = setting(
        0,
        "E: number of blocks that draft (mode early_exit: that run), 1..L; 0: the trained exit nearest to L/4, or L/4",
        "[0, inf)",
    )
    draft_length: int = setting(4, "d: at most this many tokens are drafted in a round", "[1, 63]")
    choices: int = setting(
        1,
        "self_speculative, policy fixed: candidate tokens of the exit to verify at each drafted position; a TPU or GPU "
        "verifies several in almost the time of one",
        "[1, 16]",
    )
    exits: tuple[int, ...] = setting(
        (), "candidate exits; empty: the trained exits of the run, or L/8, L/4, L/2 and exit_layer", ANY
    )
    lookup_length: int = setting(
        0,
        "self_speculative: where the text repeats, a round may draft this many tokens by prompt lookup instead of from "
        "the exit; 0: off",
        "[0, 63]",
    )
    draft_threshold: float = setting(0.5, "policy confidence: probability below which drafting stops", "[0, 1]")
    exit_threshold: float = setting(
        0.0, "mode early_exit: probability at which a token exits; 0: always at exit_layer", "[0, 1]"
    )
    round_costs: tuple[float, ...] = setting(
        (),
        "policy adaptive, lookups: what a round with 1, 2, ... drafts costs beyond reading weights [passes of the full "
        "model]; a longer one: in proportion to the last entry; sweep measures it",
        "[0, inf)",
    )
    weights: Literal["full", "int8"] = setting(
        "full", "int8: round the weights to 8 bits, which changes the text; samples in training use the full weights"
    )
    max_new_tokens: int = setting(128, "at most this many new tokens for each prompt")
    temperature: float = setting(0.0, "sampling temperature; 0 is greedy", "[0, 1e6]")
    top_k: int = setting(0, "sample only among the k most likely tokens; 0: all", "[0, inf)")
    top_p: float = setting(
        1.0, "sample only among the most likely tokens with this total probability; 1: all", "(0, 1]"
    )
    seed: int = setting(
        0, "seed of sampling; every batch of prompts gets its own random numbers", "[-2147483648, 4294967295]"
    )
    ignore_eos: bool = setting(False, "do not stop at the tokens that end a text (for benchmarks)")
    stop: tuple[str, ...] = setting((), "the text ends before the first of these strings; special tokens are allowed")
    chat: bool = setting(False, "take each prompt as a user's message, and render the model's chat template")
    stream_every: int = setting(1, "streaming: rounds between updates of the text")

    def __post_init__(self) -> None:
        check_fields(self)
        sampled = self.temperature >= 1e-6
        require(sampled or self.temperature == 0, f"temperature must be 0 or in [1e-6, 1e6], not {self.temperature}")
        if self.choices > 1 and self.mode != "autoregressive":  # a plain baseline may keep ``choices``, and ignores it
            branches = self.mode == "self_speculative" and self.policy == "fixed" and not self.lookup_length
            needs = "mode self_speculative, policy fixed and lookup_length 0"
            require(branches, f"choices {self.choices} needs {needs}; or give choices 1")
        require("" not in self.stop, "stop strings must not be empty")
        require_rising("exits", self.exits)
