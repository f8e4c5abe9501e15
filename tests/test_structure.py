"""Packaging, file length, the length of the two loops, and what no import may need."""

import ast
import tomllib
from pathlib import Path

from benchmarks.lines_to_read import DECODE_LOOP, TRAIN_LOOP, lines_of, python_files

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "layerskip_jax"


def test_every_package_is_packaged():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    real = {".".join(file.parent.relative_to(ROOT).parts) for file in PACKAGE.rglob("*.py")}
    assert sorted(listed) == sorted({*real, "layerskip_jax.configs"})


def test_no_file_is_longer_than_400_lines():
    for file in python_files():
        assert len(file.read_text().splitlines()) <= 400, file


def test_the_loops_are_short_enough_to_read():
    assert lines_of(TRAIN_LOOP) < 900
    assert lines_of(DECODE_LOOP) < 500


def test_nothing_needs_tensorflow_at_import():
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert not any(alias.name.split(".")[0] == "tensorflow" for alias in node.names)
