"""The position of a data iterator as bytes, and back, exactly."""

import json
from typing import Any

import grain


class Position:
    """What a checkpoint saves of a grain iterator, in the interface that grain's orbax handler asks for.

    grain 0.2.18 writes positions as JSON, which turns tuples into lists, and then `ConcatThenSplitIterDataset` no
    longer recognises its own mark for "no remainder" in a restored position: it goes on with other rows. Here the
    tuples come back as tuples.
    """

    def __init__(self, iterator: grain.DatasetIterator):
        self._iterator = iterator

    def get_state(self) -> bytes:
        return json.dumps(self._iterator.get_state()).encode()

    def set_state(self, state: bytes) -> None:
        self._iterator.set_state(_with_tuples(json.loads(state)))

    def start_prefetch(self) -> None:
        """Nothing to do: the pipeline starts when it is asked for a batch."""


def _with_tuples(state: Any) -> Any:
    if not isinstance(state, dict):
        return state
    return {
        key: {name: tuple(part) for name, part in value.items()} if key == "remainder_slices" else _with_tuples(value)
        for key, value in state.items()
    }
