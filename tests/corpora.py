"""A small corpus and tokenizer, made in the test run: no downloads."""

import numpy as np

from layerskip_jax.config import DataConfig
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.data.sentencepiece_tokenizer import train_tokenizer
from layerskip_jax.data.sources import open_documents

WORDS = [
    "def",
    "return",
    "if",
    "else",
    "for",
    "while",
    "x",
    "y",
    "value",
    "index",
    "the",
    "a",
    "of",
    "self",
    "None",
    "True",
    "(",
    ")",
    ":",
    "=",
    "+",
    "naïve",
    "漢字",
    "\t",
]
VOCABULARY = 340


def write_corpus(folder, documents=40, seed=0):
    """Write text files of random words and indentation."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        lines = [
            "    " * random.integers(3) + " ".join(random.choice(WORDS, random.integers(1, 9)))
            for _ in range(random.integers(3, 40))
        ]
        (folder / f"{number:03d}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def make_corpus(folder) -> DataConfig:
    """Write a corpus and train its tokenizer; return the settings that read them."""
    data = DataConfig(
        source="text",
        path=str(write_corpus(folder / "text")),
        tokenizer=str(folder / "tokenizer.model"),
        sequence_length=32,
        shuffle_window=16,
    )
    train_tokenizer(open_documents(data, "train"), data.tokenizer, VOCABULARY)
    load_tokenizer(data.tokenizer).check_vocabulary(VOCABULARY)
    return data
