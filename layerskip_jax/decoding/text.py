"""Text generation: the tokenizer, stop strings and streaming around `engine.generate`."""

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from layerskip_jax.config import DecodeConfig
from layerskip_jax.data.tokenizer import Tokenizer
from layerskip_jax.decoding.configure import configure
from layerskip_jax.decoding.engine import generate
from layerskip_jax.decoding.request import Generation, HostText, known_tokens
from layerskip_jax.model import Transformer

ROUNDS_BETWEEN_STOP_CHECKS = 8
"""Rounds between two searches for stop strings, which run on the host and need one transfer each."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """The text generated after one prompt."""

    prompt: str
    text: str  # without the prompt, cut before the stop string
    tokens: list[int]  # up to and including the EOS or the tokens of the stop string
    finish: Literal["eos", "stop", "length"]  # why the text ends


@dataclasses.dataclass(frozen=True)
class Answer:
    """The completions of a batch of prompts, and the `Generation` that they come from.

    The counts of the generation include tokens after a stop string; the completions do not.
    """

    completions: list[Completion]
    generation: Generation


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of streamed text."""

    text: str
    drafted: bool  # True: it comes from accepted drafts; False: from the full model's own tokens


def encode(tokenizer: Tokenizer, config: DecodeConfig, prompt: str) -> list[int]:
    """Return the token ids of a prompt, BOS included; with ``chat``, of a conversation with this first message."""
    if config.chat:
        return tokenizer.encode_chat([{"role": "user", "content": prompt}])
    return tokenizer.encode_prompt(prompt)


