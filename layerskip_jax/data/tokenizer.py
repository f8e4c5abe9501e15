"""The interface of tokenizers, with lossless decoding."""

import abc
import codecs
import hashlib
from functools import cached_property

from layerskip_jax.errors import UserError

SPACE = "\u2581"
"""SentencePiece stores a space as this character. Where a text contains the character itself, `SentencePiece.encode`
encodes its UTF-8 bytes, so that decoding does not turn it into a space."""


class Tokenizer(abc.ABC):
    """Maps text to token ids and back. Pickles with the content of its files, so worker processes read no files."""

    @property
    @abc.abstractmethod
    def files(self) -> dict[str, bytes]:
        """Names and contents of its files, which are stored with checkpoints."""

    def fingerprint(self) -> str:
        """Return the SHA-256 of its `files`; a pretokenized corpus stores it."""
        return hashlib.sha256(b"".join(self.files.values())).hexdigest()

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
        """Raise `UserError` unless tokenizer and model have vocabularies of the same size.

        With ``padded`` the model's may be larger: many published models round it up.
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
        """Return the token ids of a prompt, with the BOS that starts every training document."""
        return [self.bos_id, *self.encode(text)]

    def decode(self, ids: list[int]) -> str:
        """Return the text of ``ids``, without control tokens; invalid UTF-8 becomes U+FFFD."""
        return self._bytes(ids).decode("utf-8", "replace")

    def decode_partial(self, ids: list[int]) -> str:
        """Return the text of ``ids`` so far: `decode` without the bytes of an incomplete last character."""
        return codecs.getincrementaldecoder("utf-8")("replace").decode(self._bytes(ids))

    def _bytes(self, ids: list[int]) -> bytes:
        known = self._spelling
        return b"".join(
            known[token] for token in ids if token < len(known)
        )  # a padded model can generate ids beyond the vocabulary

    @cached_property
    @abc.abstractmethod
    def _spelling(self) -> list[bytes]:
        """The bytes of every piece. The libraries' decoders would drop a leading space and merge bytes."""
