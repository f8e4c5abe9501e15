"""The house in order: imports follow the arrows, files are short, and the two loops can be read in an evening."""

import ast
import tomllib
from pathlib import Path

import pytest

from benchmarks.lines_to_read import DECODE_LOOP, TRAIN_LOOP, lines_of, python_files

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "layerskip_jax"
# From what needs nothing to what needs the rest; a module may import what stands before it, or in its own row.
LAYERS = [
    {"errors"},
    {"checks", "locations", "compiler_options"},
    {"config"},
    {"command_line", "sharding", "attention", "layer_dropout", "early_exit", "distributed", "goodput", "watch"},
    {"model", "recipe", "optimizer", "skipping", "compiled", "digests"},
    {"data", "flops"},
    {"losses"},
    {"train_step"},
    {"llama"},
    {"metrics", "checkpoint"},
    {"run_checkpoints"},
    {"progress", "bad_steps"},
    {"decoding", "quantization"},
    {"training", "plots"},
    {"evaluation"},
    {"commands", "sweep", "report", "export"},
]


def imports(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("layerskip_jax"):
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(file):
    place = {name: rank for rank, names in enumerate(LAYERS) for name in names}
    own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own != "__init__":
        assert [name for name in imports(file) if place[name] > place[own]] == []


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
