"""Where training data stand, as bytes, row by row of the batch: any number of processes goes on from there."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import grain
from etils import epath


class Position:
    """The position of a shuffled iterator of `make_batches` that makes ``rows`` of each batch.

    `get_state` is the interface of grain's orbax handler: each process writes one file, with a digest of its own.

    grain 0.2.18 writes positions as JSON, which turns tuples into lists, and then `ConcatThenSplitIterDataset` no
    longer recognises its own mark for "no remainder" in a restored position: it goes on with other rows. Here the
    tuples come back as tuples.
    """

    def __init__(self, iterator: grain.DatasetIterator, rows: Sequence[int]):
        self._iterator, self._rows = iterator, rows

    def get_state(self) -> bytes:
        states = {str(row): state for row, state in zip(self._rows, _streams(self._iterator.get_state()), strict=True)}
        text = json.dumps(states)
        return json.dumps({"sha256": _sha256(text), "rows": text}).encode()

    def set_state(self, states: dict[int, Any], batch_size: int, same_rows: bool = True) -> None:
        """Go on from what `read_positions` returned.

        With another batch size than then, or not the ``same_rows`` for another reason, other documents make a row: the
        rows go on with those that come after the documents that were being read, of which some may come twice.
        """
        same_rows = same_rows and len(states) == batch_size
        first = max(row + len(states) * (_documents(state) + 1) for row, state in states.items())
        whole = self._iterator.get_state()
        for row, stream in zip(self._rows, _streams(whole), strict=True):
            new = states[row] if same_rows else _after(stream, -((row - first) // batch_size))
            stream.clear()
            stream.update(_with_tuples(new))
        self._iterator.set_state(whole)


def read_positions(folder: epath.Path) -> dict[int, Any]:
    """Return the position of every row that any process saved in ``folder``; `ValueError` if a file is damaged."""
    states: dict[int, Any] = {}
    for file in sorted(folder.glob("process_*-of-*.json")):
        saved = json.loads(file.read_text())
        if not isinstance(saved, dict) or saved.get("sha256") != _sha256(str(saved.get("rows"))):
            raise ValueError(f"{file} does not hold what was written to it")
        states |= {int(row): state for row, state in json.loads(saved["rows"]).items()}
    if sorted(states) != list(range(len(states))) or not states:
        raise ValueError(f"{folder} does not hold the positions of all processes")
    return states


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _streams(state: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the parts of a grain state that belong to single rows, in order, whatever processes work on them."""

    def find(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
        inner = state.get("parents") or state.get("iterators_in_use_states")
        if inner is None:
            yield state
        else:
            for part in inner:
                yield from find(part)

    return list(find(state))


DOCUMENTS = "next_index"
"""The key of how many documents a row has taken, somewhere in its state."""


def _documents(state: Any) -> int:
    if not isinstance(state, dict):
        return 0
    return state[DOCUMENTS] if DOCUMENTS in state else max(map(_documents, state.values()))


def _after(state: Any, documents: int) -> Any:
    """Return the state of a row at its beginning as one that has taken so many documents."""
    if not isinstance(state, dict):
        return state
    return {key: documents if key == DOCUMENTS else _after(value, documents) for key, value in state.items()}


def _with_tuples(state: Any) -> Any:
    if not isinstance(state, dict):
        return state
    return {
        key: {name: tuple(part) for name, part in value.items()} if key == "remainder_slices" else _with_tuples(value)
        for key, value in state.items()
    }
