"""Checks of a generation request, and the result of a generation."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from layerskip_jax.checks import require, require_exits, require_rising
from layerskip_jax.config import ModelConfig
from layerskip_jax.decoding.rounds import Strategy
from layerskip_jax.decoding.sampling import NO_TOKEN
from layerskip_jax.decoding.state import DecodeState
from layerskip_jax.errors import UserError
from layerskip_jax.model import Transformer, compute_dtype
from layerskip_jax.sharding import mesh_size

BUCKET = 64
"""Prompt lengths and capacities are rounded up to a multiple of this, so that similar requests share a compilation."""


class Request(NamedTuple):
    """A batch of prompts on the device, for `engine.prefill`. The fields are those of `DecodeState`."""

    tokens_BS: jax.Array  # prompts, padded to the capacity
    length_B: jax.Array
    limit_B: jax.Array
    eos: jax.Array
    key: jax.Array


def round_up(value: int) -> int:
    """Return the smallest multiple of `BUCKET` that is at least ``value``."""
    return -(-value // BUCKET) * BUCKET


def check_request(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    max_length: int | None,
    strategy: Strategy,
    eos: int | Sequence[int],
    seed: int,
) -> int:
    """Check a request and return its ``max_length``, by default the length of the longest prompt + ``max_new_tokens``.

    Raises `UserError` for a stacked model, for a prompt that is empty, longer than ``max_length`` - 1 or outside the
    vocabulary, for numbers out of range, for a strategy that `check_strategy` refuses, and for a cache that is larger
    than the device's memory.
    """
    config = model.config
    model.require_unstacked()
    require(_is_listed(prompts), f"prompts must be a list of lists of token ids, not {prompts!r:.40}")
    require(len(prompts) > 0, "there is no prompt: give at least one")
    ends: Any = eos if _is_listed(eos) and not isinstance(eos, str | bytes) else [eos]
    numbers = [("max_new_tokens", max_new_tokens, 1), ("seed", seed, -(2**31)), *(("eos", token, -1) for token in ends)]
    for name, value, least in numbers:
        require(_is_whole(value), f"{name} must be a whole number, not {value!r}")
        require(least <= value < 2**32, f"{name} must be in {least}..{2**32 - 1}, not {value}")
    for token in ends:
        require(
            token < config.vocab_size,
            f"eos {token} is outside the model's vocabulary 0..{config.vocab_size - 1}: give one of its tokens, or -1",
        )
    check_strategy(config, strategy)
    for row, prompt in enumerate(prompts):
        _check_prompt(config, row, prompt)
    longest = max(map(len, prompts))
    if max_length is None:
        max_length = longest + max_new_tokens
    require(_is_whole(max_length), f"max_length must be a whole number or None, not {max_length!r}")
    for row, prompt in enumerate(prompts):
        require(
            len(prompt) + 1 <= max_length,
            f"prompt {row} has {len(prompt)} tokens, so max_length {max_length} leaves no room for a new token: "
            f"shorten the prompt or raise max_length to at least {len(prompt) + 1}",
        )
    _check_memory(config, len(prompts), max_length)
    return max_length


def check_strategy(config: ModelConfig, strategy: Strategy) -> None:
    """Raise `UserError` if the strategy does not fit the model or the cache, or cannot be static under jit."""
    try:
        hash(strategy)
    except TypeError as error:
        raise UserError(
            f"{type(strategy).__name__} must be hashable, because it is static under jit ({error}): give its class and "
            "those of its parts @dataclasses.dataclass(frozen=True), and tuples in place of lists"
        ) from None
    d, exits = strategy.draft_length, list(strategy.exits)
    # `LayerCache` splits the cache into several arrays along its length. `write_cache` writes the d+1 positions of a
    # round through a window of that size in each of them. So d+1 must not exceed the shortest array, which has at least
    # `BUCKET` slots because the capacity is a multiple of `BUCKET`.
    require(0 <= d < BUCKET, f"draft length {d} must be in 0..{BUCKET - 1}")
    for exit_layer in exits:
        require_exits("exit layer", [exit_layer], config.num_layers)
    require_rising("exit layers", exits)
    _check_fields(strategy)


def _check_fields(part: Any) -> None:
    """Raise `UserError` if a dataclass, or a part of it, has other attributes than its fields.

    jit compares dataclasses by their fields. If two instances differ in another attribute only, the second would run
    the program that was compiled for the first.
    """
    if dataclasses.is_dataclass(part):
        fields, kind = {field.name for field in dataclasses.fields(part)}, type(part)
        others = getattr(part, "__dict__", {}).keys() - fields  # a class with slots has no __dict__
        require(
            all(isinstance(getattr(kind, name, None), functools.cached_property) for name in others),
            f"{kind.__name__} has attributes that are not dataclass fields, so jit cannot tell two instances "
            "apart: give its class @dataclasses.dataclass(frozen=True)",
        )
        for name in fields:
            _check_fields(getattr(part, name))


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
    require(
        not wrong, f"prompt {row} must be a list of whole numbers (token ids), but contains {str(wrong[:1])[1:-1]:.40}"
    )
    require(
        min(prompt) >= 0 and max(prompt) < config.vocab_size,
        f"prompt {row} has a token outside the model's vocabulary 0..{config.vocab_size - 1}",
    )


def _check_memory(config: ModelConfig, rows: int, max_length: int) -> None:
    """Refuse a cache that is larger than a device's whole memory. A slightly smaller one may still not fit."""
    slot = 2 * config.num_layers * config.num_kv_heads * config.head_dim * compute_dtype(config).itemsize
    needed, device = rows * max_length * slot, jax.local_devices()[0]
    if limit := (device.memory_stats() or {}).get("bytes_limit"):
        needed //= mesh_size("kv_heads")  # each device holds the cache of its own heads
    else:  # devices of a CPU share the memory of the host
        limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    require(
        needed <= limit and max_length < 2**31 - 2 * BUCKET,
        f"a cache of {rows} x {max_length} tokens, new ones included, takes {needed / 2**30:.1f} GiB, and the device "
        f"({device.device_kind}) has {limit / 2**30:.1f}: lower max_new_tokens, or give fewer prompts at once",
    )


