"""Sources, tokenizers and packing: no token is lost, and no row mixes up its documents."""

import dataclasses
import itertools
import json
import pickle
import sys

import numpy as np
import pytest
from corpora import VOCABULARY, write_corpus
from hypothesis import example, given
from hypothesis import strategies as st

from layerskip_jax.commands.data import main as command
from layerskip_jax.commands.prompts import read_prompts
from layerskip_jax.config import Config, DataConfig, ModelConfig
from layerskip_jax.data.documents import documents_digest
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.data.pipeline import document_tokens, make_batches
from layerskip_jax.data.pretokenize import pretokenize
from layerskip_jax.data.sentencepiece_tokenizer import train_tokenizer
from layerskip_jax.data.sources import open_documents
from layerskip_jax.errors import UserError
from layerskip_jax.evaluation.examples import read_tfds


def make_config(corpus, **changes):
    return Config(model=ModelConfig(vocab_size=VOCABULARY), data=dataclasses.replace(corpus, **changes))


def texts(data, split):
    documents = open_documents(data, split)
    return [documents[i] for i in range(len(documents))]


# Tokenizer


@given(text=st.text())
@example(" leading and trailing ")
@example("\t\r\n  \n\n")
@example("a\u2581b\u2581\u2581 \u2581")
@example("\x00 nul and \ufffd")
@example("   four    spaces 漢字 🎉")
def test_decoding_restores_the_text(tokenizer, text):
    text = text.encode("utf-8", "replace").decode()  # no lone surrogates: they are not text
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@given(text=st.text())
def test_partial_decoding_only_appends(tokenizer, text):
    text = text.encode("utf-8", "replace").decode()
    ids, before = tokenizer.encode(text), ""
    for n in range(len(ids) + 1):
        now = tokenizer.decode_partial(ids[:n])
        assert now.startswith(before)
        assert text.startswith(now)
        before = now
    assert before == text


def test_training_is_deterministic_and_pickles(corpus, tokenizer, tmp_path):
    again = train_tokenizer(open_documents(corpus, "train"), str(tmp_path / "again.model"), VOCABULARY)
    assert again == tokenizer
    assert pickle.loads(pickle.dumps(tokenizer)).encode("x = 1") == tokenizer.encode("x = 1")


