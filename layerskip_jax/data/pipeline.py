"""The grain pipeline: shuffle documents, deal them out to the rows of a batch, tokenize, pack, batch.

A batch has B rows of T predicted tokens. In training, the documents of row r of batch b depend only on the seed and on
B. So any number of processes yields the same batches, and each process reads only the documents of its rows. Prompts
with their responses (``data.prompt_key``) are never split between rows, and only responses have a loss.
"""

import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from layerskip_jax.config import Config
from layerskip_jax.data.batch import Batch
from layerskip_jax.data.documents import Document, Documents, Pair, components_of, read_sample
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.data.mixing import MixRows, choose_components, label, report_repeat
from layerskip_jax.data.sources import open_documents
from layerskip_jax.data.tokenizer import Tokenizer
from layerskip_jax.distributed import local_rows
from layerskip_jax.errors import UserError, note
from layerskip_jax.mixture import mixture_shares
from layerskip_jax.sharding import batch_sharding

PACKING_BINS = 32
"""Number of open rows in first-fit packing: each prompt with its response goes into the first open row with room."""

NO_THREADS = grain.ReadOptions(num_threads=0)
"""Without workers nothing is read ahead: on a small machine the threads would compete with the compiler."""

READ_AHEAD = grain.ReadOptions(num_threads=4, prefetch_buffer_size=16)
"""How a worker reads ahead for each of its rows. At 50 ms a request to a bucket, 4 threads read at most 80 documents
per second for a row. 16 threads were no faster (benchmarks/input_speed.py)."""

PAIRS_CHECKED = 2000
"""Number of pairs, spread evenly over a split, to tokenize to count those without room for a response."""


class OpenSplit(NamedTuple):
    """A split of a corpus, and the tokenizer of its run."""

    documents: Documents
    tokenizer: Tokenizer


def make_batches(
    config: Config,
    split: str,
    *,
    batch_size: int,
    rows: Sequence[int] | None = None,
    in_order: bool = False,
    seed: int = 0,
    opened: OpenSplit | None = None,
) -> grain.IterDataset:
    """Return an iterable of ``{"inputs_BT", "targets_BT", "segments_BT", "mask_BT"}``, B = ``batch_size`` rows.

    It yields only the given ``rows`` of each batch (default: all). In a run of several processes, each passes its own.

    In training, the documents are shuffled for every epoch and dealt out to the B rows in turn; every row packs its
    documents, and packed rows are shuffled again within ``data.shuffle_window``, or within the corpus if it is smaller.
    The iterator never ends. With ``in_order`` (evaluation), every process packs all documents once, in order, and keeps
    its rows, so all processes yield the same number of batches; the last batch is padded with masked rows.

    ``segments_BT`` numbers a row's documents from 1, or is 1 with ``data.cross_document_attention`` (0: padding).
    ``mask_BT`` is 1.0 where the next token belongs to the same segment (and, with prompts, to a response or its EOS).
    Pairs whose prompt fills a row are left out; raises `UserError` if no pair of a sample has room.
    `layerskip_jax.data.position` saves and restores the position of an iterator.

    ``opened`` is the split if it is open already: opening a large corpus takes a while.

    With ``data.mixture``, every row takes its next sequence from the component that `choose_components` names. It reads
    the same sequences of a component as in a run on that component alone. In evaluation, every component yields its
    first ``train.evaluate_batches`` batches, which have its number as ``"component"``.
    """
    rows = range(batch_size) if rows is None else rows
    documents, tokenizer = opened or (open_documents(config.data, split), load_tokenizer(config.data.tokenizer))
    components = {
        name: _Component(name, dataclasses.replace(config, data=config.data.components[name]), part, tokenizer)
        for name, part in components_of(documents).items()
    }
    for component in components.values():
        if isinstance(component.tokenize, _TokenizePair):
            _report_pairs_without_room(component.documents, component.tokenize, split)
    if in_order:
        select = partial(_select_rows, list(rows), batch_size)
        parts = [component.batches(batch_size).map(select) for component in components.values()]
        batches = parts[0] if "" in components else _chain(parts, config.train.evaluate_batches)
        return _in_worker(batches) if config.data.workers else batches
    streams = [component.rows(rows, batch_size, seed) for component in components.values()]
    if "" in components:
        (mixed,) = streams
    else:
        weights = list(mixture_shares(config.data.mixture).values())
        choices = (choose_components(weights, batch_size, row, seed).to_iter_dataset(NO_THREADS) for row in rows)
        mixed = [
            MixRows(choice, dict(zip(components, parts, strict=True)))
            for choice, *parts in zip(choices, *streams, strict=True)
        ]
    workers = min(config.data.workers, len(mixed))
    if not workers:
        return grain.experimental.ZipIterDataset(mixed).map(_stack)
    shares = np.array_split(np.arange(len(mixed)), workers)
    zipped = [_in_worker(grain.experimental.ZipIterDataset([mixed[i] for i in share])) for share in shares]
    return grain.experimental.ZipIterDataset(zipped).map(_flatten).map(_stack)