class HostText(NamedTuple):
    """The text of a `DecodeState` in host memory. The fields are those of `DecodeState`."""

    tokens_BS: np.ndarray
    drafted_BS: np.ndarray
    length_B: np.ndarray
    done_B: np.ndarray


def fetch_text(state: DecodeState) -> HostText:
    """Copy the text of ``state`` to the host, in one transfer."""
    return HostText(*jax.device_get((state.tokens_BS, state.drafted_BS, state.length_B, state.done_B)))


def known_tokens(text: HostText) -> list[list[int]]:
    """Return every row's tokens, prompt included; raises `UserError` if the logits of a row are not finite."""
    rows = [row[:length].tolist() for row, length in zip(text.tokens_BS, text.length_B, strict=True)]
    for row, tokens in enumerate(rows):
        if tokens[-1] == NO_TOKEN:
            raise UserError(
                f"the logits after {len(tokens) - 1} tokens of prompt {row} are not finite: the weights hold NaN or "
                "infinity, or activations overflow: take an earlier checkpoint, or a model.compute_dtype of float32"
            )
    return rows


@dataclasses.dataclass(frozen=True)
class Generation:
    """The result of one `engine.generate` call: the new tokens of each prompt, times and counts.

    Drafts and the histogram are sums over the rows that are not done. ``rounds`` and ``exit_rounds`` count rounds of
    the loop, which all rows share; only for `ConfidentExit`, ``exit_rounds`` counts tokens. A strategy without exits
    counts its rounds and drafts under layer L.
    """

    tokens: list[list[int]]  # per prompt, without the prompt; ends with the EOS if the row reached it
    seconds: float  # in rounds and in `on_rounds`, without prefill and compilation
    prefill_seconds: float  # in prefill and, for the first request of a shape, compilation
    rounds: int
    drafted: int  # tokens that were drafted; with several choices at a position, they count once
    accepted: int  # drafts that were accepted, even if an EOS or the row's limit cut them off
    accepted_histogram: list[int]  # entry n: how often a row accepted exactly n drafts in a round, for n = 0..d
    exit_rounds: dict[int, int]  # exit layer -> rounds that drafted there (`ConfidentExit`: tokens that exited there)
    exit_drafts: dict[int, int]  # exit layer -> tokens drafted there; the sum is ``drafted``
    exit_accepted: dict[int, int]  # exit layer -> of those, the accepted ones; the sum is ``accepted``

    @classmethod
    def from_state(
        cls,
        state: DecodeState,
        prompts: Sequence[Sequence[int]],
        exits: Sequence[int],
        seconds: float,
        prefill_seconds: float,
    ) -> Self:
        """Read the result of ``prompts`` from the state after the last round.

        ``exits`` are the strategy's exits, or L alone if it has none.
        """
        statistics, known = jax.device_get(state.statistics), known_tokens(fetch_text(state))
        histogram = statistics.accepted_histogram_Q.tolist()
        return cls(
            tokens=[row[len(prompt) :] for row, prompt in zip(known, prompts, strict=True)],
            rounds=int(statistics.rounds),
            drafted=sum(statistics.drafted_X.tolist()),
            accepted=sum(count * rounds for count, rounds in enumerate(histogram)),
            accepted_histogram=histogram,
            exit_rounds=dict(zip(exits, statistics.exit_rounds_X.tolist(), strict=True)),
            exit_drafts=dict(zip(exits, statistics.drafted_X.tolist(), strict=True)),
            exit_accepted=dict(zip(exits, statistics.accepted_X.tolist(), strict=True)),
            seconds=seconds,
            prefill_seconds=prefill_seconds,
        )

    @classmethod
    def total(cls, parts: Sequence[Self]) -> Self:
        """Add up generations with the same strategy: the rows of all, and the sums of their times and counts."""

        def add(values: list[Any]) -> Any:
            if isinstance(values[0], dict):
                return {key: sum(value[key] for value in values) for key in values[0]}
            return [sum(counts) for counts in zip(*values, strict=True)] if _is_listed(values[0]) else sum(values)

        names = [field.name for field in dataclasses.fields(cls) if field.name != "tokens"]
        sums = {name: add([getattr(part, name) for part in parts]) for name in names}
        return cls(tokens=[row for part in parts for row in part.tokens], **sums)

    @property
    def row_rounds(self) -> int:
        """The number of rounds, each counted once for every row that was not done."""
        return sum(self.accepted_histogram)

    @property
    def new_tokens(self) -> int:
        """The number of new tokens of all prompts."""
        return sum(map(len, self.tokens))

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all prompts per second of the rounds."""
        return self.new_tokens / self.seconds

    @property
    def acceptance(self) -> float:
        """Accepted / drafted tokens; NaN if nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else float("nan")

    @property
    def tokens_per_round(self) -> float:
        """New tokens per round and row: 1 for plain decoding, at most d+1 with drafts; NaN without a round."""
        return self.new_tokens / self.row_rounds if self.row_rounds else float("nan")

    @property
    def drafted_per_round(self) -> float:
        """Drafts per round and row; NaN without a round."""
        return self.drafted / self.row_rounds if self.row_rounds else float("nan")
