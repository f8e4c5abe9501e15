"""TFDS builder for the source code of the local Python standard library."""

import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from layerskip_jax.data.documents import VALIDATION_PERCENT

SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3", "ensurepip"}


def is_held_out(relative_path: str) -> bool:
    """Return whether a file belongs to the validation split. It depends only on the path, so it never changes."""
    return int(hashlib.sha256(relative_path.encode()).hexdigest(), 16) % 100 < VALIDATION_PERCENT


def source_files() -> dict[str, Path]:
    """Return the library's Python files by relative path, sorted, without tests and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = {path.relative_to(root): path for path in sorted(root.rglob("*.py"))}
    return {str(name): path for name, path in files.items() if not SKIPPED & set(name.parts[:-1])}


class Builder(tfds.core.GeneratorBasedBuilder):
    """One example for each file. The config names the Python version, because each has another library."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012  (TFDS reads this list from the class)
        tfds.core.BuilderConfig(
            name=f"python{sys.version_info.major}_{sys.version_info.minor}",
            description="the standard library of this Python version",
        )
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Source code of the Python standard library on this machine (PSF licence), without its tests.",
            features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "path": tfds.features.Text()}),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples(False), "validation": self._generate_examples(True)}

    def _generate_examples(self, held_out: bool) -> Iterator[tuple[str, dict[str, str]]]:
        for name, path in source_files().items():
            if is_held_out(name) != held_out:
                continue
            try:
                text = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue  # a few files have another encoding on purpose
            if text.strip():
                yield name, {"text": text, "path": name}
