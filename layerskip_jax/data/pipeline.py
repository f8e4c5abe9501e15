"""Packed batches through grain: shuffle, share out, tokenise, pack with document boundaries, batch.

B rows, T predicted tokens a row. Which documents make row r of batch b depends on the seed and on B, and on nothing
else: any number of processes makes the same batches, and each reads the documents of its own rows only. Prompts and
their responses (data.prompt_key) are packed whole, and the loss is on responses alone.
"""

import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from layerskip_jax.config import Config
from layerskip_jax.data.batch import Batch
from layerskip_jax.data.documents import Document, Pair
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.data.sources import open_documents
from layerskip_jax.data.tokenizer import Tokenizer
from layerskip_jax.distributed import own_rows
from layerskip_jax.sharding import batch_sharding

PACKING_BINS = 32
"""Rows that are filled at the same time with prompts and responses, each put into the first one that has room."""


def make_batches(
    config: Config,
    split: str,
    *,
    batch_size: int,
    rows: Sequence[int] | None = None,
    epochs: int | None = None,
    shuffle: bool = True,
    seed: int = 0,
) -> grain.IterDataset:
    """Return an iterable of ``{"inputs_BT", "targets_BT", "segments_BT", "mask_BT"}``, B = ``batch_size`` rows.

    Of every batch it makes the given ``rows`` alone (all of them by default): those of one process of several.

    Shuffled (training): the documents, in an order of its own for every epoch, are dealt out to the B rows in turn,
    and every row packs its own; packed rows are shuffled again within ``data.shuffle_window``. In order (evaluation):
    every process packs all documents and keeps its rows of each batch, so that all see equally many; the last batch is
    filled up with rows that do not count. ``epochs=None`` goes on forever.

    ``segments_BT`` numbers the documents of a row from 1 (0 is padding). ``mask_BT`` is 1.0 where ``targets_BT``, the
    next token, belongs to the same document as its input (and, with prompts, to a response or its EOS).
    `layerskip_jax.data.position` saves where an iterator is.
    """
    rows = range(batch_size) if rows is None else rows
    tokenizer = load_tokenizer(config.data.tokenizer)
    length = config.data.sequence_length + 1
    tokenise = _TokenisePair(tokenizer, length) if config.data.prompt_key else _Tokenise(tokenizer)
    documents = grain.MapDataset.source(open_documents(config.data, split))
    if not shuffle:
        packed = _packed(config, documents.repeat(epochs).map(tokenise))
        batches = packed.batch(batch_size, drop_remainder=False).map(_OwnRows(rows, batch_size))
        return _in_a_process(batches) if config.data.workers else batches
    tokens = documents.shuffle(seed=seed).repeat(epochs).map(tokenise)
    window = config.data.shuffle_window // batch_size
    streams = []
    for row in rows:
        stream = _packed(config, tokens[row::batch_size])
        if window > 1:
            shuffled = stream.batch(window, drop_remainder=False).random_map(_shuffle, seed=seed)
            stream = grain.experimental.FlatMapIterDataset(shuffled, _Rows(max_fan_out=window))
        streams.append(stream)
    workers = min(config.data.workers, len(streams))
    if not workers:
        return grain.experimental.ZipIterDataset(streams).map(_stack)
    parts = np.array_split(np.arange(len(streams)), workers)
    zipped = [_in_a_process(grain.experimental.ZipIterDataset([streams[i] for i in part])) for part in parts]
    return grain.experimental.ZipIterDataset(zipped).map(_flatten).map(_stack)


def _packed(config: Config, documents: grain.MapDataset) -> grain.IterDataset:
    """Return the packed rows of ``{"tokens"}`` documents, one after the other."""
    # No read-ahead threads by default: they would compete with the compiler's on a small machine, and workers exist.
    threads = grain.ReadOptions(num_threads=1 if config.data.workers else 0, prefetch_buffer_size=4)
    tokens, length = documents.to_iter_dataset(threads), config.data.sequence_length + 1
    if config.data.prompt_key:  # a response cut from its prompt would teach nothing
        lengths = {"tokens": length, "counts": length}
        rows = grain.experimental.FirstFitPackIterDataset(tokens, length_struct=lengths, num_packing_bins=PACKING_BINS)
    else:
        rows = grain.experimental.ConcatThenSplitIterDataset(tokens, length_struct={"tokens": length})
    return rows.map(_ToRow(config.data.cross_document_attention))


