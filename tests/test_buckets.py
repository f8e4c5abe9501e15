"""A run folder in a bucket: everything is written there, and nothing into a local folder named ``gs:``."""

import json
from pathlib import Path

import pytest
from bucket import RUN, STEPS, run_config, served, trained, trained_run
from corpora import VOCABULARY

from layerskip_jax import locations
from layerskip_jax.checkpoint.reading import (
    SWEPT,
    find_checkpoint,
    load_model,
    read_config,
    store_swept,
    swept_settings,
)
from layerskip_jax.commands import report
from layerskip_jax.commands.plots import plot_run
from layerskip_jax.config import Config, TrainConfig
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.errors import UserError, run_command
from layerskip_jax.evaluation.exits import quality_of_checkpoint
from layerskip_jax.locations import locate
from layerskip_jax.training.monitoring.metrics import MetricsWriter, read_records


def writer(run):
    return MetricsWriter(Config(train=TrainConfig(run_dir=run)))


def test_a_run_is_written_to_its_bucket_and_read_there(corpus):
    run = Path(trained_run(corpus))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "train/objective" in record] == list(range(1, STEPS + 1))
    assert list((run / "tensorboard").glob("events*"))
    with served(trained(corpus)):
        assert read_records(RUN) == records
        pictures = plot_run(RUN)
        assert str(find_checkpoint(RUN)) == f"{RUN}/checkpoints/{STEPS}"
        assert read_config(find_checkpoint(RUN)).model == run_config(corpus).model
        assert load_tokenizer(f"{RUN}/checkpoints/tokenizer.model").vocab_size == VOCABULARY
        stored = store_swept(RUN, {"exit_layer": 1}, {})
        assert swept_settings(RUN, set()) == {"exit_layer": 1}
    assert [str(path) for path in pictures] == [f"{RUN}/plots/{name}.png" for name in ("loss", "exits", "schedules")]
    assert all((run / "plots" / picture.name).stat().st_size > 10_000 for picture in pictures)
    assert str(stored) == f"{RUN}/checkpoints/{SWEPT}"
    (run / "checkpoints" / SWEPT).unlink()


def test_a_report_is_written_to_the_bucket(corpus, monkeypatch):
    here = trained_run(corpus)
    monkeypatch.setattr(report, "load_model", lambda run: load_model(here))  # arrays are not read through the stand-in
    monkeypatch.setattr(report, "quality_of_checkpoint", lambda run, batches: quality_of_checkpoint(here, batches))
    with served(trained(corpus)):
        page = report.write_report(RUN, ["def x"], 3, 1)
    assert str(page) == f"{RUN}/report.html"
    assert (Path(here) / "report.html").stat().st_size > 100_000
    assert {"quality.png", "tokens_0.png"} <= {picture.name for picture in (Path(here) / "plots").iterdir()}
    assert not Path("/gs").exists()


def test_metrics_go_on_where_a_bucket_has_them(tmp_path):
    with served(tmp_path / "served"):
        first = writer(RUN)
        first.write(1, {"a": 0.5})
        assert read_records(RUN) == []
        first.publish()
        assert read_records(RUN) == [{"step": 1, "a": 0.5}]
        second = writer(RUN)  # as after a kill
        second.write(2, {"a": 0.125})
        second.close()
        assert read_records(RUN) == [{"step": 1, "a": 0.5}, {"step": 2, "a": 0.125}]
        first.close()


@pytest.mark.parametrize("path", ["gs:/bucket/run", "s3://bucket/run", "file:///tmp/run", "GS://bucket"])
def test_what_would_be_a_local_folder_named_like_a_scheme_is_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for use in (locate, find_checkpoint, read_records, writer, load_tokenizer):
        with pytest.raises(UserError, match=r"neither a path of this machine nor a gs:// one"):
            use(path)
    assert list(tmp_path.iterdir()) == []


def test_a_bucket_without_the_library_is_refused(monkeypatch):
    monkeypatch.setattr(locations, "BUCKET_LIBRARIES", ("no_such_library",))
    with pytest.raises(UserError, match=r"gs://bucket needs gcsfs: pip install layerskip_jax\[gcs\]"):
        locate("gs://bucket")


def test_a_bucket_that_does_not_answer_is_one_line(monkeypatch, capsys):
    """gcsfs raises errors of aiohttp, and orbax wraps them; neither library is needed for this test."""

    class ConnectorError(Exception):
        __module__ = "aiohttp.client_exceptions"

    def exists(path):
        raise RuntimeError("restore failed") from ConnectorError("Cannot connect to host example.org")

    monkeypatch.setattr(locations, "BUCKET_LIBRARIES", ("json",))
    monkeypatch.setattr(type(locate("gs://bucket/run")), "exists", exists)
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: find_checkpoint("gs://bucket/run"))
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: the bucket does not answer: Cannot connect to host example.org\n"
