"""What a generation is asked and what it answers: the checks of a request, and its result."""

import dataclasses
from collections.abc import Sequence

from layerskip_jax.config import ModelConfig
from layerskip_jax.decoding.rounds import Round
from layerskip_jax.errors import UserError

BUCKET = 64
"""Prompts and capacities are rounded up to a multiple of this, so that similar requests share one compilation."""


def check_request(config: ModelConfig, prompts: Sequence[Sequence[int]], max_length: int, step: Round) -> None:
    """Raise `UserError` for an empty prompt, an unknown token, what is too long, or an exit that is not there."""
    if not prompts:
        raise UserError("there is no prompt: give at least one")
    if step.draft_length >= BUCKET:  # a round writes within two pieces of the cache
        raise UserError(f"draft length {step.draft_length} must be below {BUCKET}")
    last = max(step.exits, default=1)
    if last > config.num_layers:
        raise UserError(f"exit layer {last} must be in 1..{config.num_layers}, the model's layers")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {row} has no token: give at least one (the tokenizer's BOS will do)")
        if len(prompt) + 1 > max_length:
            raise UserError(
                f"prompt {row} has {len(prompt)} tokens and the cache holds {max_length}, with room for one new token "
                f"wanted: shorten the prompt or raise max_length to at least {len(prompt) + 1}"
            )
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise UserError(f"prompt {row} has a token outside the model's vocabulary 0..{config.vocab_size - 1}")


@dataclasses.dataclass(frozen=True)
class Generation:
    """What came out: the new tokens of each row (EOS included, if it was reached) and how it went."""

    tokens: list[list[int]]
    seconds: float  # of the rounds, without prefill and compilation
    prefill_seconds: float
    rounds: int
    drafted: int
    accepted: int
    accepted_histogram: list[int]  # rounds of a row with 0, 1, ..., d accepted drafts
    exit_rounds: dict[int, int]  # rounds of the loop at each exit (tokens, where each leaves for itself)

    @property
    def new_tokens(self) -> int:
        return sum(map(len, self.tokens))

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds

    @property
    def acceptance(self) -> float:
        """Accepted / drafted tokens; NaN where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else float("nan")

    @property
    def tokens_per_round(self) -> float:
        """New tokens in one round of one row: 1 for plain decoding, d+1 at most with self-speculation."""
        rounds_of_rows = sum(self.accepted_histogram)
        return self.new_tokens / rounds_of_rows if rounds_of_rows else float("nan")
