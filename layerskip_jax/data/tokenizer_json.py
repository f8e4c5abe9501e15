"""Tokenizers in Hugging Face's ``tokenizer.json``, read by the ``tokenizers`` library (extra ``huggingface``)."""

import codecs
import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from etils import epath

from layerskip_jax.data.tokenizer import SPACE, Tokenizer, valid_text
from layerskip_jax.data.tokenizer_settings import SETTINGS, TokenizerSettings, token_text
from layerskip_jax.errors import UserError

PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_OF = {chr(byte): byte for byte in PRINTABLE} | {
    chr(256 + n): byte for n, byte in enumerate(byte for byte in range(256) if byte not in PRINTABLE)
}
"""The alphabet of byte-level BPE (GPT-2): printable Latin-1 bytes keep their character, the others use U+0100 on."""

LARGEST = 1 << 24
"""Token ids of a stranger's file are below this, so that the list of all tokens fits into memory."""

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The roles whose tokens transformers adds to the vocabulary if they are not in it."""


@dataclass(frozen=True)
class JsonTokenizer(Tokenizer):
    """A ``tokenizer.json`` with the files next to it; ``tokenizer_config.json`` names BOS and EOS.

    Token ids are those of transformers: special tokens written out in a text are encoded as such, and the
    post-processor adds BOS, unless ``add_bos_token`` says otherwise. Truncation, padding and BPE dropout, which the
    file may store, are off.
    """

    json: bytes = field(repr=False)
    settings: TokenizerSettings = field(repr=False, default=TokenizerSettings())

    @classmethod
    def read(cls, file: epath.Path) -> "JsonTokenizer":
        """Read the files; raises `UserError` if EOS is missing, or for a tokenizer that cannot be decoded to bytes."""
        tokenizer = cls(file.read_bytes(), TokenizerSettings.read(file.parent))
        try:
            _ = tokenizer._library, tokenizer._spelling, tokenizer.bos_id, tokenizer.eos_id, tokenizer.companions
            tokenizer.encode_prompt("a")  # a post-processor with unknown tokens fails only here
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
        except BaseException as error:  # the library raises plain Exception, and a panic of Rust is not even that
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise UserError(f"{file} (data.tokenizer) is not a tokenizer.json: {error}") from error
        return tokenizer

    @cached_property
    def _library(self) -> Any:
        try:
            import tokenizers
        except ImportError:
            raise UserError("a tokenizer.json needs tokenizers: pip install 'layerskip-jax[huggingface]'") from None
        library = tokenizers.Tokenizer.from_buffer(self.json.removeprefix(codecs.BOM_UTF8))
        library.no_truncation()
        library.no_padding()
        if getattr(library.model, "dropout", None):
            library.model.dropout = None
        library.encode_special_tokens = bool(self.settings.flag("split_special_tokens"))
        self._add_tokens(library, tokenizers.AddedToken)
        self._set_post_processor(library, tokenizers.processors.TemplateProcessing)
        return library

    def _add_tokens(self, library: Any, make: Any) -> None:
        """Add the tokens of the settings, in the order of transformers, so that new ones get the same ids."""
        values, roles = self.settings.values, self.settings.roles
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        listed = {
            token["content"]: make(token["content"], **{flag: token[flag] for flag in flags if flag in token})
            for token in self.settings.added_tokens
        }
        library.add_tokens(list(listed.values()))
        more = values.get("extra_special_tokens") or values.get("additional_special_tokens") or []
        names = [roles[role] for role in dict.fromkeys([*NAMED, *roles]) if role in roles]
        names += [token_text(value) for value in (more.values() if isinstance(more, dict) else more)]
        known = {token.content for token in library.get_added_tokens_decoder().values()}  # these keep their flags
        new = {name: make(name, special=True, normalized=False) for name in names if name not in known}
        library.add_special_tokens([(listed | new)[name] for name in names if name in listed or name in new])

    def _set_post_processor(self, library: Any, make: Any) -> None:
        """Replace the post-processor if ``add_bos_token`` or ``add_eos_token`` is given: a flag says what is added.

        Without its flag, BOS or EOS is added if the old post-processor added it.
        """
        flags = {role: self.settings.flag(f"add_{role}_token") for role in ("bos", "eos")}
        if all(flag is None for flag in flags.values()):
            return
        roles, added = self.settings.roles, library.encode("").ids
        ids = {name: library.token_to_id(name) for name in roles.values()}

        def part(role: str) -> list[str]:
            name, flag = roles.get(f"{role}_token"), flags[role]
            adds = name and (ids[name] in added if flag is None else flag)
            return [f"{name}:0"] if adds else []

        library.post_processor = make(single=[*part("bos"), "$A:0", *part("eos")], special_tokens=list(ids.items()))

    def __getstate__(self) -> dict[str, Any]:
        return {"json": self.json, "settings": self.settings}

    @property
    def files(self) -> dict[str, bytes]:
        settings = self.settings.contents.get(SETTINGS)
        return {"tokenizer.json": self.json} | ({} if settings is None else {SETTINGS: settings})

    @property
    def vocab_size(self) -> int:
        return len(self._spelling)

    @cached_property
    def bos_id(self) -> int | None:
        return self._library.token_to_id(self.settings.roles.get("bos_token", ""))

    @cached_property
    def eos_id(self) -> int:
        token = self._library.token_to_id(self.settings.roles.get("eos_token", ""))
        if token is None and not self.settings.end_ids:
            if SETTINGS not in self.settings.contents:
                raise UserError(f"it needs its {SETTINGS} in the same folder: that file names BOS and EOS")
            raise UserError(f"{SETTINGS} must name an eos_token, and generation_config.json has no eos_token_id")
        return self.settings.end_ids[0] if token is None else token

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        added = self._library.get_added_tokens_decoder()
        return {token.content: number for number, token in added.items() if token.special}

    def encode(self, text: str) -> list[int]:
        return self._library.encode(valid_text(text), add_special_tokens=False).ids

    def encode_continuation(self, text: str) -> list[int]:
        return self._inner.encode(valid_text(text), add_special_tokens=False).ids

    @cached_property
    def _inner(self) -> Any:
        """The library's tokenizer, without the space that it adds in front of a text."""

        def without_prefix(part: Any) -> Any:
            if isinstance(part, list):
                return [without_prefix(inner) for inner in part]
            if not isinstance(part, dict):
                return part
            if part.get("type") == "Prepend":
                return {"type": "Sequence", "normalizers": []}
            changes: dict[str, Any] = {
                "Metaspace": {"prepend_scheme": "never"},
                "ByteLevel": {"add_prefix_space": False},
            }
            return {name: without_prefix(inner) for name, inner in part.items()} | changes.get(part.get("type", ""), {})

        file = json.loads(self.json)
        changed = file | {name: without_prefix(file.get(name)) for name in ("normalizer", "pre_tokenizer")}
        return self._library if changed == file else replace(self, json=json.dumps(changed).encode())._library

    def _encode_with_special_tokens(self, text: str) -> list[int]:
        return self._library.encode(valid_text(text)).ids

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
        largest = max(ids.values())
        if largest >= LARGEST:
            raise UserError(f"the token id {largest} is too large: at most {LARGEST:,} tokens are supported")
        spelling = [b""] * (largest + 1)
        for text, token in ids.items():
            if token in added:
                spelling[token] = b"" if added[token].special else text.encode()
            elif byte_level:
                in_alphabet = all(character in BYTE_OF for character in text)
                spelling[token] = bytes(BYTE_OF[character] for character in text) if in_alphabet else text.encode()
            elif len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
                spelling[token] = bytes([int(text[3:5], 16)])
            else:
                spelling[token] = text.replace(SPACE, " ").encode()
        return spelling