class _Component:
    """A corpus of a mixture, or the only one; ``config`` is that of a run on it alone."""

    def __init__(self, name: str, config: Config, documents: Documents, tokenizer: Tokenizer):
        self._name, self._config, self._tokenizer = name, config, tokenizer
        self.documents, self.tokenize = documents, _tokenize(config, tokenizer)
        self._source = grain.MapDataset.source(documents)

    def batches(self, batch_size: int) -> grain.IterDataset:
        """Return the batches of all documents, packed in order."""
        packed = _pack(self._config, self._source.map(self.tokenize), PACKING_BINS)
        return packed.batch(batch_size, drop_remainder=False)

    def rows(self, rows: Sequence[int], batch_size: int, seed: int) -> list[grain.IterDataset]:
        """Return the endless, shuffled sequences of ``rows`` of a batch."""
        endless = self._source.shuffle(seed=seed).repeat()
        if self._name:
            endless = endless.map_with_index(partial(report_repeat, self._name, len(self.documents), batch_size))
        tokens = endless.map(self.tokenize)
        sequences = count_sequences(self._config, self._tokenizer, self.documents, batch_size)
        window, bins = packing_sizes(self._config, batch_size, sequences)
        streams = []
        for row in rows:
            stream = _pack(self._config, tokens[row::batch_size], bins)
            if window > 1:
                shuffled = stream.batch(window, drop_remainder=False).random_map(_shuffle, seed=seed)
                stream = grain.experimental.FlatMapIterDataset(shuffled, _Unbatch(max_fan_out=window))
            streams.append(stream)
        return streams


def _chain(components: Sequence[grain.IterDataset], most: int) -> grain.IterDataset:
    """Return the first ``most`` batches of every component, labeled with its number."""
    limited = [
        grain.experimental.LimitIterDataset(batches.map(partial(label, number)), count=most)
        for number, batches in enumerate(components)
    ]
    return grain.experimental.InterleaveIterDataset(limited, cycle_length=1)


COUNTED = 32
"""`count_sequences` tokenizes at most this many documents."""


def count_sequences(config: Config, tokenizer: Tokenizer, documents: Documents, batch_size: int) -> int:
    """Estimate how many packed sequences the corpus fills, up to a limit above which the number does not matter.

    The limit is ``data.shuffle_window``, or with prompts the `PACKING_BINS` of all rows if they are more. Return the
    limit without reading text in two cases: it is less than two batches, so nothing is shuffled; or one BOS and one EOS
    for each document already fill it. Otherwise tokenize up to `COUNTED` documents and extrapolate.
    """
    bins = PACKING_BINS * batch_size if config.data.prompt_key else 0
    needed = max(config.data.shuffle_window, bins)
    length, count = config.data.sequence_length + 1, len(documents)
    if needed < 2 * batch_size or 2 * count >= needed * length:
        return needed  # nothing is shuffled, or BOS and EOS alone are enough
    tokenize, tokens = _tokenize(config, tokenizer), 0.0
    for document in read_sample(documents, COUNTED):
        part = document[:10_000] if isinstance(document, str) and not isinstance(document, Pair) else document
        tokens += len(tokenize(part)["tokens"]) * len(document) / max(1, len(part))
        if tokens >= needed * length:
            return needed
    return min(needed, round(tokens * count / min(count, COUNTED) / length))


