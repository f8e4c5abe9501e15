"""Mix packed rows of several corpora: the component of every row of every batch, and the stream of one row."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

Row = dict[str, np.ndarray]

CHOICES = "choices"
"""The stream of components, beside those of rows, in the state of a mixed row."""


def choose_components(shares: Sequence[float], batch_size: int, seed: int) -> grain.MapDataset:
    """Return the component of every row: element ``b * batch_size + r`` is that of row r of batch b.

    grain spreads the components evenly over the rows: after n rows, each has filled its share of n to within two rows
    and 1 / 200 (grain rounds weights to a hundredth of the smallest). Within a batch they are shuffled. Otherwise one
    row could always have the same component, and documents that are dealt out to the other rows would not be read.
    """
    components = [grain.MapDataset.source([number]).repeat() for number in range(len(shares))]
    mixed = grain.MapDataset.mix(components, shares)
    # grain adds the number of the batch to the seed, and takes 32 bits.
    return grain.experimental.WindowShuffleMapDataset(mixed, window_size=batch_size, seed=seed % (1 << 31))


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
    """Return the parts of the state of a row: `CHOICES` and those of its components, or itself as ``""``."""
    return state.get("streams", {"": state})


class SayRepeat:
    """Says in one line when a component has been read once. Rows read every B-th document; only row 0 says it."""

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
