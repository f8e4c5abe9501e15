"""Mix packed rows of several corpora: the component of every row of every batch, and the stream of one row."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

Row = dict[str, np.ndarray]

CHOICES = "choices"
"""Key of the stream that chooses components, next to the components' own streams, in the state of a mixed row."""


def choose_components(shares: Sequence[float], batch_size: int, row: int, seed: int) -> grain.MapDataset:
    """Return the number of the component of ``row`` in each batch.

    grain spreads the components evenly over the rows of all batches: after 1,000 rows, their shares are within 1 % of
    the weights (grain rounds weights down to a hundredth of the smallest). The rows of a batch are then rotated at
    random. Otherwise a row could get the same component in every batch, and would never read its documents of the
    others.
    """
    mixed = grain.MapDataset.mix([grain.MapDataset.source([i]).repeat() for i in range(len(shares))], shares)
    return grain.MapDataset.range(sys.maxsize).map(_ComponentOfRow(mixed, batch_size, row, seed))


class _ComponentOfRow:
    # grain's WindowShuffleMapDataset takes 16 ms to shuffle one row of a batch of 4.
    def __init__(self, mixed: grain.MapDataset, batch_size: int, row: int, seed: int):
        self._mixed, self._batch_size, self._row, self._seed = mixed, batch_size, row, seed

    def __call__(self, batch: int) -> int:
        rotation = int(np.random.default_rng((self._seed, batch)).integers(self._batch_size))
        return self._mixed[batch * self._batch_size + (self._row + rotation) % self._batch_size]


class MixRows(grain.IterDataset):
    """Takes each row from the stream of the component that ``choices`` names next."""

    def __init__(self, choices: grain.IterDataset, streams: Mapping[str, grain.IterDataset]):
        super().__init__([choices, *streams.values()])
        self._names = [CHOICES, *streams]

    def __iter__(self) -> "_MixRowsIterator":
        return _MixRowsIterator([iter(parent) for parent in self._parents], self._names)


class _MixRowsIterator(grain.DatasetIterator):
    def __init__(self, parents: Sequence[grain.DatasetIterator], names: Sequence[str]):
        super().__init__(parents)
        self._names = names

    def __next__(self) -> Row:
        return next(self._parents[1 + next(self._parents[0])])

    def get_state(self) -> dict[str, Any]:
        states = (parent.get_state() for parent in self._parents)
        return {"streams": dict(zip(self._names, states, strict=True))}

    def set_state(self, state: dict[str, Any]) -> None:
        for name, parent in zip(self._names, self._parents, strict=True):
            parent.set_state(state["streams"][name])


def row_streams(state: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return ``{stream: state}`` of a row: `CHOICES` and every component, or ``{"": state}`` without a mixture."""
    return state.get("streams", {"": state})


class ReportRepeat:
    """Prints a line when a component has been read once. Rows read every B-th document; only row 0 prints it."""

    def __init__(self, name: str, count: int, batch_size: int):
        self._name, self._count, self._batch_size = name, count, batch_size

    def __call__(self, index: int, document: Any) -> Any:
        if self._count <= index < self._count + self._batch_size and index % self._batch_size == 0:
            print(
                f"note: all {self._count:,} documents of {self._name} (data.mixture) have been read once, so they are "
                "repeated from here on",
                file=sys.stderr,
                flush=True,
            )
        return document


class Label:
    """Marks a held-out batch with the number of its component."""

    def __init__(self, number: int):
        self._number = number

    def __call__(self, batch: Row) -> Row:
        return batch | {"component": np.array(self._number)}
