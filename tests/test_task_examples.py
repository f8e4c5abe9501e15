"""Files with examples of a task: JSON lines, CSV and TSV."""

import csv
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerskip_jax.data.documents import as_text
from layerskip_jax.errors import UserError
from layerskip_jax.evaluation.examples import Example, read_file
from layerskip_jax.evaluation.tasks import Task

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
CELL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\t\r\n"), min_size=1, max_size=12)


@given(
    rows=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4),
    mark=st.sampled_from(["", "\ufeff"]),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_quoted_tables_and_json_lines_are_read_as_written(tmp_path_factory, rows, mark, end):
    folder = tmp_path_factory.getbasetemp()
    with (folder / "quoted.csv").open("w", encoding="utf-8", newline="") as file:
        file.write(mark)
        csv.writer(file, lineterminator=end, quoting=csv.QUOTE_ALL).writerows([("q", "a"), *rows])
    lines = [json.dumps({"q": q, "a": a}, ensure_ascii=False) for q, a in rows]
    (folder / "lines.jsonl").write_bytes((mark + f"{end}{end}".join(lines)).encode())
    for name in ("quoted.csv", "lines.jsonl"):
        assert [(row["q"], row["a"]) for row in read_file(str(folder / name))] == rows


@given(rows=st.lists(st.tuples(CELL, CELL), min_size=1, max_size=4), end=st.sampled_from(["\n", "\r\n"]))
def test_tab_separated_cells_are_read_as_written(tmp_path_factory, rows, end):
    file = tmp_path_factory.getbasetemp() / "cells.tsv"
    file.write_bytes(end.join("\t".join(row) for row in [("q", "a"), *rows]).encode())
    assert [(row["q"], row["a"]) for row in read_file(str(file))] == rows


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_long_cells_are_read(tmp_path, kind):
    file = tmp_path / f"long.{kind}"
    file.write_text("q,a\n".replace(",", "\t" if kind == "tsv" else ",") + "x" * 300_000)
    assert read_file(str(file))[0]["q"] == "x" * 300_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("null.jsonl", '{"a": "x"}\n\n{"a": null}', "null.jsonl line 3: the field 'a' must be text, not null"),
        ("list.jsonl", '{"a": ["x", "y"]}', r"list.jsonl line 1: the field 'a' must be text, not \['x', 'y'\]"),
        ("object.jsonl", '{"a": {"b": 1}}', "object.jsonl line 1: the field 'a' must be text"),
        ("bool.jsonl", '{"a": true}', "bool.jsonl line 1: the field 'a' must be text, not True"),
        ("nan.jsonl", '{"a": NaN}', "nan.jsonl line 1: the field 'a' must be text, not nan"),
        ("other.jsonl", '{"b": "x"}', "other.jsonl line 1 has no field 'a'.*it has b"),
        ("row.jsonl", '{"a": "x"}\n["x"]', "row.jsonl line 2 must be a JSON object, not"),
        ("bad.jsonl", '{"a": "x"}\n{"a": ', "bad.jsonl line 2 is not JSON"),
        ("deep.jsonl", "[" * 100_000, "deep.jsonl line 1 is not JSON"),
        ("short.csv", 'q,a\n"x\ny",z\n\nx\n', "short.csv line 5 has no field 'a'.*it has q"),
        ("short.tsv", "q\ta\nx\ty\nx\n", "short.tsv line 3 has no field 'a'"),
        ("long.csv", "q,a\nx,y\nhello, world,x\n", "long.csv line 3 has 3 cells for 2 fields: 'x' follows .*'a'"),
        ("long.tsv", "q\ta\nx\ty\tz\n", "long.tsv line 2 has 3 cells for 2 fields"),
        ("twice.csv", "a,a\nx,y\n", "twice.csv line 1 must name different fields, not a, a"),
        ("line_end.tsv", "q\ta\nx\ry\tz\n", "line_end.tsv line 2 has no field 'a'"),
        ("blank.csv", "\n\n", "blank.csv has no examples"),
    ],
)
def test_a_value_that_is_not_text_is_named_by_file_line_and_field(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content.encode())
    with pytest.raises(UserError, match=message):
        [example["a"] for example in read_file(str(tmp_path / name))]


def test_numbers_are_text_and_unused_fields_may_hold_anything(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 4, "b": 0.5, "ids": null, "list": [1]}')
    (example,) = read_file(str(tmp_path / "a.jsonl"))
    assert (example["a"], example["b"]) == ("4", "0.5")
    (tmp_path / "a.csv").write_text("a,b,note\n4,0.5\n")
    (example,) = read_file(str(tmp_path / "a.csv"))
    assert (example["a"], example["b"]) == ("4", "0.5")
    prompt, cut = Task("{a}: {b}", "", {}, shortens="b").prompt_for(example, [], lambda text: len(text) < 5)
    assert (prompt, cut) == ("4: 0", True)


def test_fields_of_records():
    """TFDS records hold bytes, numpy numbers, and arrays for lists."""
    record = Example({"a": b"caf\xc3\xa9", "b": np.int64(7), "c": np.array([1, 2])}.items(), "example 0 of squad")
    assert (record["a"], record["b"]) == ("café", "7")
    with pytest.raises(UserError, match=r"example 0 of squad: the field 'c' must be text, not array"):
        record["c"]
    with pytest.raises(UserError, match="the field 'x' must be text, not null"):
        as_text(None, "the field 'x'")
