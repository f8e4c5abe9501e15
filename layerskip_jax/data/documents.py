"""Types of documents and of their sources."""

import bisect
import hashlib
import itertools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from layerskip_jax.errors import UserError

Document = str | np.ndarray
"""A text, or (source ``tokens``) its token ids as int32. With ``data.prompt_key`` every text is a `Pair`."""

VALIDATION_PERCENT = 5
"""The part of a corpus without own splits that is held out. Documents are chosen by the SHA-256 of their names."""

READERS = 32
"""Documents that `read_sample` reads, and holds in memory, at the same time."""


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


class MixedDocuments:
    """The documents of ``data.mixture``: those of the first component, then those of the next, and so on.

    ``shares`` are the shares of the rows that the components are to fill.
    """

    def __init__(self, parts: dict[str, Documents], shares: dict[str, float]):
        self.parts, self.shares = parts, shares
        self._ends = list(itertools.accumulate(len(part) for part in parts.values()))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Document:
        number = bisect.bisect_right(self._ends, index)
        return list(self.parts.values())[number][index - (self._ends[number - 1] if number else 0)]


def components_of(documents: Documents) -> dict[str, Documents]:
    """Return the documents of every component by its name in ``data.mixture``, or all as ``""``."""
    return documents.parts if isinstance(documents, MixedDocuments) else {"": documents}


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


SAMPLE = 256
"""`documents_digest` reads at most this many documents."""


def documents_digest(documents: Documents) -> str:
    """Return a digest of a split: of the number of documents, of their sizes if the source knows them, and of a
    `read_sample`.
    """
    digest = hashlib.sha256(
        f"{len(documents)} ".encode() + np.array(getattr(documents, "sizes", []), np.int64).tobytes()
    )
    for document in read_sample(documents, SAMPLE):
        prompt = len(document.prompt) if isinstance(document, Pair) else ""
        content = document.encode(errors="surrogatepass") if isinstance(document, str) else document.tobytes()
        digest.update(f"{type(document).__name__} {prompt} {len(content)} ".encode() + content)
    return digest.hexdigest()


def read_sample(documents: Documents, most: int) -> Iterator[Document]:
    """Yield up to ``most`` documents, spread evenly over a split, with the first and the last.

    `READERS` threads read them, because a request to a bucket takes about 50 ms.
    """
    count = len(documents)
    indices = [round(index) for index in np.linspace(0, count - 1, min(count, most))]
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(indices), READERS):
            yield from pool.map(documents.__getitem__, indices[start : start + READERS])
