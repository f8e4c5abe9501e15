"""Tokenize a corpus once and write it as ArrayRecord, so that no host of a pod tokenizes during training."""

import json
import time
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from tqdm import tqdm

from layerskip_jax.config import DataConfig
from layerskip_jax.data.documents import Documents
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.data.pipeline import document_tokens
from layerskip_jax.data.sources import METADATA, open_splits
from layerskip_jax.data.tokenizer import Tokenizer
from layerskip_jax.errors import UserError
from layerskip_jax.locations import locate, new_folder

TOKENS_PER_SHARD = 50_000_000


def pretokenize(config: DataConfig, out: str) -> dict[str, Any]:
    """Write both splits of ``config``'s corpus to ``out/SPLIT/*.array_record`` and return its metadata.

    A record holds the ids of one document (`Tokenizer.encode_document`). ``out`` appears only when it is complete:
    until then the files are in ``out.partial``.
    """
    if config.mixture:
        raise UserError(
            "data.mixture is set: pretokenize each of its corpora alone (--data.mixture without words, --data.source, "
            "--data.path), then mix them with --data.mixture WEIGHT=tokens:FOLDER ..."
        )
    if config.source == "tokens":
        raise UserError("data.source is 'tokens': this corpus is already tokenized")
    if config.prompt_key:
        raise UserError("data.prompt_key is set: tokens cannot mark prompts; train on data.source jsonl instead")
    target = locate(out)
    if target.exists():
        raise UserError(f"{out} exists: give --out a new folder, or remove it first")
    tokenizer = load_tokenizer(config.tokenizer)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32)
    names = (config.train_split, config.validation_split)
    documents = dict(zip(names, open_splits(config), strict=True))  # both at first: one may be missing
    began = time.perf_counter()
    with new_folder(target) as partial:
        splits = {name: _write_split(part, tokenizer, dtype, partial / name) for name, part in documents.items()}
        metadata = {
            "tokenizer_sha256": tokenizer.fingerprint(),
            "vocab_size": tokenizer.vocab_size,
            "dtype": dtype.name,
            "splits": splits,
        }
        (partial / METADATA).write_text(json.dumps(metadata, indent=1))
    tokens = sum(counts["tokens"] for counts in splits.values())
    return metadata | {"tokens_per_second": tokens / (time.perf_counter() - began)}


def _write_split(documents: Documents, tokenizer: Tokenizer, dtype: np.dtype, folder: epath.Path) -> dict[str, int]:
    folder.mkdir(parents=True, exist_ok=True)
    total, shard, in_shard = 0, 0, 0
    writer = ArrayRecordWriter(str(folder / f"{shard:05d}.array_record"), "group_size:1")
    try:
        for index in tqdm(range(len(documents)), desc=folder.name, unit="document", disable=None):
            if in_shard >= TOKENS_PER_SHARD:
                writer.close()
                shard, in_shard = shard + 1, 0
                writer = ArrayRecordWriter(str(folder / f"{shard:05d}.array_record"), "group_size:1")
            tokens = document_tokens(tokenizer, str(documents[index]))
            writer.write(tokens.astype(dtype).tobytes())
            total, in_shard = total + len(tokens), in_shard + len(tokens)
    finally:
        writer.close()
    return {"documents": len(documents), "tokens": total}
