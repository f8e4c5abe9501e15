"""The settings of decoding."""

import dataclasses
import math
from typing import Literal

from layerskip_jax.checks import check_fields, require, require_rising, setting


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """How text is generated."""

    mode: Literal["self_speculative", "autoregressive", "prompt_lookup", "early_exit"] = setting(
        "self_speculative",
        "self_speculative: lossless, early layers draft and the rest verify; autoregressive: all layers, one token "
        "at a time; prompt_lookup: lossless, drafts come from earlier text; early_exit: lossy, every token exits at "
        "exit_layer, or at the first of exits where it passes exit_threshold",
    )
    policy: Literal["fixed", "confidence", "adaptive"] = setting(
        "fixed",
        "self_speculative: fixed exit_layer and draft_length; confidence: also stop drafting after a token below "
        "draft_threshold; adaptive: choose the exit (of exits) and the draft length (up to draft_length) every round",
    )
    exit_layer: int = setting(
        0, "E: blocks that draft (early_exit: all that run), 1..L; 0: the trained exit nearest to L/4, or L/4"
    )
    draft_length: int = setting(4, "d: at most this many tokens are drafted in a round")
    exits: tuple[int, ...] = setting(
        (), "candidate exits; empty: early_exit.exits of the run, or L/8, L/4, L/2 and exit_layer"
    )
    draft_threshold: float = setting(0.5, "policy confidence: probability below which drafting stops")
    exit_threshold: float = setting(0.0, "mode early_exit: probability at which a token exits; 0: always at exit_layer")
    start_cost: float = setting(0.0, "policy adaptive: time that drafting adds to a round [plain passes]")
    width_cost: float = setting(0.0, "policy adaptive: time that each draft adds; sweep measures both [plain passes]")
    weights: Literal["full", "int8"] = setting("full", "int8: round the weights to 8 bits, which changes the text")
    max_new_tokens: int = setting(128, "at most this many new tokens for each prompt")
    temperature: float = setting(0.0, "sampling temperature; 0 is greedy")
    top_k: int = setting(0, "sample only among the k most likely tokens; 0 is all")
    top_p: float = setting(1.0, "sample only among the most likely tokens with this total probability; 1 is all")
    seed: int = setting(0, "seed of sampling; every batch of prompts gets its own random numbers")
    ignore_eos: bool = setting(False, "do not stop at the tokens that end a text (for benchmarks)")
    stop: tuple[str, ...] = setting((), "strings that end the text, which leaves them out; special tokens too")
    chat: bool = setting(False, "take each prompt as a user's message, and render the model's chat template")
    stream_every: int = setting(1, "streaming: rounds between updates of the text [rounds]")

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.exit_layer >= 0, f"exit_layer must be 0 (automatic) or in 1..L, not {self.exit_layer}")
        require(1 <= self.draft_length < 64, f"draft_length must be in 1..63, not {self.draft_length}")
        fits = 1 <= self.max_new_tokens < 2**31
        require(fits, f"max_new_tokens must be at least 1 and below 2**31, not {self.max_new_tokens}")
        sampled = 1e-6 <= self.temperature <= 1e6
        require(sampled or self.temperature == 0, f"temperature must be 0 or in [1e-6, 1e6], not {self.temperature}")
        require(-(2**31) <= self.seed < 2**32, f"seed must be in {-(2**31)}..{2**32 - 1}, not {self.seed}")
        require(0 <= self.top_k < 2**31, f"top_k must be 0 (off) or in 1..{2**31 - 1}, not {self.top_k}")
        require(0 < self.top_p <= 1, f"top_p must be in (0, 1], not {self.top_p}")
        require("" not in self.stop, "a stop string must not be empty")
        require_rising("exits", self.exits)
        for name in ("draft_threshold", "exit_threshold"):
            require(0 <= getattr(self, name) <= 1, f"{name} must be in [0, 1], not {getattr(self, name)}")
        for name in ("start_cost", "width_cost"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"{name} must be finite and not negative, got {value}")
        fits = 1 <= self.stream_every < 2**31
        require(fits, f"stream_every must be at least 1 and below 2**31, not {self.stream_every}")