def _in_a_process(dataset: grain.IterDataset) -> grain.IterDataset:
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["layerskip_jax"])  # grain's worker processes read absl's flags
    return dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=1), _serve_to_the_end)


def _serve_to_the_end(worker: int, workers: int) -> None:
    """Leave signals to the training process, which wants batches until it ends; end with it, however it ends."""
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C, Slurm and systemd send them to all processes
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


# grain's own WindowShuffleIterDataset is slow at small windows: 5 ms a row at 4 rows.
def _shuffle(window: dict[str, np.ndarray], generator: np.random.Generator) -> dict[str, np.ndarray]:
    order = generator.permutation(len(window["mask_BT"]))
    return {name: array[order] for name, array in window.items()}


def local_batches(config: Config, split: str, mesh: Mesh, epochs: int | None = None) -> grain.IterDataset:
    """Return this process's rows of the batches: forever and shuffled, or ``epochs`` passes in order."""
    size = config.train.batch_size
    return make_batches(
        config,
        split,
        batch_size=size,
        rows=own_rows(batch_sharding(mesh), size),
        epochs=epochs,
        shuffle=epochs is None,
        seed=config.train.seed,
    )


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> Batch:
    """Lay a batch out over the mesh, each process giving its own rows."""
    lay = partial(jax.make_array_from_process_local_data, batch_sharding(mesh))
    return Batch(*(lay(batch[name]) for name in Batch._fields))


@dataclasses.dataclass(frozen=True)
class _Rows(grain.experimental.FlatMapTransform):
    """A window of rows to its rows."""

    max_fan_out: int

    def flat_map(self, window: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
        return [dict(zip(window, row, strict=True)) for row in zip(*window.values(), strict=True)]


def _flatten(parts: Sequence[Sequence[Any]]) -> list[Any]:
    return [row for part in parts for row in part]


def _stack(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


class _Tokenise:
    """A document to its tokens between BOS and EOS."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def __call__(self, document: Document) -> dict[str, np.ndarray]:
        if isinstance(document, np.ndarray):
            return {"tokens": document}
        return {"tokens": document_tokens(self._tokenizer, document)}


class _TokenisePair:
    """A prompt and its response to their tokens, ``length`` at most, and which of them count: the response and EOS."""

    def __init__(self, tokenizer: Tokenizer, length: int):
        self._tokenizer, self._length = tokenizer, length

    def __call__(self, document: Document) -> dict[str, np.ndarray]:
        assert isinstance(document, Pair)
        # Apart, as in generation, where the prompt is all there is.
        prompt = self._tokenizer.encode_prompt(document.prompt)
        response = [*self._tokenizer.encode(document.response), self._tokenizer.eos_id]
        counts = np.repeat(np.array([0, 1], np.int32), [len(prompt), len(response)])
        tokens = np.array(prompt + response, np.int32)
        return {"tokens": tokens[: self._length], "counts": counts[: self._length]}


def document_tokens(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Return the int32 tokens of one training document: BOS, the text, EOS."""
    return np.array([*tokenizer.encode_prompt(text), tokenizer.eos_id], np.int32)


class _ToRow:
    """A packed run of T+1 tokens to the inputs and targets of T predictions."""

    def __init__(self, cross_documents: bool):
        self._cross_documents = cross_documents

    def __call__(self, packed: dict[str, Any]) -> dict[str, np.ndarray]:
        tokens, segments = packed["tokens"], packed["tokens_segment_ids"]
        counts = segments[1:] > 0
        if self._cross_documents:
            segments = (segments > 0).astype(np.int32)
        else:
            counts = counts & (segments[1:] == segments[:-1])
        if "counts" in packed:
            counts = counts & (packed["counts"][1:] > 0)
        return {
            "inputs_BT": tokens[:-1],
            "targets_BT": tokens[1:],
            "segments_BT": segments[:-1],
            "mask_BT": counts.astype(np.float32),
        }


class _OwnRows:
    """This process's rows of a batch, filled up with rows of zeros where the last batch is short."""

    def __init__(self, rows: Sequence[int], batch_size: int):
        self._rows, self._batch_size = list(rows), batch_size

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        def own(rows: np.ndarray) -> np.ndarray:
            return np.pad(rows, ((0, self._batch_size - len(rows)), (0, 0)))[self._rows]

        return {name: own(rows) for name, rows in batch.items()}
