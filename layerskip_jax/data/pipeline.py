"""Packed batches through grain: shuffle, shard, tokenise, pack with document boundaries, batch.

B rows, T predicted tokens a row. Prompts and their responses (data.prompt_key) are packed whole, and the loss is on
responses alone. The position of an iterator is saved and restored exactly (``get_state``).
"""

from typing import Any

import grain
import numpy as np
from absl import flags

from layerskip_jax.config import Config
from layerskip_jax.data.sources import Document, Pair, open_documents
from layerskip_jax.data.tokenizer import Tokenizer
from layerskip_jax.errors import UserError

PACKING_BINS = 32
"""Rows that are filled at the same time with prompts and responses, each put into the first one that has room."""


def make_batches(
    config: Config,
    split: str,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    epochs: int | None = None,
    shuffle: bool = True,
    seed: int = 0,
) -> grain.IterDataset:
    """Return an iterable of ``{"inputs_BT", "targets_BT", "segments_BT", "mask_BT"}``, B = ``batch_size`` rows.

    Shuffled (training): each process reads its own share of the documents, in an order of its own for every epoch,
    and packed rows are shuffled again within ``data.shuffle_window``. In order (evaluation): every process packs all
    documents and keeps its rows of each global batch, so that all see equally many; the last batch is filled up with
    rows that do not count. ``epochs=None`` goes on forever.

    ``segments_BT`` numbers the documents of a row from 1 (0 is padding). ``mask_BT`` is 1.0 where ``targets_BT``, the
    next token, belongs to the same document as its input (and, with prompts, to a response or its EOS).
    """
    documents = open_documents(config.data, split)
    if shuffle and len(documents) < process_count:
        raise UserError(f"the {split!r} split has {len(documents)} documents for {process_count} processes: too few")
    tokenizer = Tokenizer.load(config.data.tokenizer)
    dataset = grain.MapDataset.source(documents)
    if shuffle:
        dataset = dataset[process_index::process_count].shuffle(seed=seed + process_index)
    length = config.data.sequence_length + 1
    tokenise = _TokenisePair(tokenizer, length) if config.data.prompt_key else _Tokenise(tokenizer)
    dataset = dataset.repeat(epochs).map(tokenise)
    # No read-ahead threads by default: they would compete with the compiler's on a small machine, and workers exist.
    rows = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0 if config.data.workers == 0 else 4))
    if config.data.prompt_key:  # a response cut from its prompt would teach nothing
        lengths = {"tokens": length, "counts": length}
        rows = grain.experimental.FirstFitPackIterDataset(rows, length_struct=lengths, num_packing_bins=PACKING_BINS)
    else:
        rows = grain.experimental.ConcatThenSplitIterDataset(rows, length_struct={"tokens": length})
    rows = rows.map(_ToRow(config.data.cross_document_attention))
    if shuffle:
        rows = grain.experimental.WindowShuffleIterDataset(rows, window_size=config.data.shuffle_window, seed=seed)
        batches = rows.batch(batch_size, drop_remainder=True)
    else:
        batches = rows.batch(batch_size * process_count, drop_remainder=False)
        batches = batches.map(_OwnRows(batch_size, process_index, process_count))
    if config.data.workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS(["layerskip_jax"])  # grain's worker processes read absl's flags
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.data.workers))
    return batches


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
        prompt = [self._tokenizer.bos_id, *self._tokenizer.encode(document.prompt)]
        response = [*self._tokenizer.encode(document.response), self._tokenizer.eos_id]
        counts = np.repeat(np.array([0, 1], np.int32), [len(prompt), len(response)])
        tokens = np.array(prompt + response, np.int32)
        return {"tokens": tokens[: self._length], "counts": counts[: self._length]}


def document_tokens(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Return the int32 tokens of one training document: BOS, the text, EOS."""
    return np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id], np.int32)


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
    """This process's rows of a global batch, filled up with rows of zeros where the last batch is short."""

    def __init__(self, batch_size: int, process_index: int, process_count: int):
        self._first, self._size, self._whole = process_index * batch_size, batch_size, batch_size * process_count

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        def own(rows: np.ndarray) -> np.ndarray:
            filled = np.pad(rows, ((0, self._whole - len(rows)), (0, 0)))
            return filled[self._first : self._first + self._size]

        return {name: own(rows) for name, rows in batch.items()}
