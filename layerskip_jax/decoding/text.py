"""From prompts to text: the tokenizer, stop strings and streaming around the engine."""

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import numpy as np

from layerskip_jax.config import DecodeConfig
from layerskip_jax.data.tokenizer import Tokenizer
from layerskip_jax.decoding.configure import configured
from layerskip_jax.decoding.engine import generate
from layerskip_jax.decoding.request import Generation, known_tokens
from layerskip_jax.decoding.state import DecodeState
from layerskip_jax.model import Transformer

ROUNDS_BETWEEN_STOP_CHECKS = 8
"""Stop strings are looked for on the host, once in so many rounds: one small transfer each time."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """One prompt's text: ``finish`` says what ended it."""

    prompt: str
    text: str
    tokens: list[int]
    finish: Literal["eos", "stop", "length"]


@dataclasses.dataclass(frozen=True)
class Answer:
    """The completions of a batch and its generation, which has made more tokens where a stop string ended a text."""

    completions: list[Completion]
    generation: Generation


@dataclasses.dataclass(frozen=True)
class Piece:
    """A streamed piece of text: ``drafted`` by the early layers and accepted, or else the full model's own token."""

    text: str
    drafted: bool


class TextGenerator:
    """Generates text with an `unstacked` model in the way that a `DecodeConfig` says."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, config: DecodeConfig):
        tokenizer.check_vocabulary(model.config.vocab_size, padded=True)
        self.tokenizer, self.config = tokenizer, config
        self._eos = -1 if config.ignore_eos else tokenizer.eos_id
        self.model, self.round = configured(config, model)

    def encode(self, prompt: str) -> list[int]:
        return self.tokenizer.encode_prompt(prompt)

    def generate(self, prompts: Sequence[str], show: Callable[[Piece], None] | None = None, first: int = 0) -> Answer:
        """Continue a batch of prompts; each ends at its EOS, at a stop string or after ``max_new_tokens``.

        With ``show``, the text of the first prompt is passed on round by round as it is made. ``first`` is its number
        among the prompts of several batches, so that each batch draws for itself.
        """
        ids = [self.encode(prompt) for prompt in prompts]
        stream = _Stream(self, len(ids[0])) if show and ids else None

        def look(state: DecodeState) -> list[bool]:
            if stream and show:
                for piece in stream.pieces(state):
                    show(piece)
            if not self.config.stop:
                return [False] * len(ids)
            new = [row[len(prompt) :] for row, prompt in zip(known_tokens(state), ids, strict=True)]
            return [self.stop_at(self.partial_text(row)) >= 0 for row in new]

        generation = generate(
            self.model,
            ids,
            self.config.max_new_tokens,
            self.round,
            eos=self._eos,
            seed=int(np.random.SeedSequence((self.config.seed % 2**32, first)).generate_state(1)[0]),
            look=look if show or self.config.stop else None,
            look_every=self.config.stream_every if show else ROUNDS_BETWEEN_STOP_CHECKS,
        )
        return Answer([self._complete(*row) for row in zip(prompts, generation.tokens, strict=True)], generation)

    def text(self, new: Sequence[int]) -> str:
        """Decode generated tokens; the EOS is not part of the text."""
        return self.tokenizer.decode([token for token in new if token != self._eos])

    def partial_text(self, new: Sequence[int]) -> str:
        """Decode generated tokens so far: like `text`, but the bytes of an unfinished character wait."""
        return self.tokenizer.decode_partial([token for token in new if token != self._eos])

    def stop_at(self, text: str) -> int:
        """Return where the first stop string begins in ``text``, or -1."""
        return min((at for at in map(text.find, self.config.stop) if at >= 0), default=-1)

    def cut(self, new: list[int]) -> tuple[str, list[int]] | None:
        """Return the text before the stop string that ``new`` comes to first, and the tokens up to it."""
        text = self.text(new) if self.config.stop else ""
        if self.stop_at(text) < 0:
            return None
        # The fewest tokens that hold a stop string: what is kept does not depend on when it was looked for.
        holds = lambda n: self.stop_at(self.partial_text(new[:n])) >= 0  # noqa: E731
        needed = 1 + bisect.bisect_left(range(1, len(new)), True, key=holds)
        text = self.partial_text(new[:needed]) if needed < len(new) else text
        return text[: self.stop_at(text)], new[:needed]

    def _complete(self, prompt: str, new: list[int]) -> Completion:
        if stopped := self.cut(new):
            return Completion(prompt, *stopped, "stop")
        return Completion(prompt, self.text(new), new, "eos" if new and new[-1] == self._eos else "length")


class _Stream:
    """Turns the states of one row into pieces of text, each shown once and never taken back.

    The bytes of an unfinished character, and what may be the beginning of a stop string, wait for the next round.
    """

    def __init__(self, generator: TextGenerator, prompt_length: int):
        self._generator, self._prompt_length = generator, prompt_length
        self._tokens = self._shown = 0  # tokens seen, and characters passed on, so far

    def pieces(self, state: DecodeState) -> list[Piece]:
        new = known_tokens(state)[0][self._prompt_length :]
        drafted_BS, done_B = jax.device_get((state.drafted_BS, state.done_B))
        is_draft, done = drafted_BS[0, self._prompt_length :], bool(done_B[0])
        text = self._generator.text(new) if done else self._generator.partial_text(new)
        stopped = self._generator.cut(new)
        end = len(stopped[0]) if stopped else len(text) - (0 if done else self._held_back(text))
        pieces = []
        for count in range(self._tokens + 1, len(new) + 1):
            if count == len(new) or is_draft[count] != is_draft[count - 1]:
                until = end if count == len(new) else min(len(self._generator.partial_text(new[:count])), end)
                if until > self._shown:
                    pieces.append(Piece(text[self._shown : until], bool(is_draft[count - 1])))
                    self._shown = until
        self._tokens = len(new)
        return pieces

    def _held_back(self, text: str) -> int:
        stops = self._generator.config.stop
        return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