def test_tokenizer_errors(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer at .*layerskip data tokenizer"):
        load_tokenizer(str(tmp_path / "none.model"))
    (tmp_path / "broken.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        load_tokenizer(str(tmp_path / "broken.model"))
    with pytest.raises(UserError, match=rf"has {VOCABULARY} pieces and the model's vocabulary 999"):
        tokenizer.check_vocabulary(999)


# Sources


def test_splits_of_files_are_disjoint_complete_and_stable(corpus):
    train, validation = texts(corpus, "train"), texts(corpus, "validation")
    assert len(train) + len(validation) == 40
    assert not set(train) & set(validation)
    assert validation
    assert texts(corpus, "validation") == validation


def test_folders_named_after_splits_are_the_splits(tmp_path):
    write_corpus(tmp_path / "train", 3)
    write_corpus(tmp_path / "validation", 2, seed=1)
    data = DataConfig(source="text", path=str(tmp_path))
    assert (len(texts(data, "train")), len(texts(data, "validation"))) == (3, 2)


def test_one_text_file_is_cut_at_blank_lines(tmp_path):
    paragraphs = [f"paragraph {i} " + "word " * 400 for i in range(30)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    data = DataConfig(source="text", path=str(tmp_path / "book.txt"))
    pieces = texts(data, "train") + texts(data, "validation")
    assert texts(data, "validation")
    assert sorted("\n\n".join(pieces).split("\n\n")) == sorted(paragraphs)


def test_json_lines(tmp_path):
    lines = [{"text": f"document {i}\nwith 漢字", "other": i} for i in range(50)]
    (tmp_path / "all.jsonl").write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n")
    data = DataConfig(source="jsonl", path=str(tmp_path))
    assert sorted(texts(data, "train") + texts(data, "validation")) == sorted(line["text"] for line in lines)
    with pytest.raises(UserError, match=r"all\.jsonl line \d+ is not a JSON object with a text in 'body'"):
        texts(dataclasses.replace(data, text_key="body"), "train")
    (tmp_path / "all.jsonl").write_text('{"text": "good"}\n{broken\n')
    with pytest.raises(UserError, match=r"all\.jsonl line 2 is not a JSON object"):
        texts(data, "train") + texts(data, "validation")


def test_python_stdlib_is_a_tfds_dataset_with_splits_by_file(tmp_path, monkeypatch):
    from layerskip_jax.data.python_stdlib import python_stdlib_dataset_builder as stdlib

    files = dict(itertools.islice(stdlib.source_files().items(), 60))
    monkeypatch.setattr(stdlib, "source_files", lambda: files)
    data = DataConfig(source="python_stdlib", data_dir=str(tmp_path))
    train, validation = texts(data, "train"), texts(data, "validation")
    assert validation
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(t for f in files.values() if (t := f.read_text("utf-8")).strip())
    # The same dataset by name, through the source "tfds" and its slicing.
    tfds_data = DataConfig(source="tfds", name=f"python_stdlib/{_version()}", data_dir=str(tmp_path))
    assert texts(tfds_data, "train") == train
    assert [example["text"] for example in read_tfds(tfds_data.name, str(tmp_path), "train", 2)] == train[:2]
    assert len(texts(tfds_data, "train[:50%]")) == round(len(train) / 2)
    with pytest.raises(UserError, match=r"cannot be split by 'train\[:90'"):
        texts(tfds_data, "train[:90")
    with pytest.raises(UserError, match="has no split 'test': it has train, validation"):
        texts(tfds_data, "test")
    with pytest.raises(UserError, match=r"has no field 'txt' \(data.text_key\); did you mean 'text'"):
        texts(dataclasses.replace(tfds_data, text_key="txt"), "train")


@pytest.mark.parametrize("formats", [("tfrecord", ["array_record"]), ("riegeli", ["tfrecord", "array_record"])])
def test_any_random_access_format_of_a_tfds_dataset_is_read(tmp_path, monkeypatch, formats):
    from layerskip_jax.data.python_stdlib import python_stdlib_dataset_builder as stdlib

    files = dict(itertools.islice(stdlib.source_files().items(), 60))
    monkeypatch.setattr(stdlib, "source_files", lambda: files)
    wanted = texts(DataConfig(source="python_stdlib", data_dir=str(tmp_path)), "train")
    (file,) = tmp_path.rglob("dataset_info.json")
    info = json.loads(file.read_text())
    assert info["fileFormat"] == "array_record"
    data = DataConfig(source="tfds", name=f"python_stdlib/{_version()}", data_dir=str(tmp_path))
    file.write_text(json.dumps(info | {"fileFormat": formats[0], "alternativeFileFormats": formats[1]}))
    assert texts(data, "train") == wanted
    assert len(texts(data, "train[:50%]")) == round(len(wanted) / 2)
    file.write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(UserError, match=r"is stored as tfrecord, which cannot be read without TensorFlow: prepare it"):
        open_documents(data, "train")


@pytest.mark.parametrize("prepared", [True, False])
def test_two_processes_may_prepare_the_same_dataset(tmp_path, monkeypatch, prepared):
    """The slower one fails to rename its folder; it then uses the dataset of the other, if there is one."""
    from layerskip_jax.data.python_stdlib import python_stdlib_dataset_builder as stdlib

    files = dict(itertools.islice(stdlib.source_files().items(), 60))
    monkeypatch.setattr(stdlib, "source_files", lambda: files)
    prepare = stdlib.Builder.download_and_prepare

    def prepare_too_late(builder, **options):
        if prepared:
            prepare(stdlib.Builder(data_dir=str(tmp_path), file_format="array_record"), **options)
        raise FileExistsError("cannot rename")

    monkeypatch.setattr(stdlib.Builder, "download_and_prepare", prepare_too_late)
    data = DataConfig(source="python_stdlib", data_dir=str(tmp_path))
    if prepared:
        assert texts(data, "train")
    else:
        with pytest.raises(FileExistsError):
            texts(data, "train")


def _version():
    return f"python{sys.version_info.major}_{sys.version_info.minor}"


def test_source_errors(tmp_path):
    (tmp_path / "empty").mkdir()
    cases = [
        ({"source": "text", "path": str(tmp_path / "nowhere")}, r"no corpus at .*nowhere \(data.path\)"),
        ({"source": "text", "path": str(tmp_path / "empty")}, r"no files under .*empty \(data.path\)"),
        ({"source": "jsonl", "path": str(tmp_path / "empty")}, r"no files ending in .jsonl or .json under"),
        ({"source": "tokens", "path": str(tmp_path / "empty")}, r"no pretokenized corpus at .*pretokenize --out"),
        (
            {"path": "texts"},
            r"does not read data.path texts: set --data.path '', or --data.source text",
        ),
        (
            {"name": "lm1b"},
            r"does not read data.name lm1b: set --data.name '', or --data.source tfds",
        ),
        ({"source": "text", "path": "texts", "name": "lm1b"}, r"data.source text does not read data.name lm1b"),
        ({"source": "tfds", "name": "wikipediaa", "data_dir": str(tmp_path)}, "knows no dataset 'wikipediaa'; did you"),
        ({"source": "tfds", "name": "lm1b", "data_dir": str(tmp_path)}, "'lm1b' is not prepared in .* tfds build lm1b"),
    ]
    for changes, message in cases:
        with pytest.raises(UserError, match=message):
            open_documents(DataConfig(**changes), "train")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(UserError, match=r"cannot read .*latin\.txt as UTF-8"):
        texts(DataConfig(source="text", path=str(tmp_path / "latin.txt")), "train")


def test_a_folder_with_one_split_does_not_provide_the_other(tmp_path):
    """Otherwise held-out text would be training text."""
    lines = "".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(40))
    for name in ("lines/train.jsonl", "lines/mine.jsonl", "texts/train/a", "texts/train/b", "texts/mine/c"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(lines.replace("document", f"{name} document"))
    lines_data = DataConfig(source="jsonl", path=str(tmp_path / "lines"))
    texts_data = DataConfig(source="text", path=str(tmp_path / "texts"))
    for config, own in ((lines_data, "train.jsonl"), (texts_data, "train")):
        with pytest.raises(UserError, match=r"has a 'train' split but no 'validation'.*found: .*mine"):
            open_documents(config, "validation")
        inner = dataclasses.replace(config, path=f"{config.path}/{own}")
        assert not set(texts(inner, "train")) & set(texts(inner, "validation"))
        assert texts(config, "train")
        named = texts(dataclasses.replace(config, validation_split="mine"), "mine")
        assert len(named) == (40 if config.source == "jsonl" else 1)
    (tmp_path / "files").mkdir()
    for name in ("train", "validation"):
        (tmp_path / "files" / f"{name}.txt").write_text(name)
    files_data = DataConfig(source="text", path=str(tmp_path / "files"))
    assert [texts(files_data, name) for name in ("train", "validation")] == [["train"], ["validation"]]


# Packing


def packed_rows(documents, length):
    """Pack by hand: concatenate and cut, a row of inputs, targets, segments and mask each. The oracle."""
    stream = [(token, number) for number, document in enumerate(documents) for token in document]
    for start in range(0, len(stream), length + 1):
        piece = stream[start : start + length + 1]
        numbers = sorted({number for _, number in piece})
        tokens = [token for token, _ in piece] + [0] * (length + 1 - len(piece))
        segments = [numbers.index(number) + 1 for _, number in piece] + [0] * (length + 1 - len(piece))
        mask = [float(a == b != 0) for a, b in itertools.pairwise(segments)]
        yield tokens[:-1], tokens[1:], segments[:-1], mask


@pytest.mark.parametrize("processes", [1, 2])
def test_packing_in_order_equals_a_plain_loop(corpus, tokenizer, processes):
    config = make_config(corpus)
    documents = [document_tokens(tokenizer, text).tolist() for text in texts(corpus, "train")]
    expected = list(packed_rows(documents, 32))
    parts = [list(make_batches(config, "train", rows=rows, **IN_ORDER)) for rows in shares(8, processes)]
    assert len({len(part) for part in parts}) == 1  # all processes get equally many batches
    rows = []
    for batches in zip(*parts, strict=True):
        for batch in batches:
            columns = (batch[name].tolist() for name in ("inputs_BT", "targets_BT", "segments_BT", "mask_BT"))
            rows += list(zip(*columns, strict=True))
    assert rows[: len(expected)] == expected
    assert all(not any(mask) for _, _, _, mask in rows[len(expected) :])  # padding


IN_ORDER = {"batch_size": 8, "in_order": True}


def shares(batch_size, processes):
    """Return the rows of a batch that each of ``processes`` holds."""
    return [range(i * batch_size // processes, (i + 1) * batch_size // processes) for i in range(processes)]


def test_rows_together_read_every_document_of_an_epoch_once(corpus, tokenizer):
    """Documents are dealt out in turn, so the first halves of both rows are the corpus."""
    batches = iter(make_batches(make_config(corpus, shuffle_window=1), "train", batch_size=2, seed=3))
    streams = [[], []]
    documents = sorted(document_tokens(tokenizer, text).tolist() for text in texts(corpus, "train"))
    counts = [len(documents) - len(documents) // 2, len(documents) // 2]
    while any(stream.count(tokenizer.eos_id) < share for stream, share in zip(streams, counts, strict=True)):
        batch = next(batches)
        for stream, inputs, targets in zip(streams, batch["inputs_BT"], batch["targets_BT"], strict=True):
            stream += [*inputs.tolist(), targets[-1].item()]
    seen = []
    for stream, share in zip(streams, counts, strict=True):
        for _ in range(share):
            end = stream.index(tokenizer.eos_id) + 1
            seen.append(stream[:end])
            del stream[:end]
    assert sorted(seen) == documents


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_equal_batches(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[name], b[name]) for name in a)


def test_digests_distinguish_corpora(tmp_path):
    digests = [
        documents_digest(documents) for documents in (["a", "b"], ["a", "c"], ["b", "a"], ["a", "a", "b"], ["\ud800"])
    ]
    assert len(set(digests)) == len(digests)
    tokens = [np.array([1, 2], np.int32)]
    assert (
        documents_digest(tokens)
        == documents_digest([tokens[0].copy()])
        != documents_digest([np.array([1, 3], np.int32)])
    )


def test_the_order_depends_on_the_seed(corpus):
    def first(seed):
        return next(iter(make_batches(make_config(corpus), "train", batch_size=4, seed=seed)))["inputs_BT"].tolist()

    assert first(0) == first(0)
    assert first(0) != first(1)


def test_attention_across_documents_is_a_setting(corpus):
    batch = next(iter(make_batches(make_config(corpus, cross_document_attention=True), "train", batch_size=8)))
    assert (batch["segments_BT"] == 1).all()
    assert (batch["mask_BT"] == 1).all()
    batch = next(iter(make_batches(make_config(corpus), "train", batch_size=64)))
    assert batch["segments_BT"].max() > 1
    assert not batch["mask_BT"].all()


def test_the_sizes_of_a_corpus_are_bytes_or_tokens(corpus, tmp_path, capsys):
    metadata = pretokenize(corpus, str(tmp_path / "tokens"))
    for source in ("text", "tokens"):
        path = corpus.path if source == "text" else str(tmp_path / "tokens")
        command(["prepare", "--data.source", source, "--data.path", path, "--data.tokenizer", corpus.tokenizer])
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == (3 if source == "text" else 2)
        for line, split in zip(lines, ("train", "validation"), strict=False):
            counts, size = metadata["splits"][split], sum(len(text.encode()) for text in texts(corpus, split))
            total = f"{size:,} bytes" if source == "text" else f"{counts['tokens']:,} tokens"
            assert line == f"{split}: {counts['documents']} documents, {total}"


def test_held_out_prompts_need_a_corpus_of_text(corpus, tmp_path):
    pretokenize(corpus, str(tmp_path / "tokens"))
    with pytest.raises(UserError, match="--held_out needs a corpus of text"):
        read_prompts(None, None, 1, make_config(corpus, source="tokens", path=str(tmp_path / "tokens")))


def test_a_missing_split_is_found_before_the_other_is_tokenized(corpus, tmp_path, monkeypatch):
    def open_or_fail(config, split):
        if split == config.validation_split:
            raise UserError("no split 'validation'")
        return open_documents(config, split)

    monkeypatch.setattr("layerskip_jax.data.sources.open_documents", open_or_fail)
    monkeypatch.setattr("layerskip_jax.data.pretokenize._write_split", lambda *_: pytest.fail("tokenized"))
    with pytest.raises(UserError, match="no split 'validation'"):
        pretokenize(corpus, str(tmp_path / "tokens"))


def test_pretokenized_corpus_gives_the_same_batches(corpus, tmp_path):
    metadata = pretokenize(corpus, str(tmp_path / "tokens"))
    assert metadata["splits"]["train"]["documents"] == len(texts(corpus, "train"))
    tokens = {"source": "tokens", "path": str(tmp_path / "tokens")}
    ours = iter(make_batches(make_config(corpus, **tokens), "train", batch_size=4, seed=2))
    assert_equal_batches(
        take(ours, 50), take(iter(make_batches(make_config(corpus), "train", batch_size=4, seed=2)), 50)
    )
    shard, *_ = (tmp_path / "tokens" / "train").iterdir()
    shard.rename(tmp_path / "lost")
    count = metadata["splits"]["train"]["documents"]
    with pytest.raises(
        UserError, match=rf"has 0 documents in 0 shards, but {count} were written: copy the whole folder"
    ):
        open_documents(dataclasses.replace(corpus, **tokens), "train")
    (tmp_path / "lost").rename(shard)
    with pytest.raises(UserError, match="exists: give --out a new folder"):
        pretokenize(corpus, str(tmp_path / "tokens"))
    train_tokenizer(open_documents(corpus, "train"), str(tmp_path / "other.model"), VOCABULARY - 1)
    with pytest.raises(UserError, match="was made with another tokenizer"):
        open_documents(dataclasses.replace(corpus, tokenizer=str(tmp_path / "other.model"), **tokens), "train")
