"""A stand-in for Cloud Storage, and a small run trained into it."""

import contextlib
import json
import uuid
from functools import cache
from pathlib import Path

import pytest
from corpora import VOCABULARY
from etils import epath
from etils.epath.testing import mock_epath

from layerskip_jax import locations
from layerskip_jax.checkpoint.run_folder import json_sha256, sha256
from layerskip_jax.config import Config, DataConfig, DecodeConfig, ModelConfig, OptimizerConfig, TrainConfig
from layerskip_jax.data.sentencepiece_tokenizer import TOKENIZER
from layerskip_jax.training import checkpoints as run_checkpoints
from layerskip_jax.training.loop import train

RUN = "gs://bucket/runs/one"
STEPS = 4
NEW = 12


@contextlib.contextmanager
def served(folder: Path):
    """Serve gs:// from ``folder`` with etils' mock and the rules of a bucket; the working directory is empty.

    Afterwards it must still be empty: nothing was written to a local folder named "gs:".
    """
    here = lambda path: str(path).replace("gs://", f"{folder}/")  # noqa: E731

    def open_(original, path, mode):
        if str(path).startswith("gs://"):
            assert "a" not in mode, f"appends to {path}"
            if "w" in mode:
                return whole(original, Path(here(path)), mode)
        return original(here(path), mode)

    def whole(original, path, mode):
        """A bucket has no folders, so none must be created first, and an object appears when it is complete."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        file = original(str(partial), mode)
        close = file.close

        def finish():
            close()
            if partial.exists():
                partial.replace(path)

        file.close = finish
        return file

    def glob(original, path):
        found = original(here(path))
        return [name.replace(f"{folder}/", "gs://") for name in found] if str(path).startswith("gs://") else found

    one = lambda original, path, **options: original(here(path), **options)  # noqa: E731
    two = lambda original, path, target, **options: original(here(path), here(target), **options)  # noqa: E731
    names = ("exists", "isdir", "listdir", "makedirs", "mkdir", "remove", "rmtree", "stat", "walk")
    work = folder.parent / "work"
    work.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(work):
        patch.setattr(locations, "BUCKET_LIBRARIES", ("json",))
        with mock_epath(open=open_, glob=glob, copy=two, rename=two, replace=two, **dict.fromkeys(names, one)):
            yield
    assert list(work.iterdir()) == []


def run_config(data: DataConfig) -> Config:
    return Config(
        model=ModelConfig(2, 16, 2, 1, 24, VOCABULARY, compute_dtype="float32"),
        data=data,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
        train=TrainConfig(
            run_dir=RUN, steps=STEPS, batch_size=8, evaluate_batches=1, loss_chunk=8, log_every=1, checkpoint_every=2
        ),
        decode=DecodeConfig(exit_layer=1, draft_length=3, max_new_tokens=NEW),
    )


@cache
def trained(data: DataConfig) -> Path:
    """Train `run_config` into the bucket, once per test session; return the folder that holds the bucket."""
    folder = Path(data.tokenizer).parent / "served"
    original = run_checkpoints.checkpoint_folder
    with served(folder), pytest.MonkeyPatch.context() as patch:
        # TensorStore, which writes the arrays, has no mock: it writes to the local folder directly.
        local = lambda config: epath.Path(str(original(config)).replace("gs://", f"{folder}/"))  # noqa: E731
        patch.setattr(run_checkpoints, "checkpoint_folder", local)
        train(run_config(data))
    return folder


def trained_run(data: DataConfig) -> str:
    """Return the run of `trained` as a local folder."""
    return str(trained(data) / RUN.removeprefix("gs://"))


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
