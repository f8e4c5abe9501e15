"""Vocabularies of any size, for corpora with many characters or little text."""

import re

import numpy as np
import pytest

from layerskip_jax.commands import data
from layerskip_jax.data.sentencepiece_tokenizer import train_tokenizer
from layerskip_jax.data.sources import open_documents
from layerskip_jax.errors import UserError


def test_vocabularies_that_cannot_be_made(tmp_path):
    with pytest.raises(
        UserError, match=r"the smallest size is 260, for BOS, EOS, unknown, 256 bytes and one character"
    ):
        train_tokenizer(["text"], str(tmp_path / "small.model"), 259)
    with pytest.raises(UserError, match=r"cannot make 300 pieces .* from this corpus: it has no text"):
        train_tokenizer([""], str(tmp_path / "empty.model"), 300)
    assert not list(tmp_path.iterdir())


def test_a_sentencepiece_model_is_not_written_into_a_json_file(corpus, tmp_path):
    words = ["--data.source", corpus.source, "--data.path", corpus.path, "--data.tokenizer", str(tmp_path / "t.json")]
    (tmp_path / "t.json").write_text("somebody's tokenizer")
    with pytest.raises(UserError, match=r"set --data\.tokenizer .*t\.model"):
        data.main(["tokenizer", *words, "--overwrite"])
    assert (tmp_path / "t.json").read_text() == "somebody's tokenizer"


def test_a_corpus_that_is_too_small_names_the_largest_vocabulary(corpus, tmp_path):
    documents = open_documents(corpus, "train")
    with pytest.raises(UserError, match=r"cannot make 50000 pieces .*: its text is too small: set --model") as error:
        train_tokenizer(documents, str(tmp_path / "large.model"), 50_000)
    largest = int(re.search(r"--model.vocab_size (\d+) or less", str(error.value))[1])
    assert train_tokenizer(documents, str(tmp_path / "largest.model"), largest).vocab_size == largest
    with pytest.raises(UserError, match=f"--model.vocab_size {largest} or less"):
        train_tokenizer(documents, str(tmp_path / "larger.model"), largest + 1)


@pytest.mark.parametrize("vocab_size", [260, 300, 1024, 2048])
def test_bytes_carry_the_rare_characters_of_a_corpus_with_more_than_pieces(tmp_path, capsys, vocab_size):
    """3,000 characters of falling frequency, as in Japanese or Chinese."""
    weights = 1 / np.arange(1, 3001)
    codes = np.random.default_rng(0).choice(3000, (300, 200), p=weights / weights.sum())
    documents = ["".join(chr(0x4E00 + code) for code in line) for line in codes]
    tokenizer = train_tokenizer(documents, str(tmp_path / "han.model"), vocab_size)
    assert tokenizer.vocab_size == vocab_size
    frequent = documents[0].count("\u4e00") * "\u4e00"
    assert len(tokenizer.encode(frequent)) <= len(frequent)
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in documents)
    kept = max(1, (vocab_size - 259) // 2)
    line = capsys.readouterr().out
    assert f"the text has {np.unique(codes).size:,} characters: the {kept:,} most frequent ones" in line
    share = np.sort(np.bincount(codes.ravel()))[::-1][:kept].sum() / codes.size
    assert f", {share:.1%} of the text, have pieces of their own" in line
