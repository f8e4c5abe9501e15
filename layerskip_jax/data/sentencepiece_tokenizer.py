"""SentencePiece tokenizers, and their training on any source."""

import io
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import sentencepiece

from layerskip_jax.data.documents import Documents, MixedDocuments
from layerskip_jax.data.tokenizer import SPACE, Tokenizer, valid_text
from layerskip_jax.data.tokenizer_settings import SETTINGS, TokenizerSettings
from layerskip_jax.errors import UserError
from layerskip_jax.locations import locate, write_file

UNK, BOS, EOS = 0, 1, 2
RESERVED = 3 + 256
"""Pieces that every vocabulary has: unknown, BOS, EOS and the bytes."""

TOKENIZER = "tokenizer.model"


@dataclass(frozen=True)
class SentencePiece(Tokenizer):
    """A SentencePiece model. The files next to a ``tokenizer.model`` can name other special tokens."""

    model: bytes = field(repr=False)
    settings: TokenizerSettings = field(repr=False, default=TokenizerSettings())

    @cached_property
    def _processor(self) -> sentencepiece.SentencePieceProcessor:
        return sentencepiece.SentencePieceProcessor(model_proto=self.model)

    @cached_property
    def _inner(self) -> sentencepiece.SentencePieceProcessor:
        """The model without its dummy prefix, for the parts of a text after the first."""
        model = parse_model(self.model)
        if not model.normalizer_spec.add_dummy_prefix:
            return self._processor
        model.normalizer_spec.add_dummy_prefix = False
        return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "settings": self.settings}

    @property
    def files(self) -> dict[str, bytes]:
        return {TOKENIZER: self.model}

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    @cached_property
    def bos_id(self) -> int | None:
        token = self.special_tokens.get(self.settings.roles.get("bos_token", ""), self._processor.bos_id())
        return None if token < 0 else token

    @cached_property
    def eos_id(self) -> int:
        token = self.special_tokens.get(self.settings.roles.get("eos_token", ""), self._processor.eos_id())
        return next(iter(self.settings.end_ids), -1) if token < 0 else token

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        processor = self._processor
        control = (token for token in range(processor.vocab_size()) if processor.is_control(token))
        return {processor.id_to_piece(token): token for token in control}

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``; `decode` restores any text exactly.

        A model trained with a dummy prefix, such as Llama 2's, adds a space in front.
        """
        return self._encode_parts(valid_text(text), self._processor)

    def encode_continuation(self, text: str) -> list[int]:
        return self._encode_parts(valid_text(text), self._inner)

    def _encode_parts(self, text: str, processor: sentencepiece.SentencePieceProcessor) -> list[int]:
        """Encode the text before the first `SPACE` with ``processor``, the others without a dummy prefix, and each
        `SPACE` as its bytes."""
        first, *rest = text.split(SPACE)
        ids = processor.encode(first)
        if rest and not first and processor is not self._inner:  # the library adds no prefix to an empty text
            ids = [token for token in [processor.piece_to_id(SPACE)] if not processor.is_unknown(token)]
        for part in rest:
            in_bytes = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
            ids += in_bytes if all(map(processor.is_byte, in_bytes)) else [processor.unk_id()]
            ids += self._inner.encode(part)
        return ids

    @property
    def _roles(self) -> dict[str, str]:
        names = {token: name for name, token in self.special_tokens.items()}
        own = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        return {role: names[token] for role, token in own.items() if token in names} | super()._roles

    def _encode_rendered(self, text: str) -> list[int]:
        processor = self._processor
        for name in (token["content"] for token in self.settings.added_tokens):
            if name in text and processor.id_to_piece(processor.piece_to_id(name)) != name:
                raise UserError(f"{TOKENIZER} lacks the token {name} of {SETTINGS}: put a tokenizer.json next to it")
        names = "|".join(map(re.escape, sorted(self.special_tokens, key=len, reverse=True)))
        ids: list[int] = []
        for part in re.split(f"({names or '(?!)'})", valid_text(text)):  # (?!) matches nothing
            if part in self.special_tokens:
                ids.append(self.special_tokens[part])
            elif part:
                ids += self._encode_parts(part, self._inner if ids else processor)
        return ids

    @cached_property
    def _spelling(self) -> list[bytes]:
        processor, spelling = self._processor, []
        for piece in range(processor.vocab_size()):
            text = processor.id_to_piece(piece)
            if processor.is_byte(piece):
                spelling.append(bytes([int(text[3:5], 16)]))
            elif processor.is_control(piece):
                spelling.append(b"")
            elif processor.is_unknown(piece):
                spelling.append("\ufffd".encode())
            else:
                spelling.append(text.replace(SPACE, " ").encode())
        return spelling


def parse_model(model: bytes) -> Any:
    """Return the protocol buffer of a SentencePiece model."""
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2  # its classes are created at import, so mypy does not know them
    return proto.ModelProto.FromString(model)


def train_tokenizer(documents: Documents, path: str, vocab_size: int, sample_bytes: int = 8_000_000) -> SentencePiece:
    """Train a BPE model with byte fallback on ``documents`` and write it to ``path``.

    Text is not normalized, and runs of spaces and newlines can be pieces, so code is restored exactly. The training
    text is ``sample_bytes`` of documents spread evenly over the corpus. Training is deterministic. If there are more
    characters than pieces, byte pieces spell the rare ones, and a line on stdout says how many. Raises `UserError` if
    the text is too small for ``vocab_size`` pieces.
    """
    if vocab_size <= RESERVED:
        raise UserError(
            f"cannot make {vocab_size} pieces (model.vocab_size): the smallest size is {RESERVED + 1}, for BOS, EOS, "
            "unknown, 256 bytes and one character"
        )
    try:
        model = _train(_sentences(documents, sample_bytes), vocab_size)
    except _TooManyCharactersError:
        sentences = list(_sentences(documents, sample_bytes))
        model = _train_without_rare(sentences, vocab_size, max(1, (vocab_size - RESERVED) // 2))
    write_file(locate(path), model)
    return SentencePiece(model)


class _TooManyCharactersError(Exception):
    pass


def _train_without_rare(sentences: list[str], vocab_size: int, kept: int) -> bytes:
    """Train with pieces for the ``kept`` most frequent characters only, or for more if the text has too few merges."""
    counts = Counter(itertools.chain.from_iterable(sentences))
    frequent = dict(counts.most_common(kept))
    rare = re.compile(f"[^{re.escape(''.join(frequent))}]+")
    try:
        parts = (part for sentence in sentences for part in rare.split(sentence) if part)
        model = _train(parts, vocab_size, character_coverage=1.0)
    except UserError:
        if kept == vocab_size - RESERVED:
            raise
        return _train_without_rare(sentences, vocab_size, vocab_size - RESERVED)
    print(
        f"the text has {len(counts):,} characters: the {kept:,} most frequent ones, "
        f"{sum(frequent.values()) / counts.total():.1%} of the text, have pieces of their own, and byte pieces spell "
        "the others; a larger --model.vocab_size covers more"
    )
    return model


def _train(sentences: Iterator[str], vocab_size: int, character_coverage: float = 0.9995) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=character_coverage,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_by_whitespace=True,
            max_sentence_length=1 << 20,
            unk_id=UNK,
            bos_id=BOS,
            eos_id=EOS,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if "smaller than required_chars" in str(error):
            raise _TooManyCharactersError from error
        reason = str(error)
        if largest := re.search(r"set it to a value <= (\d+)", reason):
            reason = f"its text is too small: set --model.vocab_size {largest[1]} or less, or use more text"
        elif "sentences_.empty()" in reason:
            reason = "it has no text"
        raise UserError(f"cannot make {vocab_size} pieces (model.vocab_size) from this corpus: {reason}") from error
    return model.getvalue()


def _sentences(documents: Documents, sample_bytes: int) -> Iterator[str]:
    """Yield pieces of documents that are spread evenly over the corpus, until ``sample_bytes``.

    A document gives at most an eighth of ``sample_bytes`` [characters], if there are eight documents. Every component
    of a mixture has its share of the bytes, or all of its text if that is less.
    """
    if isinstance(documents, MixedDocuments):
        for name, part in documents.parts.items():
            yield from _sentences(part, round(sample_bytes * documents.shares[name]))
        return
    first = documents[0]
    if not isinstance(first, str):
        raise UserError("a tokenizer is trained on text, but this source (data.source) holds tokens")
    taken, count = 0, len(documents)
    longest = max(4000, sample_bytes // min(count, 8))  # [characters] of one document
    stride = next(prime for prime in (7919, 104729, 1299709) if count % prime)  # visits every document once
    for i in range(count):
        text = str(documents[i * stride % count])
        for start in range(0, min(len(text), longest), 4000):
            piece = valid_text(text[start : start + 4000]).replace("\0", " ")
            taken += len(piece.encode())
            yield piece
        if taken >= sample_bytes:
            return
