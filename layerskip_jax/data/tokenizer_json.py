"""Tokenizers in Hugging Face's ``tokenizer.json``, read by the ``tokenizers`` library (extra ``huggingface``)."""

import codecs
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from etils import epath

from layerskip_jax.data.tokenizer import SPACE, Tokenizer
from layerskip_jax.errors import UserError

SETTINGS = "tokenizer_config.json"

PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_OF = {chr(byte): byte for byte in PRINTABLE} | {
    chr(256 + n): byte for n, byte in enumerate(byte for byte in range(256) if byte not in PRINTABLE)
}
"""The alphabet of byte-level BPE (GPT-2): printable Latin-1 bytes keep their character, the others use U+0100 on."""


@dataclass(frozen=True)
class JsonTokenizer(Tokenizer):
    """A ``tokenizer.json`` with its ``tokenizer_config.json``, which names BOS and EOS.

    Special tokens written out in a text are encoded as such, as in transformers.
    """

    json: bytes = field(repr=False)
    settings: bytes = field(repr=False)

    @classmethod
    def read(cls, file: epath.Path) -> "JsonTokenizer":
        """Read both files; raises `UserError` if one is missing, or for a tokenizer that cannot be decoded to bytes."""
        settings = file.parent / SETTINGS
        if not settings.is_file():
            raise UserError(f"{file} needs its {SETTINGS} in the same folder: that file names BOS and EOS")
        tokenizer = cls(file.read_bytes(), settings.read_bytes())
        try:
            _ = tokenizer._library, tokenizer._spelling, tokenizer.bos_id, tokenizer.eos_id
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{file} (data.tokenizer) is not a tokenizer.json: {error}") from error
        return tokenizer

    @cached_property
    def _library(self) -> Any:
        try:
            import tokenizers
        except ImportError:
            raise UserError("a tokenizer.json needs tokenizers: pip install layerskip_jax[huggingface]") from None
        return tokenizers.Tokenizer.from_buffer(self.json.removeprefix(codecs.BOM_UTF8))

    def __getstate__(self) -> dict[str, bytes]:
        return {"json": self.json, "settings": self.settings}

    @property
    def files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self.json, SETTINGS: self.settings}

    @property
    def vocab_size(self) -> int:
        return len(self._spelling)

    @cached_property
    def bos_id(self) -> int:
        return self._special_token_id("bos_token")

    @cached_property
    def eos_id(self) -> int:
        return self._special_token_id("eos_token")

    def _special_token_id(self, role: str) -> int:
        name = json.loads(self.settings).get(role)
        name = name["content"] if isinstance(name, dict) else name
        token = self._library.token_to_id(name) if name else None
        if token is None:
            raise UserError(f"{SETTINGS} must name a {role} that is in the vocabulary, not {name!r}")
        return token

    def encode(self, text: str) -> list[int]:
        return self._library.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False).ids

    @cached_property
    def _spelling(self) -> list[bytes]:
        decoder = json.dumps(json.loads(self.json).get("decoder"))
        byte_level = '"ByteLevel"' in decoder
        if not byte_level and '"ByteFallback"' not in decoder:
            raise UserError(
                "only byte-level BPE and BPE with byte fallback are supported, the kinds of the Llama models"
            )
        added = self._library.get_added_tokens_decoder()
        ids = self._library.get_vocab(with_added_tokens=True)
        spelling = [b""] * (max(ids.values()) + 1)
        for text, token in ids.items():
            if token in added:
                spelling[token] = b"" if added[token].special else text.encode()
            elif byte_level:
                spelling[token] = bytes(BYTE_OF[character] for character in text)
            elif len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
                spelling[token] = bytes([int(text[3:5], 16)])
            else:
                spelling[token] = text.replace(SPACE, " ").encode()
        return spelling