def packing_sizes(config: Config, batch_size: int, sequences: int) -> tuple[int, int]:
    """Return the window in which every row shuffles its sequences, and the bins of first-fit packing (0: not used).

    Both are at most what one pass over the documents fills. Otherwise a tiny corpus is read many times before the
    first batch.
    """
    bins = min(PACKING_BINS, max(1, sequences // batch_size)) if config.data.prompt_key else 0
    return min(config.data.shuffle_window, sequences) // batch_size, bins


def _tokenize(config: Config, tokenizer: Tokenizer) -> Callable[[Document], dict[str, np.ndarray]]:
    length = config.data.sequence_length + 1
    return _TokenizePair(tokenizer, length) if config.data.prompt_key else partial(_tokenize_document, tokenizer)


def _pack(config: Config, documents: grain.MapDataset, bins: int) -> grain.IterDataset:
    """Pack ``{"tokens"}`` documents into rows."""
    options = READ_AHEAD if config.data.workers else NO_THREADS
    tokens, length = documents.to_iter_dataset(options), config.data.sequence_length + 1
    if config.data.prompt_key:  # a response without its prompt is useless, so pairs are not split
        tokens = tokens.filter(_has_counted_target)
        lengths = {"tokens": length, "counts": length}
        rows = grain.experimental.FirstFitPackIterDataset(tokens, length_struct=lengths, num_packing_bins=bins)
    else:
        rows = grain.experimental.ConcatThenSplitIterDataset(tokens, length_struct={"tokens": length})
    return rows.map(partial(_to_row, config.data.cross_document_attention, config.model.vocab_size))


def _in_worker(dataset: grain.IterDataset) -> grain.IterDataset:
    """Run ``dataset`` in a worker process."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["layerskip_jax"])  # grain reads absl flags: https://github.com/google/grain/pull/1361
    return dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=1), _initialize_worker)


def _initialize_worker(worker: int, workers: int) -> None:
    """Ignore SIGINT and SIGTERM, and exit when the training process exits, even if it is killed.

    Ctrl-C, Slurm and systemd send these signals to all processes, but the training process still needs batches
    to finish its step.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


# grain 0.2.18's WindowShuffleIterDataset takes 5 ms a row for windows of 4 rows. We found no upstream issue about it.
def _shuffle(window: dict[str, np.ndarray], generator: np.random.Generator) -> dict[str, np.ndarray]:
    order = generator.permutation(len(window["mask_BT"]))
    return {name: array[order] for name, array in window.items()}


def local_batches(
    config: Config, split: str, mesh: Mesh, *, in_order: bool = False, opened: OpenSplit | None = None
) -> grain.IterDataset:
    """Return the local rows of the batches, see `make_batches`: shuffled and endless, or ``in_order`` and once."""
    size = config.train.batch_size
    return make_batches(
        config,
        split,
        batch_size=size,
        rows=local_rows(batch_sharding(mesh), size),
        in_order=in_order,
        seed=config.train.seed,
        opened=opened,
    )


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> Batch:
    """Shard a batch over the mesh, from the local rows of each process."""
    make = partial(jax.make_array_from_process_local_data, batch_sharding(mesh))
    return Batch(*(make(batch[name]) for name in Batch._fields))


@dataclasses.dataclass(frozen=True)
class _Unbatch(grain.experimental.FlatMapTransform):
    """Split a window of rows into its rows."""

    max_fan_out: int

    def flat_map(self, window: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
        return [dict(zip(window, row, strict=True)) for row in zip(*window.values(), strict=True)]


def _flatten(parts: Sequence[Sequence[Any]]) -> list[Any]:
    return [row for part in parts for row in part]


def _stack(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _tokenize_document(tokenizer: Tokenizer, document: Document) -> dict[str, np.ndarray]:
    return {"tokens": document if isinstance(document, np.ndarray) else document_tokens(tokenizer, document)}


class _TokenizePair:
    """Tokenize a prompt and its response, cut to ``length``; ``counts`` is 1 for the response and its EOS."""

    def __init__(self, tokenizer: Tokenizer, length: int):
        self._tokenizer, self.length = tokenizer, length

    def __call__(self, document: Document) -> dict[str, np.ndarray]:
        assert isinstance(document, Pair)
        # Encoded separately, as in generation, which encodes the prompt alone.
        prompt = self._tokenizer.encode_prompt(document.prompt)
        response = [*self._tokenizer.encode_continuation(document.response), self._tokenizer.eos_id]
        counts = np.repeat(np.array([0, 1], np.int32), [len(prompt), len(response)])
        tokens = np.array(prompt + response, np.int32)
        return {"tokens": tokens[: self.length], "counts": counts[: self.length]}


def _has_counted_target(pair: dict[str, np.ndarray]) -> bool:
    return bool(pair["counts"][1:].any())


def _report_pairs_without_room(pairs: Documents, tokenize: _TokenizePair, split: str) -> None:
    """Print how many pairs of a split are left out; raises `UserError` if they all are."""
    checked = min(len(pairs), PAIRS_CHECKED)
    without = sum(not _has_counted_target(tokenize(pair)) for pair in read_sample(pairs, checked))
    counted = f"{without} of {checked} {'pairs' if checked == len(pairs) else 'checked pairs'}"
    line = (
        f"{counted} in the {split!r} split are left out: their prompts (data.prompt_key) leave no room for a response "
        f"in a row of {tokenize.length} tokens"
    )
    if without == checked:
        raise UserError(f"{line}: raise data.sequence_length")
    if without and jax.process_index() == 0:
        note(line)


def document_tokens(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Return the int32 tokens of one training document, see `Tokenizer.encode_document`."""
    return np.array(tokenizer.encode_document(text), np.int32)


def _to_row(cross_documents: bool, vocab_size: int, packed: dict[str, Any]) -> dict[str, np.ndarray]:
    """Turn T+1 packed tokens into inputs, targets, segments and mask of T predictions."""
    tokens, segments = packed["tokens"], packed["tokens_segment_ids"]
    if tokens.max() >= vocab_size:  # a tokenizer can have special tokens that the model lacks
        raise UserError(
            f"a document has the token {tokens.max()}, beyond the model's vocabulary of {vocab_size} "
            "(model.vocab_size): remove the special tokens that it spells"
        )
    counts = segments[1:] > 0
    if cross_documents:
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


def _select_rows(rows: Sequence[int], batch_size: int, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Select the local rows of a batch; a short last batch is first padded with rows of zeros."""
    padded = {name: np.pad(array_BT, ((0, batch_size - len(array_BT)), (0, 0))) for name, array_BT in batch.items()}
    return {name: array_BT[rows] for name, array_BT in padded.items()}