class TextGenerator:
    """Generate text with an `unstacked` model and the strategy that a `DecodeConfig` asks for.

    For ``weights`` int8, pass a model that `quantization.with_weights` returned. ``longest_prompt`` is the number of
    tokens of the longest prompt: all batches then have caches of one length, and share one compiled loop.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, config: DecodeConfig, longest_prompt: int = 0):
        vocabulary = model.config.vocab_size
        tokenizer.check_decodes(vocabulary)
        self.tokenizer, self.config, self._longest = tokenizer, config, longest_prompt
        self._ends = () if config.ignore_eos else tokenizer.end_tokens(vocabulary)
        self._marks, self._stops = _mark_special_tokens(tokenizer, config.stop)
        self.model, self.strategy = configure(config, model)

    def encode(self, prompt: str) -> list[int]:
        """Encode a prompt with this generator's tokenizer and settings; a subclass may shorten it."""
        return encode(self.tokenizer, self.config, prompt)

    def generate(self, prompts: Sequence[str], show: Callable[[Piece], None] | None = None, first: int = 0) -> Answer:
        """Continue a batch of prompts; each ends at its EOS, at a stop string or after ``max_new_tokens``.

        ``show`` receives the first prompt's text while it is generated. ``first`` is the index of the first prompt if
        there are several batches; it goes into the seed, so that equal prompts in two batches get different samples.
        """
        ids = [self.encode(prompt) for prompt in prompts]
        stream = _Stream(self, len(ids[0])) if show and ids else None

        def on_rounds(text: HostText) -> list[bool]:
            if stream and show:
                for piece in stream.pieces(text):
                    show(piece)
            if not self.config.stop:
                return [False] * len(ids)
            return [
                bool(done) or self._stop_at(self.read(row[len(prompt) :], partial=True)) >= 0
                for row, prompt, done in zip(known_tokens(text), ids, text.done_B, strict=True)
            ]

        generation = generate(
            self.model,
            ids,
            self.config.max_new_tokens,
            self.strategy,
            eos=self._ends,
            max_length=max([self._longest, *map(len, ids)]) + self.config.max_new_tokens,
            seed=int(np.random.SeedSequence((self.config.seed % 2**32, first)).generate_state(1)[0]),
            on_rounds=on_rounds if show or self.config.stop else None,
            rounds_per_call=self.config.stream_every if show else ROUNDS_BETWEEN_STOP_CHECKS,
        )
        return Answer([self._complete(*row) for row in zip(prompts, generation.tokens, strict=True)], generation)

    def text(self, new: Sequence[int]) -> str:
        """Decode generated tokens without the token that ends them."""
        return self.visible(self.read(new))

    def partial_text(self, new: Sequence[int]) -> str:
        """Decode the tokens generated so far, without the bytes of an unfinished character."""
        return self.visible(self.read(new, partial=True))

    def read(self, new: Sequence[int], partial: bool = False) -> str:
        """Decode tokens, and insert a mark for each special token that occurs in a stop string."""
        parts: list[str] = []
        rest: list[int] = []
        for token in new:
            if token in self._marks:
                parts += [self.tokenizer.decode(rest), self._marks[token]]
                rest = []
            elif token not in self._ends:
                rest.append(token)
        return "".join([*parts, (self.tokenizer.decode_partial if partial else self.tokenizer.decode)(rest)])

    def visible(self, text: str) -> str:
        """Remove the marks from text that `read` returned."""
        return text.translate(dict.fromkeys(map(ord, self._marks.values()))) if self._marks else text

    def _stop_at(self, text: str) -> int:
        """Return the index at which the first stop string begins in ``text``, or -1."""
        return min((index for index in map(text.find, self._stops) if index >= 0), default=-1)

    def cut(self, new: list[int]) -> tuple[str, list[int]] | None:
        """Return the text before the first stop string in ``new`` and the tokens up to its end; None without one."""
        text = self.read(new) if self._stops else ""
        if self._stop_at(text) < 0:
            return None
        # Cut after the fewest tokens that contain a stop string, so the result does not depend on `rounds_per_call`.
        contains_stop = lambda n: self._stop_at(self.read(new[:n], partial=True)) >= 0  # noqa: E731
        needed = 1 + bisect.bisect_left(range(1, len(new)), True, key=contains_stop)
        text = self.read(new[:needed], partial=True) if needed < len(new) else text
        return self.visible(text[: self._stop_at(text)]), new[:needed]

    def held_back(self, text: str) -> int:
        """Return how many visible characters at the end of ``text`` (from `read`) may begin a stop string."""
        held = max((n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        return len(self.visible(text[len(text) - held :]))

    def _complete(self, prompt: str, new: list[int]) -> Completion:
        if stopped := self.cut(new):
            return Completion(prompt, *stopped, "stop")
        return Completion(prompt, self.text(new), new, "eos" if new and new[-1] in self._ends else "length")


def _mark_special_tokens(tokenizer: Tokenizer, stops: Sequence[str]) -> tuple[dict[int, str], tuple[str, ...]]:
    """Return ``{token id: mark}`` for the special tokens that stop strings contain, and the stop strings: as given, and
    with marks in place of these tokens.

    A special token has no text. The marks are lone surrogates, which no decoded text has.
    """
    special, marked = tokenizer.special_tokens, list(stops)
    found = [name for name in special if name and any(name in stop for stop in stops)]
    marks: dict[int, str] = {}
    for name in sorted(found, key=len, reverse=True):
        mark = marks[special[name]] = chr(0xD800 + len(marks))
        marked = [stop.replace(name, mark) for stop in marked]
    return marks, tuple(dict.fromkeys([*stops, *marked]))


class _Stream:
    """Turn the growing text of the first row into pieces.

    A piece is final. Text that can still change waits for a later call: an unfinished character, and text that may be
    the beginning of a stop string.
    """

    def __init__(self, generator: TextGenerator, prompt_length: int):
        self._generator, self._prompt_length = generator, prompt_length
        self._tokens = self._shown = 0  # tokens and characters that earlier pieces cover

    def pieces(self, host: HostText) -> list[Piece]:
        """Return the text that is new in ``host``, split where drafted tokens meet the full model's."""
        new = known_tokens(host)[0][self._prompt_length :]
        is_draft, done = host.drafted_BS[0, self._prompt_length :], bool(host.done_B[0])
        marked = self._generator.read(new, partial=not done)
        text, stopped = self._generator.visible(marked), self._generator.cut(new)
        end = len(stopped[0]) if stopped else len(text) - (0 if done else self._generator.held_back(marked))
        pieces = []
        for count in range(self._tokens + 1, len(new) + 1):
            if count == len(new) or is_draft[count] != is_draft[count - 1]:
                until = end if count == len(new) else min(len(self._generator.partial_text(new[:count])), end)
                if until > self._shown:
                    pieces.append(Piece(text[self._shown : until], bool(is_draft[count - 1])))
                    self._shown = until
        self._tokens = len(new)
        return pieces
