"""Corpora as users have them: one file, a few unequal files, any line end and byte-order mark."""

import codecs
import dataclasses
import hashlib
import itertools
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerskip_jax.checkpoint.huggingface.config_json import read_json
from layerskip_jax.commands.data import main as command
from layerskip_jax.commands.prompts import read_prompts
from layerskip_jax.config import Config, DataConfig
from layerskip_jax.data.corpus import describe_splits
from layerskip_jax.data.corpus_files import hold_out
from layerskip_jax.data.cutting import cut_text
from layerskip_jax.data.sources import open_documents, open_splits
from layerskip_jax.errors import UserError
from layerskip_jax.evaluation.examples import read_file

PARAGRAPHS = [f"Paragraph {n}. " + "".join(f"Words {n}-{i}. " for i in range(40)) for n in range(200)]


def texts(data, split):
    documents = open_documents(data, split)
    return [documents[i] for i in range(len(documents))]


def describe_split(data):
    return describe_splits(data, *open_splits(data))


def text_corpus(path):
    return DataConfig(source="text", path=str(path))


def write_files(folder, **contents):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name.replace("__", "/")).parent.mkdir(exist_ok=True)
        (folder / name.replace("__", "/")).write_bytes(content if isinstance(content, bytes) else content.encode())
    return text_corpus(folder)


def share(data):
    """Return the held-out part of the text; the splits must be disjoint and complete."""
    train, held_out = texts(data, "train"), texts(data, "validation")
    assert train
    assert held_out
    assert not set(train) & set(held_out)
    size = sum(map(len, held_out))
    return size / (size + sum(map(len, train)))


# Cutting


@given(
    units=st.lists(st.sampled_from(["words ", "x", "漢字", "\n", "\n\n", "\n\n\n", "\n \t\n", "\r"]), max_size=60),
    characters=st.integers(1, 20),
)
def test_pieces_cover_the_text_and_do_not_depend_on_line_ends(units, characters):
    text = "".join(units).replace("\r", "")
    spans = cut_text(text, characters)
    pieces = [text[start:end] for start, end in spans]
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    assert all(len(piece.rstrip("\n \t")) <= 2 * characters + 1 for piece in pieces if not piece.startswith("\n"))
    for line_end in ("\r\n", "\r", "\v", "\u2028", "\x85"):
        other = text.replace("\n", line_end)
        found = [other[start:end].replace(line_end, "\n") for start, end in cut_text(other, characters)]
        assert found == pieces


def former_pieces(text, characters=4000):
    """The pieces of earlier versions, whose checkpoints count them."""
    pieces = []
    for paragraph in text.split("\n\n"):
        if pieces and len(pieces[-1]) < characters:
            pieces[-1] += "\n\n" + paragraph
        else:
            pieces.append(paragraph)
    return [piece for piece in pieces if piece.strip()]


def test_a_file_with_plain_blank_lines_keeps_its_documents(tmp_path):
    text = "\n\n".join(PARAGRAPHS) + "\n\n\n\nEnd.\n"
    data = text_corpus(tmp_path / "book.txt")
    (tmp_path / "book.txt").write_text(text)
    assert sorted(texts(data, "train") + texts(data, "validation")) == sorted(former_pieces(text))


@pytest.mark.parametrize(
    "blank", ["\n\n", "\r\n\r\n", "\r\r", "\n \n", "\r\n \t\r\n", "\n\f\n", "\n\u3000\n", "\n\ufeff\n", "\u2028\u2028"]
)
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_one_file_is_cut_at_blank_lines_of_any_spelling(tmp_path, blank, mark):
    (tmp_path / "book.txt").write_bytes(mark + blank.join(PARAGRAPHS).encode())
    data = text_corpus(tmp_path / "book.txt")
    assert 0.01 <= share(data) <= 0.2
    pieces = texts(data, "train") + texts(data, "validation")
    assert sorted(part.strip() for piece in pieces for part in piece.split(blank)) == sorted(map(str.strip, PARAGRAPHS))
    (line,) = describe_split(data)
    assert f"1 file, 1 of them cut: {len(pieces)} documents; held out: " in line
    assert line.startswith(str(tmp_path))  # not a warning


@pytest.mark.parametrize("separator", ["\n", "\r\n", "\r", " ", ""])
def test_one_file_without_blank_lines_is_cut_at_lines_or_lengths(tmp_path, separator):
    words = [f"{number:05d}" for number in range(20_000)]
    text = separator.join(words)
    (tmp_path / "lines.txt").write_text(text, newline="")
    data = text_corpus(tmp_path / "lines.txt")
    assert 0.01 <= share(data) <= 0.2
    pieces = texts(data, "train") + texts(data, "validation")
    assert max(map(len, pieces)) <= 9000
    if separator:
        assert sorted(word for piece in pieces for word in piece.split()) == words
    else:
        assert sum(map(len, pieces)) == len(text)


