"""Buckets of a server on this machine, and a small run that is trained into a folder or a bucket."""

import contextlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from corpora import VOCABULARY

from benchmarks.bucket_server import Faults
from layerskip_jax.checkpoint.run_folder import json_sha256, sha256
from layerskip_jax.config import Config, DataConfig, DecodeConfig, ModelConfig, OptimizerConfig, TrainConfig
from layerskip_jax.data.sentencepiece_tokenizer import TOKENIZER
from layerskip_jax.training.loop import train

STEPS = 4
NEW = 12


@dataclass(frozen=True)
class Storage:
    """Cloud Storage on this machine. Every bucket is a folder of ``folder``, and every object a file."""

    folder: Path
    faults: Faults
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def new(self) -> str:
        """Make a bucket; return its gs:// path."""
        name = f"bucket{next(self._numbers)}"
        (self.folder / name).mkdir()
        return f"gs://{name}"

    def local(self, path: str) -> Path:
        """Return the folder with the objects of a gs:// path."""
        return self.folder / path.removeprefix("gs://")


def objects(folder: Path) -> set[str]:
    """Return the names of the objects below a folder, without the empty folders that the server leaves behind."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def run_config(data: DataConfig, run_dir: str) -> Config:
    return Config(
        model=ModelConfig(2, 16, 2, 1, 24, VOCABULARY, compute_dtype="float32"),
        data=data,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
        train=TrainConfig(
            run_dir=run_dir,
            steps=STEPS,
            batch_size=8,
            evaluate_batches=1,
            loss_chunk=8,
            log_every=1,
            checkpoint_every=2,
        ),
        decode=DecodeConfig(exit_layer=1, draft_length=3, max_new_tokens=NEW),
    )


@cache
def train_once(data: DataConfig) -> str:
    """Train `run_config` in a local folder, once per test session; return the folder."""
    folder = str(Path(data.tokenizer).parent / "trained")
    train(run_config(data, folder))
    return folder


def changed(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def sign(step):
    """Store the digests of the present content of a checkpoint, as a malicious checkpoint would."""

    def signed(checksums):
        with contextlib.suppress(OSError, ValueError, RecursionError):
            checksums["config"] = json_sha256(json.loads((step / "config" / "metadata").read_text()))
        tokenizer = step.parent / TOKENIZER
        checksums["tokenizer"] = {TOKENIZER: sha256(tokenizer.read_bytes())} if tokenizer.exists() else {}

    changed(step / "checksums" / "metadata", signed)
