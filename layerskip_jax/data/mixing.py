"""Mix packed rows of several corpora: the component of every row of every batch, and the stream of one row."""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import grain
import numpy as np

from layerskip_jax.errors import note

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
    return grain.MapDataset.range(sys.maxsize).map(partial(_component_of_row, mixed, batch_size, row, seed))


# This rotates rows itself: grain's WindowShuffleMapDataset takes 16 ms to shuffle one row of a batch of 4.
def _component_of_row(mixed: grain.MapDataset, batch_size: int, row: int, seed: int, batch: int) -> int:
    rotation = int(np.random.default_rng((seed, batch)).integers(batch_size))
    return mixed[batch * batch_size + (row + rotation) % batch_size]


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


def report_repeat(name: str, count: int, batch_size: int, index: int, document: Any) -> Any:
    """Print a line when a component has been read once. Rows read every B-th document; only row 0 prints it."""
    if count <= index < count + batch_size and index % batch_size == 0:
        note(f"all {count:,} documents of {name} (data.mixture) have been read once, so they are repeated from here on")
    return document


def label(number: int, batch: Row) -> Row:
    """Mark a held-out batch with the number of its component."""
    return batch | {"component": np.array(number)}
