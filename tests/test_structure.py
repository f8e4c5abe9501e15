"""Packaging, public names, forbidden imports, and the size of functions."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import layerskip_jax

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "layerskip_jax"


def test_every_package_is_packaged():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    real = {".".join(file.parent.relative_to(ROOT).parts) for file in PACKAGE.rglob("*.py")}
    assert sorted(listed) == sorted({*real, "layerskip_jax.configs"})


def test_nothing_imports_tensorflow():
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "tensorflow" for name in names), file


def test_public_names_are_imported_when_used():
    code = "import sys, layerskip_jax as l; assert 'jax' not in sys.modules; [getattr(l, name) for name in l.__all__]"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=300)
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        _ = layerskip_jax.Trainer


def test_functions_are_short_enough_to_read():
    """At most 60 lines and 7 parameters; `generate` has 5 options that are keywords only."""
    long, wide = [], []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                name = f"{file.relative_to(PACKAGE)}: {node.name}"
                long += [name] if node.end_lineno - node.lineno >= 60 else []
                wide += [name] if len([n for n in names if n not in ("self", "cls")]) > 7 else []
    assert (long, wide) == ([], ["decoding/engine.py: generate"])
