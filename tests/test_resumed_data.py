"""A resumed run reports changes of its data and their effects. The content identifies the corpus."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from corpora import write_corpus
from etils import epath
from test_data import assert_equal_batches, make_config, take
from test_position import save_position

from layerskip_jax.checkpoint.reading import open_model_folder
from layerskip_jax.config import DataConfig
from layerskip_jax.data.corpus import identify_corpus, resume_data
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.data.pipeline import make_batches
from layerskip_jax.data.position import DataPosition, read_corpus, read_positions
from layerskip_jax.data.sources import open_splits
from layerskip_jax.errors import UserError
from layerskip_jax.training.loop import train


def identify(config, part=0):
    return identify_corpus(config, load_tokenizer(config.data.tokenizer), *open_splits(config.data))[part]


def describe(config):
    return identify(config, 1)


def write_lines(file, words, count=60):
    record = [{key: f"{word} {number} " * 9 for key, word in words.items()} for number in range(count)]
    file.write_text("\n".join(json.dumps(line) for line in record))
    return str(file)


@pytest.fixture
def lines(corpus, tmp_path):
    """The config of a corpus of JSON lines with two fields."""
    path = write_lines(tmp_path / "a.jsonl", {"text": "value", "body": "index"})
    return make_config(dataclasses.replace(corpus, source="jsonl", path=path))


def resumed(saved, config, before=None):
    return resume_data(saved, config, before or identify(saved), identify(config))


@pytest.mark.parametrize(
    ("name", "value", "resume_from", "effect"),
    [
        ("source", "text", "first document", "data.source: other training documents, read from the first one on"),
        ("path", "b.jsonl", "first document", "data.path: other training documents, read from the first one on"),
        ("path", "moved/a.jsonl", "same rows", "data.path: the same training documents"),
        ("data_dir", "x", "same rows", "data.data_dir: the same training documents"),
        ("text_key", "body", "first document", "data.text_key: other training documents, read from the first one on"),
        ("prompt_key", "body", "first document", "data.prompt_key: other training documents, read from the first one"),
        (
            "train_split",
            "more",
            "first document",
            "data.train_split: other training documents, read from the first one",
        ),
        (
            "validation_split",
            "more",
            "same rows",
            "data.validation_split: other held-out documents: their losses do not",
        ),
        ("tokenizer", "copy.model", "same rows", "data.tokenizer: the same tokenizer"),
        ("sequence_length", 24, "next documents", "data.sequence_length: every row continues after the documents"),
        ("sequence_length", 24, "next documents", "data.sequence_length: losses do not compare with earlier ones"),
        ("cross_document_attention", True, "same rows", "data.cross_document_attention: losses do not compare"),
        ("shuffle_window", 32, "next documents", "data.shuffle_window: every row continues after the documents"),
        ("workers", 1, "same rows", "data.workers: the order of the data stays the same"),
    ],
)
def test_a_change_of_each_data_setting_reports_its_effect(lines, tmp_path, name, value, resume_from, effect):
    folder = tmp_path / "splits"
    folder.mkdir()
    (tmp_path / "moved").mkdir()
    shutil.copy(lines.data.path, tmp_path / "moved" / "a.jsonl")
    shutil.copy(lines.data.tokenizer, tmp_path / "copy.model")
    write_lines(tmp_path / "b.jsonl", {"text": "other"})
    for number, split in enumerate(("train", "validation", "more")):
        write_lines(folder / f"{split}.jsonl", {"text": split}, 20 + number)
    path = str(folder) if name.endswith("split") else lines.data.path
    saved = dataclasses.replace(lines, data=dataclasses.replace(lines.data, path=path))
    value = str(tmp_path / value) if name in ("path", "tokenizer") else value
    how, notes = resumed(saved, dataclasses.replace(saved, data=dataclasses.replace(saved.data, **{name: value})))
    assert how == resume_from
    assert any(note.startswith(effect) for note in notes), notes
    if name != "sequence_length":
        assert all(note.startswith(f"data.{name}: ") for note in notes)


def test_every_data_setting_is_tested_above():
    (mark,) = test_a_change_of_each_data_setting_reports_its_effect.pytestmark
    tested = {case[0] for case in mark.args[1]} | {"mixture", "name"}  # tests/test_mixture.py, below
    assert tested == {field.name for field in dataclasses.fields(DataConfig)}


def test_a_name_that_the_source_does_not_read_is_refused(lines):
    """It would be silent: the run would continue with the same rows, where the user expects a dataset of TFDS."""
    named = dataclasses.replace(lines, data=dataclasses.replace(lines.data, name="x"))
    with pytest.raises(UserError, match=r"data\.source jsonl does not read data\.name x: set --data\.name ''"):
        resumed(lines, named)


def test_only_changes_give_notes(lines):
    assert resumed(lines, lines) == ("same rows", [])
    for name, expected, effect in (
        ("seed", "first document", "another order of the training documents, read from the first one on"),
        ("batch_size", "next documents", "every row continues after the documents that were read"),
    ):
        settings = dataclasses.replace(lines.train, **{name: 2})
        how, (note,) = resumed(lines, dataclasses.replace(lines, train=settings))
        assert how == expected
        assert note.startswith(f"train.{name}: {effect}")


def edit_a_document(folder):
    file = sorted(folder.iterdir())[17]
    file.write_text(file.read_text()[::-1])


@pytest.mark.parametrize(
    "change",
    [
        edit_a_document,
        lambda folder: (folder / "new.txt").write_text("one more"),
        lambda folder: (folder / "016.txt").unlink(),
        lambda folder: (folder / "017.txt").rename(folder / "aaa.txt"),
    ],
)
def test_a_corpus_that_changed_under_its_path_is_noticed(corpus, tmp_path, change):
    shutil.copytree(corpus.path, tmp_path / "texts")
    config = make_config(dataclasses.replace(corpus, path=str(tmp_path / "texts")))
    before = identify(config)
    assert resumed(config, config, before) == ("same rows", [])
    change(tmp_path / "texts")
    how, notes = resumed(config, config, before)
    assert how == "first document"
    assert notes[0] == "the corpus has changed: other training documents, read from the first one on"


def test_an_older_checkpoint_says_that_it_does_not_know_its_corpus(lines):
    now = identify(lines)
    how, (note,) = resume_data(lines, lines, None, now)
    assert how == "same rows"
    assert note == "data: this checkpoint stores no digest of its corpus, which is taken to be the same"
    changes = {"shuffle_window": 8}, {"sequence_length": 24}, {"source": "text"}, {"train_split": "test"}
    for change in changes:
        config = dataclasses.replace(lines, data=dataclasses.replace(lines.data, **change))
        assert resume_data(lines, config, None, now)[0] == "next documents"
    for change in ({"path": "elsewhere"}, {"workers": 2}, {"validation_split": "test"}):
        config = dataclasses.replace(lines, data=dataclasses.replace(lines.data, **change))
        assert resume_data(lines, config, None, now)[0] == "same rows"


def test_a_position_stores_the_corpus_that_it_counts(lines, tmp_path):
    corpus, folder = identify(lines), epath.Path(tmp_path / "position")
    batches = iter(make_batches(lines, "train", batch_size=4, seed=1))
    save_position(batches, range(4), folder)
    assert read_corpus(folder) is None
    (file,) = folder.iterdir()
    file.write_bytes(DataPosition(batches, range(4), corpus).get_state())
    assert read_corpus(folder) == corpus
    assert sorted(read_positions(folder)) == [0, 1, 2, 3]
    file.write_text(file.read_text().replace(corpus.training[:9], "123456789"))
    with pytest.raises(ValueError, match="does not hold what was written"):
        read_positions(folder)


def test_a_run_resumes_on_another_corpus_with_a_note(trained_run, tmp_path, capsys):
    """The same documents in another folder continue the run; others start with the first batch of a new run."""
    runs = [shutil.copytree(trained_run, tmp_path / name) for name in ("moved", "other")]
    saved = open_model_folder(trained_run).config
    paths = shutil.copytree(saved.data.path, tmp_path / "texts"), write_corpus(tmp_path / "more", 50, seed=7)
    lines, losses = [], []
    for run, path in zip(runs, paths, strict=True):
        config = dataclasses.replace(
            saved,
            data=dataclasses.replace(saved.data, path=str(path)),
            train=dataclasses.replace(saved.train, run_dir=str(run), steps=4),
        )
        train(config)
        lines.append(next(line for line in capsys.readouterr().out.splitlines() if "resuming after step 3" in line))
        records = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
        losses.append([record["train/tokens"] for record in records if "train/tokens" in record][-1])
    for line, path, effect in zip(
        lines,
        paths,
        ("the same training documents", "other training documents, read from the first one on"),
        strict=True,
    ):
        assert f"data.path {saved.data.path} -> {path}" in line
        assert f"; data.path: {effect}" in line
    assert "data.path: other held-out documents: their losses do not compare with earlier ones" in lines[1]
    for path, skip, tokens in zip(paths, (3, 0), losses, strict=True):
        data = dataclasses.replace(saved.data, path=str(path))
        batches = iter(
            make_batches(dataclasses.replace(saved, data=data), "train", batch_size=8, seed=saved.train.seed)
        )
        take(batches, skip)
        assert next(batches)["mask_BT"].sum() == tokens


# A corpus that is smaller than the shuffle window


class Counted:
    """Documents that count how often they are read."""

    def __init__(self, documents):
        self.documents, self.reads = documents, 0

    def __len__(self):
        return len(self.documents)

    def __getitem__(self, index):
        self.reads += 1
        return self.documents[index]


@pytest.mark.parametrize("prompt_key", ["", "body"])
@pytest.mark.parametrize("length", [64, 512, 4096])
def test_a_tiny_corpus_is_not_read_many_times_before_the_first_batch(lines, monkeypatch, length, prompt_key):
    from layerskip_jax.data import pipeline

    counted = Counted(pipeline.open_documents(dataclasses.replace(lines.data, prompt_key=prompt_key), "train"))
    monkeypatch.setattr(pipeline, "open_documents", lambda *_: counted)
    config = make_config(lines.data, sequence_length=length, shuffle_window=2048, prompt_key=prompt_key)
    (batch,) = take(iter(make_batches(config, "train", batch_size=2)), 1)
    tokens = batch["inputs_BT"].size
    fills = sum(len(text) for text in map(counted.documents.__getitem__, range(len(counted)))) / len(counted)
    assert batch["inputs_BT"].shape == (2, length)
    assert counted.reads <= 32 + 3 * len(counted) + 2 * tokens / fills * 10


def test_the_window_follows_the_corpus_and_a_line_reports_it(lines):
    small, large = make_config(lines.data, shuffle_window=2048), make_config(lines.data, shuffle_window=16)
    sequences = identify(small).sequences
    batches = make_batches(small, "train", batch_size=1, in_order=True)
    assert sequences == pytest.approx(sum(1 for _ in batches), rel=0.1)
    assert describe(small)[-1] == (
        f"the corpus fills about {sequences} sequences of 32 tokens, so these are shuffled together, not 2,048 "
        "(data.shuffle_window)"
    )
    assert len(describe(large)) == len(describe(small)) - 1
    follows = make_config(lines.data, shuffle_window=sequences)
    assert_equal_batches(
        take(iter(make_batches(small, "train", batch_size=4, seed=1)), 20),
        take(iter(make_batches(follows, "train", batch_size=4, seed=1)), 20),
    )


def test_a_smaller_window_than_an_older_checkpoint_used_is_another_order(lines):
    config = make_config(lines.data, shuffle_window=2048)
    how, notes = resume_data(config, config, None, identify(config))
    assert how == "next documents"
    assert any(note.startswith("the shuffle window: every row continues after") for note in notes)


def test_a_changed_window_beyond_the_corpus_changes_nothing(lines):
    one, other = (make_config(lines.data, shuffle_window=window) for window in (2048, 4096))
    assert resumed(one, other) == ("same rows", ["data.shuffle_window: the order of the data stays the same"])
