"""Tokenizers: load, encode, and decode without loss; and SentencePiece, which is trained on any source.

A ``tokenizer.json`` is in `layerskip_jax.data.tokenizer_json`.
"""

import abc
import codecs
import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import sentencepiece
from etils import epath

from layerskip_jax.data.sources import Documents
from layerskip_jax.errors import UserError
from layerskip_jax.locations import locate

SPACE = "\u2581"
"""SentencePiece writes a space as this character, so a text that has the character itself would come back changed.

Such a character is spelled in bytes instead (see `SentencePiece.encode`)."""

UNK, BOS, EOS = 0, 1, 2

TOKENIZER = "tokenizer.model"


class Tokenizer(abc.ABC):
    """From text to token ids and back. Pickles as its files, so worker processes need none."""

    @staticmethod
    def load(path: str) -> "Tokenizer":
        """Load a SentencePiece ``.model`` or a ``.json``, local or gs://; raises `UserError` where there is none."""
        file = locate(path)
        if not file.is_file():
            if (file.parent / "config.json").is_file():
                raise UserError(
                    f"the Hugging Face folder {file.parent} has no tokenizer: put its tokenizer.json or "
                    f"{TOKENIZER} beside its config.json"
                )
            raise UserError(
                f"no tokenizer at {path} (data.tokenizer): train one with "
                "python -m layerskip_jax.data tokenizer --config configs/NAME.py"
            )
        if file.suffix == ".json":
            from layerskip_jax.data.tokenizer_json import JsonTokenizer

            return JsonTokenizer.read(file)
        tokenizer = SentencePiece(file.read_bytes())
        try:
            pieces = len(tokenizer._spelling)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{path} (data.tokenizer) is not a SentencePiece model, or is damaged") from error
        if not pieces or min(tokenizer.bos_id, tokenizer.eos_id) < 0:
            raise UserError(
                f"{path} (data.tokenizer) must have pieces for the beginning and the end of a text: BOS, EOS"
            )
        return tokenizer

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


@dataclass(frozen=True)
class SentencePiece(Tokenizer):
    """A SentencePiece model."""

    model: bytes = field(repr=False)

    @cached_property
    def _processor(self) -> sentencepiece.SentencePieceProcessor:
        return sentencepiece.SentencePieceProcessor(model_proto=self.model)

    def __getstate__(self) -> dict[str, bytes]:
        return {"model": self.model}

    @property
    def files(self) -> dict[str, bytes]:
        return {TOKENIZER: self.model}

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    @property
    def bos_id(self) -> int:
        return self._processor.bos_id()

    @property
    def eos_id(self) -> int:
        return self._processor.eos_id()

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``; `decode` gives the text back, whatever it is.

        A model that was trained with a dummy prefix, as that of Llama 2, puts a space in front.
        """
        ids: list[int] = []
        for part, piece in enumerate(text.split(SPACE)):
            if part:
                ids.extend(self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode())
            ids.extend(self._processor.encode(piece.encode("utf-8", "replace").decode()))
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


def tokenizer_in(folder: epath.Path) -> epath.Path | None:
    """Return the tokenizer file of a folder: its ``tokenizer.json``, which transformers reads too, or the other."""
    files = [folder / name for name in ("tokenizer.json", TOKENIZER)]
    return next((file for file in files if file.is_file()), None)


def fingerprint(path: str) -> str:
    """Return the SHA-256 of a tokenizer's files, by which a pretokenized corpus knows its own."""
    return hashlib.sha256(b"".join(Tokenizer.load(path).files.values())).hexdigest()


def train_tokenizer(documents: Documents, path: str, vocab_size: int, sample_bytes: int = 8_000_000) -> SentencePiece:
    """Train a BPE model with byte fallback on ``documents`` and write it to ``path``.

    Nothing is normalised, and runs of spaces and newlines are pieces like any other: code comes back as it was.
    Documents are taken evenly until ``sample_bytes``; the same documents give the same tokenizer. Raises `UserError`
    if the text is too small for ``vocab_size`` pieces.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(documents, sample_bytes),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
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
        raise UserError(
            f"SentencePiece cannot make {vocab_size} pieces (model.vocab_size) of this corpus: {error}"
        ) from error
    file = locate(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(model.getvalue())
    return SentencePiece(model.getvalue())


def _sentences(documents: Documents, sample_bytes: int) -> Iterator[str]:
    """Yield lines, their newlines included, of documents taken evenly over the corpus."""
    first = documents[0]
    if not isinstance(first, str):
        raise UserError("a tokenizer is trained on text, and this source (data.source) holds tokens")
    taken, count = 0, len(documents)
    stride = next(step for step in (7919, 104729, 1299709) if count % step)  # primes: visits every document once
    for i in range(count):
        text = str(documents[i * stride % count])
        for start in range(0, len(text), 4000):
            piece = text[start : start + 4000].replace("\0", " ")
            taken += len(piece.encode("utf-8", "replace"))
            yield piece
        if taken >= sample_bytes:
            return
