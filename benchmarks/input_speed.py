"""Time how a host reads its part of the batches: ``python -m benchmarks.input_speed [disk bucket tokens lines]``.

- disk: tokens per second of a pretokenized corpus on local disk (just written, so cached), with 2 worker processes.
- bucket: the same from a bucket on loopback whose requests take 50 ms each, with 8 worker processes.
- tokens: seconds and memory until a run has its first batch of a pretokenized corpus of 10 million documents.
- lines: the same for 10 million JSON lines.

The documents are random tokens, because only their number and their lengths matter. Without a name all parts run.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import random
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from benchmarks.bucket_server import bucket_server
from benchmarks.common import add_json_option, header, write_json
from layerskip_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from layerskip_jax.data.corpus import identify_corpus
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.data.pipeline import OpenSplit, local_batches
from layerskip_jax.data.pretokenize import TOKENS_PER_SHARD
from layerskip_jax.data.sentencepiece_tokenizer import train_tokenizer
from layerskip_jax.data.sources import METADATA, open_splits
from layerskip_jax.errors import run_command
from layerskip_jax.locations import locate
from layerskip_jax.sharding import make_mesh

VOCAB_SIZE = 300
SEQUENCE_LENGTH = 2048
ROWS = 32
"""Rows of a batch on this host: 8 for each of 4 chips."""

VALIDATION_DOCUMENTS = 1000


def make_corpus(folder: Path, documents: int, tokens: int) -> DataConfig:
    """Write a pretokenized corpus of ``documents`` that have ``tokens`` each on average."""
    folder.mkdir(parents=True)
    words, tokenizer_file = random.Random(0), str(folder / "tokenizer.model")
    train_tokenizer(["".join(words.choices("abcdefgh ", k=2000)) for _ in range(50)], tokenizer_file, VOCAB_SIZE)
    splits = {"train": documents, "validation": VALIDATION_DOCUMENTS}
    written = {split: _write_split(folder / split, count, tokens) for split, count in splits.items()}
    metadata = {
        "tokenizer_sha256": load_tokenizer(tokenizer_file).fingerprint(),
        "vocab_size": VOCAB_SIZE,
        "dtype": "uint16",
        "splits": written,
    }
    (folder / METADATA).write_text(json.dumps(metadata))
    return DataConfig(
        source="tokens", path=str(folder), tokenizer=tokenizer_file, sequence_length=SEQUENCE_LENGTH, shuffle_window=256
    )


def _write_split(folder: Path, documents: int, tokens: int) -> dict[str, int]:
    folder.mkdir()
    chance = np.random.default_rng(0)
    content = chance.integers(3, VOCAB_SIZE, 2 * tokens, np.uint16).tobytes()
    lengths = chance.integers(tokens // 2, tokens * 3 // 2, documents)
    shards = np.split(lengths, np.flatnonzero(np.diff(np.cumsum(lengths) // TOKENS_PER_SHARD)) + 1)
    for number, shard in enumerate(shards):
        writer = ArrayRecordWriter(str(folder / f"{number:05d}.array_record"), "group_size:1")
        for length in shard.tolist():
            writer.write(content[: 2 * length])
        writer.close()
    return {"documents": documents, "tokens": int(lengths.sum())}


def _config(data: DataConfig) -> Config:
    return Config(model=ModelConfig(vocab_size=VOCAB_SIZE), data=data, train=TrainConfig(batch_size=ROWS))


def _tokens_per_second(data: DataConfig, seconds: float) -> float:
    """Return the tokens per second of the batches that follow the first ones, which wait for full buffers."""
    config = _config(data)
    batches = iter(local_batches(config, "train", make_mesh(config)))
    first_window = max(4, data.shuffle_window // ROWS)
    for _ in range(first_window):
        next(batches)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        next(batches)
        count += 1
    return count * ROWS * SEQUENCE_LENGTH / (time.perf_counter() - began)


def _upload(folder: str, url: str) -> None:
    for file in (file for file in Path(folder).rglob("*") if file.is_file()):
        (locate(url) / file.relative_to(folder).as_posix()).write_bytes(file.read_bytes())


def _in_new_process(function: Callable[..., Any], *arguments: Any, **environment: str) -> Any:
    """Call a function in a process of its own.

    Bucket clients read the environment only once, and peak memory is that of a process.
    """
    before = os.environ.copy()
    os.environ.update(environment)
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def disk(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    data = make_corpus(folder / "disk", 100_000, options.length)
    return {
        "tokens_per_second": _in_new_process(_tokens_per_second, dataclasses.replace(data, workers=2), options.seconds)
    }


def bucket(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    data = make_corpus(folder / "local", 100_000, options.length)
    remote = dataclasses.replace(data, path="gs://bucket/corpus", workers=8)
    (folder / "buckets" / "bucket").mkdir(parents=True)
    with bucket_server(folder / "buckets") as (environment, faults):
        _in_new_process(_upload, data.path, remote.path, **environment)
        faults.seconds, faults.requests = (options.latency, options.latency), 0
        rate = _in_new_process(_tokens_per_second, remote, options.seconds, **environment)
    return {"tokens_per_second": rate, "requests": faults.requests}


def _open(data: DataConfig) -> dict[str, float]:
    began = time.perf_counter()
    config, splits, tokenizer = _config(data), open_splits(data), load_tokenizer(data.tokenizer)
    next(iter(local_batches(config, "train", make_mesh(config), opened=OpenSplit(splits[0], tokenizer))))
    identify_corpus(config, tokenizer, *splits)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "peak_gb": peak * 1024 / 1e9}


def tokens(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    return _in_new_process(_open, make_corpus(folder / "tokens", options.documents, 64))


def lines(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    data, line = make_corpus(folder / "tokens", 100, 64), json.dumps({"text": "abcd efgh " * 15}) + "\n"
    with open(folder / "corpus.jsonl", "w") as file:
        for _ in range(options.documents):
            file.write(line)
    return _in_new_process(_open, dataclasses.replace(data, source="jsonl", path=str(folder / "corpus.jsonl")))


PARTS = {function.__name__: function for function in (disk, bucket, tokens, lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"one of {', '.join(PARTS)}; without: all")
    parser.add_argument("--seconds", type=float, default=20, help="seconds to read for, in each of disk and bucket")
    parser.add_argument("--length", type=int, default=800, help="tokens of a document on average, in disk and bucket")
    parser.add_argument("--latency", type=float, default=0.05, help="seconds that a request to the bucket takes")
    parser.add_argument("--documents", type=int, default=10_000_000, help="documents in `tokens` and `lines`")
    add_json_option(parser)
    options = parser.parse_args()
    unknown = [name for name in options.parts if name not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}: choose from {', '.join(PARTS)}")
    about, results = header("grain", "array-record"), {}
    for name in options.parts or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = PARTS[name](Path(folder), options)
        print(f"{name}: " + ", ".join(f"{key} {value:,.1f}" for key, value in results[name].items()), flush=True)
    write_json(options.json, about, results)


if __name__ == "__main__":
    run_command(main)
