"""Prompts and responses: packed whole, and only what the model is to answer counts."""

import itertools
import json
import pickle

import numpy as np
import pytest
from corpora import VOCABULARY
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_jax.commands.prompts import read_prompts
from layerskip_jax.config import Config, DataConfig, ModelConfig
from layerskip_jax.data.documents import Pair
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.data.pipeline import make_batches
from layerskip_jax.data.position import Position, read_positions
from layerskip_jax.data.pretokenize import pretokenize
from layerskip_jax.data.sources import open_documents
from layerskip_jax.errors import UserError

WORDS = st.text("ab =\n漢", max_size=12)


def write(folder, pairs):
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"question": prompt, "answer": response}) for prompt, response in pairs]
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


def config_of(corpus, folder, **changes):
    values = {"sequence_length": 32, "shuffle_window": 4, "prompt_key": "question", "text_key": "answer"}
    data = DataConfig(source="jsonl", path=str(folder), tokenizer=corpus.tokenizer, **(values | changes))
    return Config(model=ModelConfig(vocab_size=VOCABULARY), data=data)


@given(pairs=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=8))
@settings(max_examples=25)
def test_exactly_the_responses_count(corpus, tmp_path_factory, pairs):
    """Read back from the batches: each document whole, and under the mask its response and its EOS, as cut to a row."""
    tokenizer = load_tokenizer(corpus.tokenizer)
    config = config_of(corpus, write(tmp_path_factory.getbasetemp() / "property", pairs))
    expected = []
    for prompt, response in pairs:
        inputs = [tokenizer.bos_id, *tokenizer.encode(prompt)]
        whole = [*inputs, *tokenizer.encode(response), tokenizer.eos_id][:33]
        if len(whole) > len(inputs):
            expected.append((whole[: len(inputs)], whole[len(inputs) :]))
    found = []
    for batch in make_batches(config, "train", batch_size=2, epochs=1, shuffle=False):
        for inputs, targets, segments, mask in zip(
            *(batch[f"{name}_BT"] for name in ("inputs", "targets", "segments", "mask"))
        ):
            for segment in range(1, segments.max() + 1):
                own = segments == segment
                counted = own & (mask > 0)
                if counted.any():
                    first = np.flatnonzero(counted)[0]
                    assert counted[first : first + counted.sum()].all()
                    found.append(
                        (inputs[own][: first - np.flatnonzero(own)[0] + 1].tolist(), targets[counted].tolist())
                    )
    assert sorted(found) == sorted(expected)


def test_a_position_in_pairs_comes_back_exactly(corpus, tmp_path):
    pairs = [(f"x = {i}", "a b " * (i % 7)) for i in range(60)]
    batches = make_batches(config_of(corpus, write(tmp_path, pairs)), "train", batch_size=2)
    original = iter(batches)
    list(itertools.islice(original, 5))
    (tmp_path / "process_0-of-1.json").write_bytes(Position(original, range(2)).get_state())
    expected, restored = list(itertools.islice(original, 6)), iter(batches)
    Position(restored, range(2)).set_state(read_positions(epath.Path(tmp_path)), 2)
    for old, new in zip(expected, itertools.islice(restored, 6), strict=True):
        for name in old:
            np.testing.assert_array_equal(old[name], new[name])


def test_a_run_goes_on_with_pairs_that_began_without(corpus, tmp_path):
    pairs = write(tmp_path / "pairs", [(f"x = {i}", "a b " * (i % 7)) for i in range(60)])
    original = iter(make_batches(config_of(corpus, pairs, prompt_key=""), "train", batch_size=2))
    list(itertools.islice(original, 3))
    (tmp_path / "process_0-of-1.json").write_bytes(Position(original, range(2)).get_state())
    restored = iter(make_batches(config_of(corpus, pairs), "train", batch_size=2))
    Position(restored, range(2)).set_state(read_positions(epath.Path(tmp_path)), 2, same_rows=False)
    assert next(restored)["mask_BT"].any()


def test_a_pair_is_a_text_and_pickles():
    pair = Pair("2 + 2 =", " 4")
    again = pickle.loads(pickle.dumps(pair))
    assert (pair, str(pair), again.prompt, again.response) == ("2 + 2 = 4", "2 + 2 = 4", "2 + 2 =", " 4")


def test_held_out_prompts_are_the_prompts(corpus, tmp_path):
    config = config_of(corpus, write(tmp_path, [("x = 1", "y"), ("x = 2", "z")]))
    assert read_prompts(None, None, 2, config) == ["x = 1", "x = 2"]


def test_mistakes_with_pairs_are_named(corpus, tmp_path):
    folder = write(tmp_path, [("x", "y")])
    with pytest.raises(UserError, match=r"a text in 'query' \(data.prompt_key\)"):
        open_documents(config_of(corpus, folder, prompt_key="query").data, "train")[0]
    with pytest.raises(UserError, match="which have fields"):
        DataConfig(source="text", path="x", prompt_key="question")
    with pytest.raises(UserError, match="would be lost in tokens"):
        pretokenize(config_of(corpus, folder).data, str(tmp_path / "out"))
