"""Documents: what a source yields, and how it is read."""

import hashlib
from typing import Protocol

import numpy as np

Document = str | np.ndarray
"""A text (a `Pair`, where prompts have a field), or from the source ``tokens`` its token ids (int32)."""


class Pair(str):
    """A prompt and its response, as one text (data.prompt_key); only the response has a loss."""

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


def digest_of(documents: Documents) -> str:
    """Return a digest of how many documents there are, and of the first and the last."""
    digest = hashlib.sha256(str(len(documents)).encode())
    for document in (documents[0], documents[len(documents) - 1]):
        digest.update(document.encode(errors="surrogatepass") if isinstance(document, str) else document.tobytes())
    return digest.hexdigest()
