"""Prompts with responses: pairs are packed whole, and only responses have a loss."""

import contextlib
import io
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
from layerskip_jax.data.position import DataPosition, read_positions
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


def make_config(corpus, folder, **changes):
    values = {"sequence_length": 32, "shuffle_window": 4, "prompt_key": "question", "text_key": "answer"}
    data = DataConfig(source="jsonl", path=str(folder), tokenizer=corpus.tokenizer, **(values | changes))
    return Config(model=ModelConfig(vocab_size=VOCABULARY), data=data)


@given(pairs=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=8))
@settings(max_examples=25)
def test_exactly_the_responses_have_a_loss(corpus, tmp_path_factory, pairs):
    """Every document is in one row, and the mask covers its response and its EOS, cut to the row."""
    tokenizer = load_tokenizer(corpus.tokenizer)
    config = make_config(corpus, write(tmp_path_factory.getbasetemp() / "property", pairs))
    expected = []
    for prompt, response in pairs:
        inputs = [tokenizer.bos_id, *tokenizer.encode(prompt)]
        whole = [*inputs, *tokenizer.encode(response), tokenizer.eos_id][:33]
        if len(whole) > len(inputs):
            expected.append((whole[: len(inputs)], whole[len(inputs) :]))
    if not expected:
        with pytest.raises(UserError, match="leave no room for a response"):
            make_batches(config, "train", batch_size=2, in_order=True)
        return
    found = []
    for batch in make_batches(config, "train", batch_size=2, in_order=True):
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


@given(long=st.lists(st.booleans(), min_size=1, max_size=12), in_order=st.booleans())
@settings(max_examples=15)
def test_pairs_without_room_for_a_response_are_left_out_and_counted(corpus, tmp_path_factory, long, in_order):
    pairs = [("x = " * 40 if is_long else "x =", f" {number}") for number, is_long in enumerate(long)]
    config = make_config(corpus, write(tmp_path_factory.getbasetemp() / "long", pairs))
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        if all(long):
            with pytest.raises(UserError, match=f"{len(long)} of {len(long)} pairs .* raise data.sequence_length"):
                make_batches(config, "train", batch_size=2, in_order=in_order)
            return
        batches = make_batches(config, "train", batch_size=2, in_order=in_order)
    line = f"note: {sum(long)} of {len(long)} pairs in the 'train' split are left out"
    assert stderr.getvalue().startswith(line) if any(long) else not stderr.getvalue()
    tokenizer = load_tokenizer(corpus.tokenizer)
    for batch in itertools.islice(batches, 3):
        assert batch["mask_BT"].any()
        for inputs, segments in zip(batch["inputs_BT"], batch["segments_BT"], strict=True):
            for segment in range(1, segments.max() + 1):
                assert tokenizer.decode(inputs[segments == segment].tolist()).startswith("x = ")


def test_a_restored_position_in_pairs_yields_the_same_batches(corpus, tmp_path):
    pairs = [(f"x = {i}", "a b " * (i % 7)) for i in range(60)]
    batches = make_batches(make_config(corpus, write(tmp_path, pairs)), "train", batch_size=2)
    original = iter(batches)
    list(itertools.islice(original, 5))
    (tmp_path / "process_0-of-1.json").write_bytes(DataPosition(original, range(2)).get_state())
    expected, restored = list(itertools.islice(original, 6)), iter(batches)
    DataPosition(restored, range(2)).set_state(read_positions(epath.Path(tmp_path)), 2)
    for old, new in zip(expected, itertools.islice(restored, 6), strict=True):
        for name in old:
            np.testing.assert_array_equal(old[name], new[name])


def test_a_run_on_text_can_resume_with_pairs(corpus, tmp_path):
    pairs = write(tmp_path / "pairs", [(f"x = {i}", "a b " * (i % 7)) for i in range(60)])
    original = iter(make_batches(make_config(corpus, pairs, prompt_key=""), "train", batch_size=2))
    list(itertools.islice(original, 3))
    (tmp_path / "process_0-of-1.json").write_bytes(DataPosition(original, range(2)).get_state())
    restored = iter(make_batches(make_config(corpus, pairs), "train", batch_size=2))
    DataPosition(restored, range(2)).set_state(read_positions(epath.Path(tmp_path)), 2, {"": ("", "next documents")})
    assert next(restored)["mask_BT"].any()


def test_a_pair_is_a_text_and_pickles():
    pair = Pair("2 + 2 =", " 4")
    again = pickle.loads(pickle.dumps(pair))
    assert (pair, str(pair), again.prompt, again.response) == ("2 + 2 = 4", "2 + 2 = 4", "2 + 2 =", " 4")


def test_held_out_prompts_leave_out_the_responses(corpus, tmp_path):
    config = make_config(corpus, write(tmp_path, [("x = 1", "y"), ("x = 2", "z")]))
    assert read_prompts(None, None, 2, config) == ["x = 1", "x = 2"]


def test_errors_of_pairs(corpus, tmp_path):
    folder = write(tmp_path, [("x", "y")])
    with pytest.raises(UserError, match=r"a text in 'query' \(data.prompt_key\)"):
        open_documents(make_config(corpus, folder, prompt_key="query").data, "train")[0]
    with pytest.raises(UserError, match="which have fields"):
        DataConfig(source="text", path="x", prompt_key="question")
    with pytest.raises(UserError, match="tokens cannot mark prompts"):
        pretokenize(make_config(corpus, folder).data, str(tmp_path / "out"))