@pytest.mark.parametrize("length", [1000, 5000, 30_000])
def test_a_short_file_is_cut_into_short_pieces(tmp_path, length):
    (tmp_path / "poem.txt").write_text("\n".join(PARAGRAPHS).replace(". ", ".\n")[:length])
    assert 0.01 <= share(text_corpus(tmp_path / "poem.txt")) <= 0.5
    assert 0.01 <= share(text_corpus(tmp_path)) <= 0.5


# Folders


@pytest.mark.parametrize("sizes", [(1, 1), (50, 30, 20), (100, 1, 1, 1), (5,) * 9, (60, *[1] * 30)])
def test_long_files_of_a_folder_are_cut_before_they_are_dealt_out(tmp_path, sizes):
    data = write_files(
        tmp_path,
        **{
            f"{n} ä.txt": "\n\n".join(p.replace("Words ", f"Words of {n}-") for p in PARAGRAPHS[:size])
            for n, size in enumerate(sizes)
        },
    )
    assert 0.01 <= share(data) <= 0.2
    pieces = texts(data, "train") + texts(data, "validation")
    assert sum(piece.count("Paragraph") for piece in pieces) == sum(sizes)
    (line,) = describe_split(data)
    assert f"{len(sizes)} files" in line
    assert f", {100 * share(data):.1f} % of the text" in line


@pytest.mark.parametrize(
    ("files", "train", "held_out", "left_out"),
    [
        (["a.txt", "b.txt", "valid.txt"], ["a.txt", "b.txt"], ["valid.txt"], []),
        (["a.txt", "val.md"], ["a.txt"], ["val.md"], []),
        (["train.txt", "dev.txt", "test.txt"], ["train.txt"], ["dev.txt"], ["test.txt"]),
        (["train.txt", "test.txt"], ["train.txt"], ["test.txt"], []),
        (["Train__a", "Train__b", "Valid__c"], ["Train__a", "Train__b"], ["Valid__c"], []),
        (["wiki.train.tokens", "wiki.valid.tokens"], ["wiki.train.tokens"], ["wiki.valid.tokens"], []),
        (["train-00.txt", "train-01.txt", "val-00.txt"], ["train-00.txt", "train-01.txt"], ["val-00.txt"], []),
        (["README.md", "LICENSE", "a.txt", "dev.txt", ".hidden"], ["a.txt"], ["dev.txt"], ["LICENSE", "README.md"]),
    ],
)
def test_names_of_held_out_files_are_understood(tmp_path, files, train, held_out, left_out):
    data = write_files(tmp_path, **{name: name for name in files})
    assert texts(data, "train") == train
    assert texts(data, "validation") == held_out
    (line,) = describe_split(data)
    assert f"{len(train) + len(held_out)} files: {len(train) + len(held_out)} documents; held out: " in line
    assert "held out: " + ", ".join(sorted({name.split("__")[0] for name in held_out})) in line
    assert line.partition("; left out: ")[2].startswith(", ".join(left_out))


def test_a_split_is_found_in_the_only_folder(tmp_path):
    data = write_files(tmp_path / "data" / "en", **{"train-0.txt": "train", "valid-0.txt": "valid"})
    (tmp_path / "README.md").write_text("about")
    data = text_corpus(tmp_path)
    assert (texts(data, "train"), texts(data, "validation")) == (["train"], ["valid"])


def test_a_name_that_only_ends_in_test_is_no_split(tmp_path):
    data = write_files(tmp_path, **{f"{name}_test.go": name * 50 for name in "abcdefghijklmnopqrstuvwxyz"})
    assert share(data) <= 0.2


def test_a_test_set_is_not_trained_on(tmp_path):
    data = write_files(tmp_path, **{"a.txt": "train", "valid.txt": "valid", "test.txt": "test"})
    assert [texts(data, name) for name in ("train", "validation", "test")] == [["train"], ["valid"], ["test"]]
    for path in (data.path, tmp_path / "a.txt", write_files(tmp_path / "plain", **{"a.txt": "a"}).path):
        with pytest.raises(UserError, match="has no split 'other': put the files into a folder of that name"):
            texts(text_corpus(path), "other")


