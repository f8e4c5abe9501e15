"""Tokenizer files of an exported model; a SentencePiece model is converted to a ``tokenizer.json``."""

import json
from typing import Any

from layerskip_jax.data.sentencepiece_tokenizer import SentencePiece, parse_model
from layerskip_jax.data.tokenizer import SPACE, Tokenizer
from layerskip_jax.data.tokenizer_settings import SETTINGS
from layerskip_jax.errors import UserError


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Return names and contents of the files; raises `UserError` for a SentencePiece model that is not plain BPE.

    A SentencePiece model is exported together with a ``tokenizer.json`` that encodes in the same way, because
    transformers would read the model itself with the settings of Llama's tokenizer.
    """
    if not isinstance(tokenizer, SentencePiece):
        return tokenizer.files
    model = parse_model(tokenizer.model)
    roles = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "unk_token": model.trainer_spec.unk_id}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{role: None if token is None else model.pieces[token].piece for role, token in roles.items()},
        "clean_up_tokenization_spaces": False,
    }
    if "chat_template" in tokenizer.settings.values:
        settings["chat_template"] = tokenizer.settings.values["chat_template"]
    text = json.dumps(_tokenizer_json(tokenizer, model), ensure_ascii=False)
    return tokenizer.files | {"tokenizer.json": text.encode(), SETTINGS: json.dumps(settings, indent=1).encode()}


def _tokenizer_json(tokenizer: SentencePiece, model: Any) -> dict[str, Any]:
    kind, trained, text = model.SentencePiece, model.trainer_spec, model.normalizer_spec
    control = [token for token, piece in enumerate(model.pieces) if piece.type in (kind.CONTROL, kind.UNKNOWN)]
    normal = {piece.piece: token for token, piece in enumerate(model.pieces) if piece.type == kind.NORMAL}
    byte_pieces = [piece for piece in model.pieces if piece.type == kind.BYTE]
    plain = trained.model_type == trained.BPE and not text.precompiled_charsmap and not text.remove_extra_whitespaces
    if not plain or len(control) + len(normal) + len(byte_pieces) != len(model.pieces):
        raise UserError(
            "this SentencePiece model cannot be written as a tokenizer.json: it must be BPE without normalization and "
            "without user-defined pieces, as layerskip data tokenizer trains it"
        )
    spaces: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if text.add_dummy_prefix:
        spaces = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, spaces]}
        back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    added = tokenizer.encode_prompt("")
    names = [model.pieces[token].piece for token in added]
    special = [{"SpecialToken": {"id": name, "type_id": 0}} for name in names]
    begins = int(added[:1] == [tokenizer.bos_id])
    begin, end = special[:begins], special[begins:]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token, "content": model.pieces[token].piece, **flags} for token in control],
        "normalizer": spaces,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*begin, first, *end],
            "pair": [*begin, first, *end, *begin, second, *end],
            "special_tokens": {
                name: {"id": name, "ids": [token], "tokens": [name]} for name, token in zip(names, added, strict=True)
            },
        },
        "decoder": {"type": "Sequence", "decoders": back},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.pieces[trained.unk_id].piece,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": bool(byte_pieces),
            "vocab": {piece.piece: token for token, piece in enumerate(model.pieces)},
            "merges": _merges(normal, [piece.score for piece in model.pieces]),
        },
    }


def _merges(normal: dict[str, int], scores: list[float]) -> list[list[str]]:
    """Return all pairs of pieces that merge into a piece, by the score of that piece, as SentencePiece merges them."""
    merges: list[list[str]] = []
    for piece in sorted(normal, key=lambda piece: -scores[normal[piece]]):
        halves = [[piece[:cut], piece[cut:]] for cut in range(1, len(piece))]
        merges += [half for half in halves if half[0] in normal and half[1] in normal]
    return merges
