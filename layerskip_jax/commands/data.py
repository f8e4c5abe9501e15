"""``layerskip data COMMAND --config configs/NAME.py [--group.setting value ...]`` prepares text for training."""

import itertools
import sys

import numpy as np

from layerskip_jax.command_line import make_parser, parse_config
from layerskip_jax.config import Config
from layerskip_jax.data.corpus import describe_splits
from layerskip_jax.data.documents import components_of
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.data.pipeline import make_batches
from layerskip_jax.data.pretokenize import pretokenize
from layerskip_jax.data.sentencepiece_tokenizer import train_tokenizer
from layerskip_jax.data.sources import open_documents, open_splits
from layerskip_jax.errors import UserError, nearest
from layerskip_jax.locations import locate

COMMANDS = {
    "prepare": "open both splits, prepare the default corpus if needed, and count the documents",
    "tokenizer": "train a SentencePiece model of model.vocab_size pieces on the train split",
    "pretokenize": "store the corpus as tokens in --out FOLDER, for data.source tokens",
    "show": "print packed training rows, with || between documents",
}


def main(argv: list[str] | None = None) -> None:
    does = "; ".join(f"{name}: {text}" for name, text in COMMANDS.items())
    parser = make_parser(f"Prepare text for training. {does}.", "data")
    parser.add_argument("command", metavar="COMMAND", help=", ".join(COMMANDS))
    parser.add_argument("--overwrite", action="store_true", help="tokenizer: replace an existing one")
    parser.add_argument("--out", metavar="FOLDER", help="pretokenize: the folder to write")
    config, options = parse_config(parser, argv)
    if options.command not in COMMANDS:
        raise UserError(f"unknown command {options.command!r}{nearest(options.command, COMMANDS)}")
    for option, command in (("overwrite", "tokenizer"), ("out", "pretokenize")):
        if getattr(options, option) and options.command != command:
            raise UserError(f"--{option} is an option of layerskip data {command}, not of {options.command}")
    if options.command == "prepare":
        _prepare(config)
    elif options.command == "tokenizer":
        _tokenizer(config, options.overwrite)
    elif options.command == "pretokenize":
        if not options.out:
            raise UserError("pretokenize needs --out FOLDER")
        counts = pretokenize(config.data, options.out)
        for split, count in counts["splits"].items():
            print(f"{split}: {count['documents']:,} documents, {count['tokens']:,} tokens")
        print(f"{options.out}: {counts['tokens_per_second']:,.0f} tokens/s")
        print(f"use it with --data.source tokens --data.path {options.out}")
    else:
        _show(config)


def _prepare(config: Config) -> None:
    names = (config.data.train_split, config.data.validation_split)
    splits = open_splits(config.data)
    for split, documents in zip(names, splits, strict=True):
        for name, part in components_of(documents).items():
            # The size is known for files and for tokens. Other documents would have to be read.
            unit = "bytes of JSON lines" if config.data.components[name].source == "jsonl" else "bytes"
            size = f", {int(np.sum(part.sizes)):,} {unit}" if hasattr(part, "sizes") else ""
            size = f", {part.tokens:,} tokens" if hasattr(part, "tokens") else size
            print(f"{split}{f' of {name}' * bool(name)}: {len(part):,} documents{size}")
    for line in describe_splits(config.data, *splits):
        print(line)


def _tokenizer(config: Config, overwrite: bool) -> None:
    path = config.data.tokenizer
    if path.endswith(".json"):
        raise UserError(
            f"this command trains a SentencePiece model, not {path}: set --data.tokenizer {path[:-5]}.model"
        )
    if locate(path).exists() and not overwrite:
        existing = load_tokenizer(path)
        try:
            existing.check_vocabulary(config.model.vocab_size)
        except UserError as error:
            raise UserError(f"{path} exists: {error}, with --overwrite or another --data.tokenizer") from error
        print(f"{path} exists, with {existing.vocab_size} pieces; --overwrite replaces it")
        return
    documents = open_documents(config.data, config.data.train_split)
    tokenizer = train_tokenizer(documents, path, config.model.vocab_size)
    sample = [str(documents[i]) for i in np.linspace(0, len(documents) - 1, 20).astype(int)]
    bytes_, tokens = (
        sum(len(text.encode("utf-8", "replace")) for text in sample),
        sum(len(tokenizer.encode(text)) for text in sample),
    )
    print(f"{path}: {tokenizer.vocab_size} pieces, {bytes_ / max(tokens, 1):.2f} bytes a token")


ROWS = 3
"""Sequences that ``data show`` prints."""


def _show(config: Config) -> None:
    tokenizer = load_tokenizer(config.data.tokenizer)
    batches = make_batches(config, config.data.train_split, batch_size=1, seed=config.train.seed)
    for batch in itertools.islice(batches, ROWS):
        inputs, segments = batch["inputs_BT"][0], batch["segments_BT"][0]
        numbers = range(1, int(segments.max()) + 1)  # 0 is padding
        documents = [tokenizer.decode(inputs[segments == number].tolist()) for number in numbers]
        sys.stdout.write(" || ".join(documents) + f"\n{'-' * 40}\n")
