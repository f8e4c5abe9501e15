"""The interface of a tokenizer: encode, and decode without loss."""

import abc
import codecs
from functools import cached_property

from layerskip_jax.errors import UserError

SPACE = "\u2581"
"""SentencePiece writes a space as this character, so a text that has the character itself would come back changed.

Such a character is spelled in bytes instead (see `SentencePiece.encode`)."""


class Tokenizer(abc.ABC):
    """From text to token ids and back. Pickles as its files, so worker processes need none."""

    @property
    @abc.abstractmethod
    def files(self) -> dict[str, bytes]:
        """What is kept of it beside a checkpoint: file name and content."""

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """Number of token ids."""

    @property
    @abc.abstractmethod
    def bos_id(self) -> int:
        """The token before every text."""

    @property
    @abc.abstractmethod
    def eos_id(self) -> int:
        """The token after every text."""

    def check_vocabulary(self, model_vocab_size: int, *, padded: bool = False) -> None:
        """Raise `UserError` unless the tokenizer has exactly the model's vocabulary, or with ``padded`` a part of it.

        Models of other projects are often padded: their vocabulary is rounded up.
        """
        if self.vocab_size != model_vocab_size and not (padded and self.vocab_size < model_vocab_size):
            raise UserError(
                f"the tokenizer has {self.vocab_size} pieces and the model's vocabulary {model_vocab_size}: set "
                f"--model.vocab_size {self.vocab_size}, or train a tokenizer of {model_vocab_size} pieces"
            )

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``, without BOS and EOS."""

    def encode_prompt(self, text: str) -> list[int]:
        """Return the token ids of a prompt: after the BOS that begins every training document."""
        return [self.bos_id, *self.encode(text)]

    def decode(self, ids: list[int]) -> str:
        """Return the text of ``ids``; control tokens vanish, bytes that make no character become U+FFFD."""
        return self._bytes(ids).decode("utf-8", "replace")

    def decode_partial(self, ids: list[int]) -> str:
        """Return the text of ``ids`` so far: like `decode`, but the bytes of an unfinished character wait."""
        return codecs.getincrementaldecoder("utf-8")("replace").decode(self._bytes(ids))

    def _bytes(self, ids: list[int]) -> bytes:
        known = self._spelling
        return b"".join(known[token] for token in ids if token < len(known))  # a padded model may say more

    @cached_property
    @abc.abstractmethod
    def _spelling(self) -> list[bytes]:
        """The bytes of every piece. The libraries' own decoding would drop a leading space and merge bytes."""