def test_files_that_describe_a_corpus_are_left_out_unless_they_are_the_corpus(tmp_path):
    pages = {f"{n:02d}.txt": f"page {n} " * 40 for n in range(30)}
    data = write_files(tmp_path / "one", **pages, **{"README": "about the pages", "LICENSE.txt": "free"})
    assert not any("about" in text or "free" in text for text in texts(data, "train") + texts(data, "validation"))
    assert describe_split(data)[0].endswith("; left out: LICENSE.txt, README")
    readmes = write_files(tmp_path / "two", **{f"README.{n}": f"page {n} " * 40 for n in range(30)})
    assert len(texts(readmes, "train") + texts(readmes, "validation")) == 30


def test_a_warning_says_when_little_or_much_is_held_out(tmp_path, capsys):
    for folder, words, size in (("much", 10, "much"), ("little", 100_000, "little")):
        data = write_files(tmp_path / folder, **{"a.txt": "word " * words, "valid.txt": "word " * 10})
        (line,) = describe_split(data)
        assert line.startswith("WARNING: ")
        assert line.endswith(f"% of the text; that is {size}")
    unequal = write_files(tmp_path / "unequal", **{"a.txt": "word " * 30, "b.txt": "word " * 31})
    assert describe_split(unequal)[0].endswith("; that is much: name files train and validation to choose")
    command(["prepare", "--data.source", "text", "--data.path", str(tmp_path / "much")])
    assert "WARNING: " in capsys.readouterr().out


def test_links_pipes_and_empty_files(tmp_path):
    """A link back to a parent would give every document 40 times, and a pipe would never end."""
    data = write_files(
        tmp_path, **{f"{n:02d}.txt": f"page {n} " * 40 for n in range(20)}, empty="", inner__x="inner " * 40
    )
    (tmp_path / "inner" / "loop").symlink_to(tmp_path)
    (tmp_path / "zz.txt").symlink_to(tmp_path / "00.txt")
    (tmp_path / "nothing").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    assert len(texts(data, "train") + texts(data, "validation")) == 21


def test_files_that_cannot_be_read_as_text(tmp_path):
    cases = {
        "utf16.txt": ("naïve text".encode("utf-16"), "looks like UTF-16 or UTF-32.*iconv -f UTF-16 -t UTF-8"),
        "no_mark.txt": ("naïve text".encode("utf-16-le"), "looks like UTF-16"),
        "latin.txt": ("naïve text".encode("latin-1"), "cannot read .*latin.txt as UTF-8 text"),
        "page.txt.gz": (b"\x1f\x8b", "page.txt.gz is compressed, which cannot be read: unpack it"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            texts(text_corpus(tmp_path / name), "train")
    (tmp_path / "blank.txt").write_text(" \n\n\t\n")
    with pytest.raises(UserError, match=r"the 'train' split of .*blank\.txt is empty"):
        texts(text_corpus(tmp_path / "blank.txt"), "train")
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "a"}\n', encoding="utf-16")
    with pytest.raises(UserError, match="looks like UTF-16"):
        texts(DataConfig(source="jsonl", path=str(lines)), "train")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "lines.jsonl.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(UserError, match="is compressed"):
        texts(DataConfig(source="jsonl", path=str(tmp_path / "packed")), "train")


def test_empty_and_deep_files_are_named(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match=r"the 'train' split of .*empty\.jsonl is empty"):
        texts(DataConfig(source="jsonl", path=str(tmp_path / "empty.jsonl")), "train")
    (tmp_path / "deep.jsonl").write_text(f'{{"text": "a", "x": {"[" * 100_000}\n' * 2)
    with pytest.raises(UserError, match=r"deep\.jsonl line \d is not a JSON object"):
        texts(DataConfig(source="jsonl", path=str(tmp_path / "deep.jsonl")), "train")
    corpus = write_files(tmp_path / "split", **{"train.txt": "", "valid.txt": "text"})
    with pytest.raises(UserError, match=r"the 'train' split of .* has no text: train\.txt is empty"):
        texts(corpus, "train")


def test_file_names_that_are_not_unicode(tmp_path):
    for number in range(20):
        with open(os.fsencode(tmp_path) + b"/\xff%d" % number, "w") as file:
            file.write(f"page {number} " * 40)
    assert len(texts(text_corpus(tmp_path), "train") + texts(text_corpus(tmp_path), "validation")) == 20


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r", "\n\n", "\r\n \r\n"])
def test_json_lines_with_any_line_end(tmp_path, line_end):
    wanted = [f"document {number}\nwith 漢字 and \u2028" for number in range(60)]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in wanted]
    (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF8 + line_end.join(lines).encode())
    data = DataConfig(source="jsonl", path=str(tmp_path))
    assert sorted(texts(data, "train") + texts(data, "validation")) == sorted(wanted)


