"""Read the examples of a task from TFDS or from a local file, as dictionaries of strings."""

import csv
import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from layerskip_jax.config import DataConfig
from layerskip_jax.data.sources import open_records
from layerskip_jax.errors import UserError, nearest

Example = Mapping[str, str]


class TaskExamples(NamedTuple):
    """The examples to answer, and the solved ones to show in every prompt."""

    asked: list[Example]
    shots: list[Example]


def read_file(path: str, limit: int | None = None) -> list[Example]:
    """Read up to ``limit`` examples of a .jsonl file, or of a .csv or .tsv file with column names in its first line."""
    file = Path(path)
    if file.suffix not in (".jsonl", ".csv", ".tsv"):
        raise UserError(f"examples must be a .jsonl, .csv or .tsv file, not {path}")
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            rows: Iterable[Any]
            if file.suffix == ".jsonl":
                rows = (json.loads(line) for line in opened if line.strip())
            elif file.suffix == ".csv":
                rows = csv.DictReader(opened)
            else:
                rows = csv.DictReader(opened, delimiter="\t", quoting=csv.QUOTE_NONE)
            examples = [_strings(row) for row in itertools.islice(rows, limit)]
    except (OSError, ValueError, AttributeError, csv.Error) as error:
        raise UserError(f"cannot read examples from {path}: {error}") from error
    if not examples:
        raise UserError(f"{path} has no examples")
    return examples


def read_tfds(name: str, data_dir: str, split: str, limit: int | None = None) -> list[Example]:
    """Read up to ``limit`` examples of a TFDS dataset that is prepared as ArrayRecord in ``data_dir``."""
    records = open_records(DataConfig(source="tfds", name=name, data_dir=data_dir), split)
    count = len(records) if limit is None else min(limit, len(records))
    return [_strings(records[index]) for index in range(count)]


def _strings(row: Mapping[str, Any]) -> Example:
    return {
        str(name): value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
        for name, value in row.items()
    }


def require_fields(example: Example, fields: Iterable[str]) -> None:
    """Raise `UserError` unless ``example`` has all ``fields``."""
    for field in fields:
        if field not in example:
            known = ", ".join(example)
            raise UserError(
                f"the examples of the task have no field {field!r}{nearest(field, example)}: they have {known}"
            )
