"""Types of documents and of their sources."""

import hashlib
import math
from typing import Any, Protocol

import numpy as np

from layerskip_jax.errors import UserError

Document = str | np.ndarray
"""A text, or (source ``tokens``) its token ids as int32. With ``data.prompt_key`` every text is a `Pair`."""

VALIDATION_PERCENT = 5
"""The part of a corpus without own splits that is held out. Documents are chosen by the SHA-256 of their names."""


class Pair(str):
    """A prompt followed by its response, as one text. Only the response has a loss."""

    prompt: str
    response: str

    def __new__(cls, prompt: str, response: str) -> "Pair":
        pair = super().__new__(cls, prompt + response)
        pair.prompt, pair.response = prompt, response
        return pair

    def __reduce__(self) -> tuple[type["Pair"], tuple[str, str]]:
        return Pair, (self.prompt, self.response)


class Documents(Protocol):
    """Random access to the documents of one split."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Document: ...


def as_text(value: Any, where: str) -> str:
    """Return the text of a field: of a string, UTF-8 bytes or a number.

    Raises `UserError`, which names the field as ``where``, for null, true or false, a list and any other value: its
    Python spelling would be taken for text.
    """
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    is_number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not isinstance(value, str) and not (is_number and math.isfinite(value)):
        raise UserError(f"{where} must be text, not {'null' if value is None else f'{value!r:.40}'}")
    return str(value)


def documents_digest(documents: Documents, sample: int = 256) -> str:
    """Return a digest of a split: of the number of documents, of their sizes if the source knows them, and of a sample.

    The sample is spread evenly and includes the first document and the last.
    """
    digest = hashlib.sha256(
        f"{len(documents)} ".encode() + np.array(getattr(documents, "sizes", []), np.int64).tobytes()
    )
    for index in spread(len(documents), sample):
        document = documents[index]
        prompt = len(document.prompt) if isinstance(document, Pair) else ""
        content = document.encode(errors="surrogatepass") if isinstance(document, str) else document.tobytes()
        digest.update(f"{type(document).__name__} {prompt} {len(content)} ".encode() + content)
    return digest.hexdigest()


def spread(count: int, most: int) -> list[int]:
    """Return up to ``most`` of the indices below ``count``, spread evenly, with the first and the last."""
    return sorted({round(index) for index in np.linspace(0, count - 1, min(count, most))})
