"""What a generation is asked and what it answers: the checks of a request, and its result."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, Self

import jax
import numpy as np
from flax import nnx

from layerskip_jax.checks import require
from layerskip_jax.config import ModelConfig
from layerskip_jax.decoding.rounds import Round
from layerskip_jax.decoding.sampling import NO_TOKEN
from layerskip_jax.decoding.state import DecodeState
from layerskip_jax.errors import UserError
from layerskip_jax.model import Transformer, compute_dtype

BUCKET = 64
"""Prompts and capacities are rounded up to a multiple of this, so that similar requests share one compilation."""


def round_up(value: int) -> int:
    return -(-value // BUCKET) * BUCKET


def check_request(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    max_length: int | None,
    step: Round,
    eos: int,
    seed: int,
) -> int:
    """Return ``max_length``, by default what the longest prompt and its new tokens take, of a request that can be met.

    Raises `UserError` for a prompt that is empty, too long or not of the model's tokens, for numbers out of their
    ranges, an exit that is not there, and a cache that the device cannot hold.
    """
    config = model.config
    require(
        isinstance(model.blocks, nnx.List), "the model's blocks are stacked, as in training: pass model.unstacked()"
    )
    require(_is_listed(prompts), f"prompts must be a list of lists of token ids, not {prompts!r:.40}")
    require(len(prompts) > 0, "there is no prompt: give at least one")
    for name, value, least in [("max_new_tokens", max_new_tokens, 1), ("eos", eos, -1), ("seed", seed, -(2**31))]:
        require(_is_whole(value), f"{name} must be a whole number, not {value!r}")
        require(least <= value < 2**32, f"{name} must be in {least}..{2**32 - 1}, not {value}")
    require(
        eos < config.vocab_size,
        f"eos {eos} is outside the model's vocabulary 0..{config.vocab_size - 1}: give one of its tokens, or -1",
    )
    check_step(config, step)
    for row, prompt in enumerate(prompts):
        _check_prompt(config, row, prompt)
    longest = max(map(len, prompts))
    if max_length is None:
        max_length = longest + max_new_tokens
    require(_is_whole(max_length), f"max_length must be a whole number or None, not {max_length!r}")
    for row, prompt in enumerate(prompts):
        require(
            len(prompt) + 1 <= max_length,
            f"prompt {row} has {len(prompt)} tokens and the cache holds {max_length}, with room for one new token "
            f"wanted: shorten the prompt or raise max_length to at least {len(prompt) + 1}",
        )
    _check_memory(config, len(prompts), max_length)
    return max_length


def check_step(config: ModelConfig, step: Round) -> None:
    """Raise `UserError` unless a round suits the model and the cache, and jit can tell it from others by its fields."""
    longest, exits = step.draft_length, list(step.exits)
    # A round writes within two pieces of the cache.
    require(0 <= longest < BUCKET, f"draft length {longest} must be in 0..{BUCKET - 1}")
    for exit_layer in exits:
        require(
            1 <= exit_layer <= config.num_layers,
            f"exit layer {exit_layer} must be in 1..{config.num_layers}, the model's layers",
        )
    require(exits == sorted(set(exits)), f"exit layers must rise, not {' '.join(map(str, exits))}")
    for part in (step, *getattr(step, "__dict__", {}).values()):
        if dataclasses.is_dataclass(part):
            # Two that differ elsewhere would be equal to jit, and the second would run the first's program.
            require(
                vars(part).keys() <= {field.name for field in dataclasses.fields(part)},
                f"{type(part).__name__} keeps more than its fields: give its class @dataclasses.dataclass(frozen=True)",
            )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_listed(value: Any) -> bool:
    return isinstance(value, Sequence) or (isinstance(value, np.ndarray) and value.ndim > 0)


def _check_prompt(config: ModelConfig, row: int, prompt: Sequence[int]) -> None:
    require(
        _is_listed(prompt) and not isinstance(prompt, str | bytes),
        f"prompt {row} must be a list of token ids, not {prompt!r:.40}: encode texts with the tokenizer",
    )
    require(len(prompt) > 0, f"prompt {row} has no token: give at least one (the tokenizer's BOS will do)")
    wrong = [token for token in prompt if not _is_whole(token)]
    require(not wrong, f"prompt {row} must be whole numbers, token ids, and has {str(wrong[:1])[1:-1]:.40}")
    require(
        min(prompt) >= 0 and max(prompt) < config.vocab_size,
        f"prompt {row} has a token outside the model's vocabulary 0..{config.vocab_size - 1}",
    )


def _check_memory(config: ModelConfig, rows: int, max_length: int) -> None:
    """Refuse a cache that is larger than all of the device's memory; one that is nearly so may still not fit."""
    slot = 2 * config.num_layers * config.num_kv_heads * config.head_dim * compute_dtype(config).itemsize
    wanted, device = rows * max_length * slot, jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    require(
        wanted <= limit and max_length < 2**31 - 2 * BUCKET,
        f"a cache of {rows} x {max_length} tokens, new ones included, takes {wanted / 2**30:.1f} GiB, and the device "
        f"({device.device_kind}) has {limit / 2**30:.1f}: lower max_new_tokens, or give fewer prompts at once",
    )


def known_tokens(state: DecodeState) -> list[list[int]]:
    """Return every row's tokens, prompt included; raises `UserError` if a row came to logits that are not finite."""
    tokens_BS, length_B = jax.device_get((state.tokens_BS, state.length_B))
    rows = [row[:length].tolist() for row, length in zip(tokens_BS, length_B, strict=True)]
    for row, tokens in enumerate(rows):
        if tokens[-1] == NO_TOKEN:
            raise UserError(
                f"the logits after {len(tokens) - 1} tokens of prompt {row} are not finite: the weights hold NaN or "
                "infinity, or activations overflow: take an earlier checkpoint, or a model.compute_dtype of float32"
            )
    return rows


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
    exit_rounds: dict[int, int]  # rounds of the loop that drafted at each exit (tokens, where each leaves for itself)
    exit_drafts: dict[int, int]  # of ``drafted``, at each exit

    @classmethod
    def of(cls, state: DecodeState, prompts: Sequence[Sequence[int]], exits: Sequence[int], **seconds: float) -> Self:
        """Read the result of ``prompts`` from the state after the last round, drafted from ``exits``."""
        statistics = jax.device_get(state.statistics)
        histogram = statistics.accepted_histogram_Q.tolist()
        return cls(
            tokens=[row[len(prompt) :] for row, prompt in zip(known_tokens(state), prompts, strict=True)],
            rounds=int(statistics.rounds),
            drafted=sum(statistics.drafted_X.tolist()),
            accepted=sum(count * rounds for count, rounds in enumerate(histogram)),
            accepted_histogram=histogram,
            exit_rounds=dict(zip(exits, statistics.exit_rounds_X.tolist(), strict=True)),
            exit_drafts=dict(zip(exits, statistics.drafted_X.tolist(), strict=True)),
            **seconds,
        )

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
