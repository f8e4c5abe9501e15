"""Data positions: where to resume the documents of each row of the batch, with any number of processes."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
from etils import epath

from layerskip_jax.data.corpus import Corpus, ResumeFrom
from layerskip_jax.data.mixing import CHOICES, row_streams

NEXT_DOCUMENT = "next_index"
"""grain's key, somewhere inside the state of a row, for the number of documents that the row has read."""


class DataPosition:
    """The position of a shuffled iterator of `make_batches` that yields ``rows`` of each batch.

    grain's orbax handler calls `get_state` and writes one file for each process.

    grain 0.2.18 stores positions as JSON, which turns tuples into lists. `ConcatThenSplitIterDataset` compares its
    marker for "no remainder" with a tuple, so a restored iterator would yield other rows. `set_state` restores the
    tuples. We found no upstream issue about it.

    ``corpus`` identifies the documents that the position counts.
    """

    def __init__(self, iterator: grain.DatasetIterator, rows: Sequence[int], corpus: Corpus | None = None):
        self._iterator, self._rows, self.corpus = iterator, rows, corpus

    def get_state(self) -> bytes:
        """Return the positions of this process's rows and the corpus as JSON, with their SHA-256."""
        row_states = _row_states(self._iterator.get_state())
        text = json.dumps({str(row): state for row, state in zip(self._rows, row_states, strict=True)})
        corpus = json.dumps(self.corpus._asdict()) if self.corpus else ""  # the inner tuples become lists
        return json.dumps({"sha256": _sha256(text + corpus), "rows": text, "corpus": corpus}).encode()

    def set_state(
        self, states: dict[int, Any], batch_size: int, resumed: Mapping[str, tuple[str, ResumeFrom]] | None = None
    ) -> None:
        """Resume from the positions that `read_positions` returned.

        ``resumed`` maps each component of this run (``""`` without a mixture) to the stored component that it
        continues, and to a `ResumeFrom`. A component without an entry, or with ``"first document"``, starts at its
        first document. Without ``resumed``, each component continues the stored component of its name.

        With ``"same rows"`` and the same batch size, every row continues where it stopped. Otherwise every row starts
        after the last document that any stored row has begun to read, in the shuffled order of the corpus. Documents
        that slower rows had not reached are skipped. Others are read again: grain stores the state of a row as it was
        at the start of its shuffle window (or group of packing bins), so the count misses the documents read since.
        """
        saved, iterator_state = {row: row_streams(state) for row, state in states.items()}, self._iterator.get_state()
        own = [row_streams(state) for state in _row_states(iterator_state)]
        for name in own[0]:
            old, resume_from = name, "same rows"
            if resumed is not None and name != CHOICES:
                old, resume_from = resumed.get(name, ("", "first document"))
            if resume_from == "first document" or old not in saved[0]:
                continue
            # Add 1, because a row may have yielded a part of its next document.
            first = max(row + len(saved) * (_documents_read(streams[old]) + 1) for row, streams in saved.items())
            for row, streams in zip(self._rows, own, strict=True):
                # Row r reads documents r, r + B, r + 2 B, ..., with the new batch size B. The number of them before
                # `first` is (first - r) / B, rounded up.
                same_rows = resume_from == "same rows" and len(saved) == batch_size
                skipped = -((row - first) // batch_size)
                new = saved[row][old] if same_rows else _skip_documents(streams[name], skipped)
                streams[name].clear()
                streams[name].update(_restore_tuples(new))
        self._iterator.set_state(iterator_state)


def read_positions(folder: epath.Path) -> dict[int, Any]:
    """Return the position of every row that any process saved in ``folder``; `ValueError` if a file is damaged."""
    states: dict[int, Any] = {}
    for file in _position_files(folder):
        saved = json.loads(file.read_text())
        if not isinstance(saved, dict) or saved.get("sha256") != _sha256(
            f"{saved.get('rows')}{saved.get('corpus', '')}"
        ):
            raise ValueError(f"{file} does not hold what was written to it")
        states |= {int(row): state for row, state in json.loads(saved["rows"]).items()}
    if sorted(states) != list(range(len(states))) or not states:
        raise ValueError(f"{folder} does not hold the positions of all processes")
    return states


def read_corpus(folder: epath.Path) -> Corpus | None:
    """Return what the positions in ``folder`` count, or None if the checkpoint is older than `Corpus`."""
    text = json.loads(_position_files(folder)[0].read_text()).get("corpus")
    saved = json.loads(text) if text else None
    if not saved:
        return None
    components = {name: Corpus(*part[:3]) for name, part in saved.get("components", {}).items()}
    return Corpus(str(saved["training"]), str(saved["held_out"]), int(saved["sequences"]), components)


def _position_files(folder: epath.Path) -> list[epath.Path]:
    # `glob` would read brackets in the name of a parent folder as a pattern.
    return sorted(file for file in folder.iterdir() if re.fullmatch(r"process_\d+-of-\d+\.json", file.name))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _row_states(state: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the parts of a grain state that belong to single rows, in order, with any number of worker processes."""

    def find(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
        inner = state.get("parents") or state.get("iterators_in_use_states")
        if inner is None:
            yield state
        else:
            for part in inner:
                yield from find(part)

    return list(find(state))


def _documents_read(state: Any) -> int:
    if not isinstance(state, dict):
        return 0
    return state[NEXT_DOCUMENT] if NEXT_DOCUMENT in state else max(map(_documents_read, state.values()))


def _skip_documents(state: Any, count: int) -> Any:
    """Return the initial ``state`` of a row, changed so that the row starts after ``count`` documents."""
    if not isinstance(state, dict):
        return state
    return {key: count if key == NEXT_DOCUMENT else _skip_documents(value, count) for key, value in state.items()}


def _restore_tuples(state: Any) -> Any:
    if not isinstance(state, dict):
        return state
    return {
        key: {name: tuple(part) for name, part in value.items()}
        if key == "remainder_slices"
        else _restore_tuples(value)
        for key, value in state.items()
    }
