"""A run folder in a bucket: everything is written there, and nothing into a local folder named ``gs:``."""

import json
from pathlib import Path

import pytest
from corpora import VOCABULARY
from etils import epath
from etils.epath.testing import mock_epath

from layerskip_jax import checkpoint, locations
from layerskip_jax.checkpoint import find_checkpoint, read_config, store_swept, swept_settings
from layerskip_jax.config import Config, ModelConfig, OptimizerConfig, TrainConfig
from layerskip_jax.data.tokenizer import Tokenizer
from layerskip_jax.errors import UserError
from layerskip_jax.locations import locate
from layerskip_jax.metrics import MetricsWriter, read_records
from layerskip_jax.plots import plot_run
from layerskip_jax.training import train

RUN = "gs://bucket/runs/one"


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """Serve gs:// from a local folder through etils' own stand-in, with a bucket's rule: no file is appended to."""
    served = tmp_path / "served"
    here = lambda path: str(path).replace("gs://", f"{served}/")  # noqa: E731

    def open_(original, path, mode):
        assert not str(path).startswith("gs://") or "a" not in mode, f"appends to {path}"
        if "w" in mode and str(path).startswith("gs://"):
            Path(here(path)).parent.mkdir(parents=True, exist_ok=True)  # a bucket has no folders
        return original(here(path), mode)

    one = lambda original, path, **options: original(here(path), **options)  # noqa: E731
    two = lambda original, path, target, **options: original(here(path), here(target), **options)  # noqa: E731
    names = ("exists", "isdir", "listdir", "makedirs", "mkdir", "remove", "rmtree", "stat", "walk")

    def glob(original, path):
        found = original(here(path))
        return [p.replace(f"{served}/", "gs://") for p in found] if str(path).startswith("gs://") else found

    monkeypatch.setattr(locations, "BUCKET_LIBRARIES", ("json",))
    monkeypatch.chdir(tmp_path)
    with mock_epath(open=open_, glob=glob, copy=two, rename=two, replace=two, **dict.fromkeys(names, one)):
        yield served / "bucket"


def test_a_run_is_written_to_its_bucket(corpus, bucket, monkeypatch, tmp_path):
    # Arrays go to Cloud Storage through TensorStore, for which there is no stand-in: they alone go straight to its folder.
    folder = checkpoint.checkpoint_folder
    monkeypatch.setattr(
        checkpoint, "checkpoint_folder", lambda c: epath.Path(str(folder(c)).replace("gs://bucket", str(bucket)))
    )
    config = Config(
        model=ModelConfig(2, 16, 2, 1, 24, VOCABULARY, compute_dtype="float32"),
        data=corpus,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
        train=TrainConfig(
            run_dir=RUN,
            steps=4,
            batch_size=8,
            evaluate_batches=1,
            loss_chunk=8,
            log_every=1,
            checkpoint_every=2,
        ),
    )
    train(config)
    run = bucket / "runs" / "one"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert records == read_records(RUN)
    assert [record["step"] for record in records if "train/objective" in record] == [1, 2, 3, 4]
    assert list((run / "tensorboard").glob("events*"))
    pictures = plot_run(RUN)
    assert [str(picture) for picture in pictures] == [
        f"{RUN}/plots/{name}.png" for name in ("loss", "exits", "schedules")
    ]
    assert all((run / "plots" / picture.name).stat().st_size > 10_000 for picture in pictures)
    assert str(find_checkpoint(RUN)) == f"{RUN}/checkpoints/4"
    assert read_config(find_checkpoint(RUN)).model == config.model
    assert Tokenizer.load(f"{RUN}/checkpoints/tokenizer.model").vocab_size == VOCABULARY
    assert str(store_swept(RUN, {"exit_layer": 1}, {})) == f"{RUN}/checkpoints/decode.json"
    assert swept_settings(RUN, set()) == {"exit_layer": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["served"]  # the working directory: no folder "gs:"


def test_metrics_go_on_where_a_bucket_has_them(bucket):
    first = MetricsWriter(RUN)
    first.write(1, {"a": 0.5})
    assert read_records(RUN) == []
    first.publish()
    assert read_records(RUN) == [{"step": 1, "a": 0.5}]
    first.write(2, {"a": 0.25})  # written after the last checkpoint, by a run that is killed then
    second = MetricsWriter(RUN)
    second.write(2, {"a": 0.125})
    second.close()
    assert read_records(RUN) == [{"step": 1, "a": 0.5}, {"step": 2, "a": 0.125}]
    assert not list(Path.cwd().glob("gs:*"))
    first.close()


@pytest.mark.parametrize("path", ["gs:/bucket/run", "s3://bucket/run", "file:///tmp/run", "GS://bucket"])
def test_what_would_be_a_local_folder_named_like_a_scheme_is_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for use in (locate, find_checkpoint, read_records, MetricsWriter, Tokenizer.load):
        with pytest.raises(UserError, match=r"neither a path of this machine nor a gs:// one"):
            use(path)
    assert list(tmp_path.iterdir()) == []


def test_a_bucket_without_the_library_is_refused(monkeypatch):
    monkeypatch.setattr(locations, "BUCKET_LIBRARIES", ("no_such_library",))
    with pytest.raises(UserError, match=r"gs://bucket needs gcsfs: pip install layerskip_jax\[gcs\]"):
        locate("gs://bucket")
