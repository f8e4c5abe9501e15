"""Read the examples of a task from TFDS or from a local file, as dictionaries of strings."""

import csv
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from layerskip_jax.config import DataConfig
from layerskip_jax.data.documents import as_text
from layerskip_jax.data.sources import open_records
from layerskip_jax.errors import UserError, nearest

CELL_LIMIT = 2**31 - 1
"""Characters of a CSV cell; the csv module's own limit, 131,072, is less than a long article has."""


class Example(dict[str, Any]):
    """The fields of one example, by name. ``example[field]`` is text, see `as_text`; ``source`` names the example.

    A field that is missing or not text raises `UserError` when it is read, so the fields that a task does not use may
    hold anything.
    """

    def __init__(self, fields: Iterable[tuple[str, Any]], source: str):
        super().__init__(fields)
        self.source = source

    def __getitem__(self, field: str) -> str:
        if field not in self:
            raise UserError(f"{self.source} has no field {field!r}{nearest(field, self)}: it has {', '.join(self)}")
        return as_text(super().__getitem__(field), f"{self.source}: the field {field!r}")


class TaskExamples(NamedTuple):
    """The examples to answer, and the solved ones to show in every prompt."""

    asked: list[Example]
    shots: list[Example]


def read_file(path: str, limit: int | None = None) -> list[Example]:
    """Read up to ``limit`` examples of a .jsonl file, or of a .csv or .tsv file with column names in its first line.

    Raises `UserError`, which names the line, for a line that is not an example.
    """
    readers = {".jsonl": _json_lines, ".csv": _table, ".tsv": _table}
    file = Path(path)
    if file.suffix not in readers:
        raise UserError(f"examples must be a .jsonl, .csv or .tsv file, not {path}")
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            examples = list(itertools.islice(readers[file.suffix](path, opened), limit))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read examples from {path}: {error}") from error
    if not examples:
        raise UserError(f"{path} has no examples")
    return examples


def _json_lines(path: str, opened: TextIO) -> Iterator[Example]:
    for number, line in enumerate(opened, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path} line {number} must be a JSON object, not {row!r:.40}")
        yield Example(row.items(), f"{path} line {number}")


def _table(path: str, opened: TextIO) -> Iterator[Example]:
    """Read a table. Fields at the end of a short row are missing; a row with more cells than names is refused."""
    csv.field_size_limit(CELL_LIMIT)
    tabs: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.endswith(".tsv") else {}
    reader = csv.reader(opened, **tabs)
    try:
        names = next(filter(None, reader), [])
        if len(set(names)) < len(names):
            raise UserError(f"{path} line {reader.line_num} must name different fields, not {', '.join(names)}")
        first = reader.line_num + 1
        for cells in reader:
            number, first = first, reader.line_num + 1
            if len(cells) > len(names):
                raise UserError(
                    f"{path} line {number} has {len(cells)} cells for {len(names)} fields: {cells[len(names)]!r:.40} "
                    f"follows the last field, {names[-1]!r}; quote a cell with a separator in it"
                )
            if cells:
                yield Example(zip(names, cells, strict=False), f"{path} line {number}")
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num} is not a row of a table: {error}") from error


def read_tfds(name: str, data_dir: str, split: str, limit: int | None = None) -> list[Example]:
    """Read up to ``limit`` examples of a TFDS dataset that is prepared as ArrayRecord in ``data_dir``."""
    records = open_records(DataConfig(source="tfds", name=name, data_dir=data_dir), split)
    count = len(records) if limit is None else min(limit, len(records))
    return [Example(records[index].items(), f"example {index} of {name}") for index in range(count)]
