"""The number of lines to read to understand training and decoding, and the length of every file.

Blank lines do not count; comments and docstrings do.
"""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "layerskip_jax"
MODEL = ["model.py", "rope.py", "attention.py"]
TRAINING = [
    "config.py",
    *MODEL,
    "document_attention.py",
    "recipe/*.py",
    "training/loop.py",
    "training/step.py",
    "training/optimizer.py",
]
DECODING = [*MODEL, "cache.py", *(f"decoding/{name}.py" for name in ("state", "rounds", "sampling", "engine"))]


@pytest.mark.parametrize(("patterns", "limit"), [(TRAINING, 2200), (DECODING, 1000)], ids=["training", "decoding"])
def test_reading_cost(patterns, limit):
    """The limit is the total at the time of writing, rounded up to the next hundred."""
    files = [file for pattern in patterns for file in sorted(PACKAGE.glob(pattern))]
    lines = {file.name: sum(bool(line.strip()) for line in file.read_text().splitlines()) for file in files}
    assert len(lines) >= len(patterns)
    assert sum(lines.values()) <= limit, lines


def test_no_file_is_longer_than_400_lines():
    folders = ["layerskip_jax", "configs", "tests", "benchmarks", "examples", "docs", "tpu"]
    files = [*ROOT.glob("*.py"), *(file for folder in folders for file in (ROOT / folder).rglob("*.py"))]
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in files}
    assert {name: length for name, length in lengths.items() if length > 400} == {}