def test_a_long_line_is_not_all_that_is_held_out(tmp_path):
    lines = ["word " * (2000 if number == 7 else 20) for number in range(100)]
    for order in (lines, lines[::-1], lines[50:] + lines[:50]):
        (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in order))
        data = DataConfig(source="jsonl", path=str(tmp_path))
        held_out = texts(data, "validation")
        assert 0.01 <= sum(map(len, held_out)) / sum(map(len, lines)) <= 0.2


# Byte-order marks


def test_byte_order_marks_are_no_text(tmp_path):
    mark = codecs.BOM_UTF8
    data = write_files(tmp_path / "texts", **{f"{n}.txt": mark + f"page {n} ".encode() * 99 for n in range(30)})
    assert all(text.startswith("page") for text in texts(data, "train") + texts(data, "validation"))
    files = {
        "p.txt": b"one\r\ntwo",
        "p.jsonl": b'{"prompt": "one"}\r{"prompt": "two"}\r',
        "e.jsonl": b'{"a": "1", "b": "2"}',
        "e.csv": b"a,b\n1,2\n",
        "e.tsv": b"a\tb\n1\t2\n",
        "config.json": b'{"a": 1}',
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(mark + content)
    for name in ("p.txt", "p.jsonl"):
        assert read_prompts(None, str(tmp_path / name), None, Config()) == ["one", "two"]
    for name in ("e.jsonl", "e.csv", "e.tsv"):
        assert read_file(str(tmp_path / name)) == [{"a": "1", "b": "2"}]
    assert read_json(tmp_path, "config.json") == {"a": 1}


def test_the_held_out_split_can_be_the_training_text(tmp_path):
    """So that `layerskip evaluate --data.validation_split train` measures the text that the model was trained on."""
    (tmp_path / "book.txt").write_text("\n\n".join(PARAGRAPHS[:40]))
    config = text_corpus(tmp_path / "book.txt")
    same = dataclasses.replace(config, validation_split="train")
    assert texts(same, "train") == texts(config, "train") != texts(config, "validation")


def test_json_lines_that_disappear_are_one_line(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"text": str(number)}) for number in range(20)))
    documents = open_documents(DataConfig(source="jsonl", path=str(file)), "train")
    file.unlink()
    with pytest.raises(UserError, match=r"cannot read .*a\.jsonl"):
        _ = documents[0]


# Prompts


def test_held_out_text_with_lone_surrogates_can_be_printed(tmp_path):
    lines = [json.dumps({"text": f"document {number} \ud83d and more of it"}) for number in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    prompts = read_prompts(None, None, 1, Config(data=DataConfig(source="jsonl", path=str(tmp_path))))
    assert "\ufffd" in prompts[0].encode().decode()


def test_few_held_out_documents_give_many_prompts(tmp_path):
    (tmp_path / "book.txt").write_text("\n\n".join(PARAGRAPHS[:40]))
    config = Config(data=text_corpus(tmp_path / "book.txt"))
    documents = texts(config.data, "validation")
    assert len(documents) < 8
    prompts = read_prompts(None, None, 8, config)
    assert len(prompts) == len(set(prompts)) == 8
    assert all(any(prompt in document for document in documents) for prompt in prompts)
    assert all(10 <= len(prompt) <= 200 and not prompt[0].isspace() for prompt in prompts)
    assert read_prompts(None, None, 1, config) == [documents[0][:200]]


# The split by name


@given(
    st.lists(
        st.tuples(st.text("abc", min_size=1, max_size=3), st.integers(1, 30)), min_size=1, unique_by=lambda x: x[0]
    )
)
def test_documents_keep_the_split_of_earlier_versions_unless_much_is_held_out(documents):
    names, sizes = zip(*documents, strict=True)
    ranks = [int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100 for name in names]
    former = {i for i, rank in enumerate(ranks) if rank < 5}
    if len(names) >= 2 and not former:
        former = {min(range(len(names)), key=lambda i: (ranks[i], names[i]))}
    train, held_out = (hold_out(names, sizes, DataConfig(), split).tolist() for split in ("train", "validation"))
    assert sorted(train + held_out) == list(range(len(names)))
    assert len(names) == 1 or (train and held_out)
    if sum(sizes[i] for i in former) <= 0.2 * sum(sizes):
        assert set(held_out) == former
    elif min(sizes) <= 0.2 * sum(sizes):
        assert sum(sizes[i] for i in held_out) <= 0.2 * sum(sizes)
