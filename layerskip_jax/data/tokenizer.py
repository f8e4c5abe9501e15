"""The interface of tokenizers, with lossless decoding."""

import abc
import codecs
import functools
import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property

from layerskip_jax.data.chat import render_chat
from layerskip_jax.data.tokenizer_settings import TokenizerSettings
from layerskip_jax.errors import UserError, warn

SPACE = "\u2581"
"""SentencePiece stores a space as this character. Where a text contains the character itself, `SentencePiece.encode`
encodes its UTF-8 bytes, so that decoding does not turn it into a space."""


def valid_text(text: str) -> str:
    """Return ``text`` with U+FFFD in place of lone surrogates, which JSON can spell but UTF-8 cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@functools.cache  # warns once: a corpus can have many such texts
def _warn_two_bos() -> None:
    warn("a text starts with BOS twice, because it spells the BOS that the tokenizer adds: leave it out of the text")


class Tokenizer(abc.ABC):
    """Maps text to token ids and back. Pickles with the content of its files, so worker processes read no files."""

    settings: TokenizerSettings = TokenizerSettings()
    """The files next to it; they decide about BOS, end tokens and chats."""

    @property
    @abc.abstractmethod
    def files(self) -> dict[str, bytes]:
        """Names and contents of the tokenizer's own files, which are stored with checkpoints.

        For a SentencePiece model, the settings next to it, which can add BOS and EOS, are `companions`. For a
        ``tokenizer.json``, its ``tokenizer_config.json`` is one of the files.
        """

    @property
    def companions(self) -> dict[str, bytes]:
        """The other files that checkpoints and exports keep: chat template, end tokens."""
        return {name: content for name, content in self.settings.kept(self.eos_id).items() if name not in self.files}

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of each of its `files`; checkpoints store it."""
        return {name: hashlib.sha256(content).hexdigest() for name, content in self.files.items()}

    def fingerprint(self) -> str:
        """Return the SHA-256 of its `files`; a pretokenized corpus stores it."""
        return hashlib.sha256(b"".join(self.files.values())).hexdigest()

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """Number of token ids."""

    @property
    @abc.abstractmethod
    def bos_id(self) -> int | None:
        """The token that starts a text, if there is one."""

    @property
    @abc.abstractmethod
    def eos_id(self) -> int:
        """The token after every training document."""

    @property
    def special_tokens(self) -> dict[str, int]:
        """The names of the tokens that have no text, such as EOS."""
        return {}

    def end_tokens(self, model_vocab_size: int) -> tuple[int, ...]:
        """Return the tokens that end a generated text, of those in the model's vocabulary.

        As in transformers, ``generation_config.json`` lists them, or else ``config.json``; without both, it is EOS.
        """
        return tuple(token for token in self.settings.end_ids or (self.eos_id,) if token < model_vocab_size)

    def check_vocabulary(self, model_vocab_size: int, *, padded: bool = False) -> None:
        """Raise `UserError` unless tokenizer and model have vocabularies of the same size.

        The model may lack special tokens at the end of the vocabulary, which were added later, such as a token for
        padding. With ``padded`` it may be larger: many published models round it up.
        """
        needed, added = self.vocab_size, set(self.special_tokens.values()) - {self.bos_id, self.eos_id}
        while needed - 1 in added:
            needed -= 1
        if model_vocab_size < needed or (model_vocab_size > self.vocab_size and not padded):
            raise UserError(
                f"the tokenizer has {self.vocab_size} pieces and the model's vocabulary {model_vocab_size}: set "
                f"--model.vocab_size {self.vocab_size}, or train a tokenizer of {model_vocab_size} pieces"
            )

    def check_decodes(self, model_vocab_size: int) -> None:
        """Raise `UserError` if the vocabulary is too large for the model's own tokenizer with a few tokens added."""
        if self.vocab_size > 2 * model_vocab_size:
            self.check_vocabulary(model_vocab_size, padded=True)

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``, without BOS and EOS."""

    def encode_continuation(self, text: str) -> list[int]:
        """Return the token ids of ``text`` after other text: `encode` without a space that it adds in front."""
        return self.encode(text)

    def encode_prompt(self, text: str) -> list[int]:
        """Return the token ids of the beginning of a text, with the special tokens that the tokenizer's files add.

        That is usually BOS. Warns if the text already spells it.
        """
        ids = self._encode_with_special_tokens(text)
        if self.bos_id is not None and ids[:2] == [self.bos_id] * 2:
            _warn_two_bos()
        return ids

    def _encode_with_special_tokens(self, text: str) -> list[int]:
        before = [] if self.bos_id is None or self.settings.flag("add_bos_token") is False else [self.bos_id]
        after = [self.eos_id] if self.settings.flag("add_eos_token") else []
        return [*before, *self.encode(text), *after]

    def encode_document(self, text: str) -> list[int]:
        """Return the token ids of a training document: `encode_prompt`, and EOS unless it is there."""
        ids = self.encode_prompt(text)
        return ids if ids[1:] and ids[-1] == self.eos_id else [*ids, self.eos_id]

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the token ids of a conversation, by the model's chat template; see `render_chat`."""
        text = render_chat(self.settings.chat_template, messages, self._roles)
        return self._encode_rendered(text)

    @property
    def _roles(self) -> dict[str, str]:
        return self.settings.roles

    def _encode_rendered(self, text: str) -> list[int]:
        """Encode a text in which special tokens are written out."""
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``, without control tokens; invalid UTF-8 becomes U+FFFD."""
        return self._bytes(ids).decode("utf-8", "replace")

    def decode_partial(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids`` so far: `decode` without the bytes of an incomplete last character."""
        return codecs.getincrementaldecoder("utf-8")("replace").decode(self._bytes(ids))

    def _bytes(self, ids: Sequence[int]) -> bytes:
        known = self._spelling
        return b"".join(
            known[token] for token in ids if token < len(known)
        )  # a padded model can generate ids beyond the vocabulary

    @cached_property
    @abc.abstractmethod
    def _spelling(self) -> list[bytes]:
        """The bytes of every piece. The libraries' decoders would drop a leading space and merge bytes."""
