"""Run folders in a bucket: all files go there, and none into a local folder named ``gs:``."""

import json
from pathlib import Path

import pytest
from bucket import RUN, STEPS, run_config, served, trained, trained_run
from corpora import VOCABULARY

from layerskip_jax import locations
from layerskip_jax.checkpoint.reading import load_model
from layerskip_jax.checkpoint.run_folder import find_checkpoint, read_config
from layerskip_jax.checkpoint.swept import SWEPT, store_swept, swept_settings
from layerskip_jax.commands import report
from layerskip_jax.commands.plots import plot_run
from layerskip_jax.config import Config, TrainConfig
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.errors import UserError, run_command
from layerskip_jax.locations import locate
from layerskip_jax.training.monitoring.metrics import MetricsWriter, read_records


def writer(run):
    return MetricsWriter(Config(train=TrainConfig(run_dir=run)))


def test_a_run_is_written_to_and_read_from_its_bucket(corpus):
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
    monkeypatch.setattr(
        report, "load_model", lambda run, **options: load_model(here, **options)
    )  # a mock without arrays
    with served(trained(corpus)):
        page = report.write_report(RUN, ["def x"], 3, 1)
    assert str(page) == f"{RUN}/report.html"
    assert (Path(here) / "report.html").stat().st_size > 100_000
    assert {"exits.png", "speed.png"} <= {picture.name for picture in (Path(here) / "plots").iterdir()}
    assert not Path("/gs").exists()


def test_metrics_continue_those_in_the_bucket(tmp_path):
    with served(tmp_path / "served"):
        first = writer(RUN)
        first.write(1, {"a": 0.5})
        assert read_records(RUN) == []
        first.publish()
        assert read_records(RUN) == [{"step": 1, "a": 0.5}]
        second = writer(RUN)  # as after the process was killed
        second.write(2, {"a": 0.125})
        second.close()
        assert read_records(RUN) == [{"step": 1, "a": 0.5}, {"step": 2, "a": 0.125}]
        first.close()


@pytest.mark.parametrize("path", ["gs:/bucket/run", "s3://bucket/run", "file:///tmp/run", "GS://bucket"])
def test_other_schemes_are_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for use in (locate, find_checkpoint, read_records, writer, load_tokenizer):
        with pytest.raises(UserError, match=r"neither a local path nor a gs:// path"):
            use(path)
    assert list(tmp_path.iterdir()) == []


def test_a_bucket_without_the_library_is_refused(monkeypatch):
    monkeypatch.setattr(locations, "BUCKET_LIBRARIES", ("no_such_library",))
    with pytest.raises(UserError, match=r"gs://bucket needs gcsfs: pip install layerskip_jax\[gcs\]"):
        locate("gs://bucket")


def test_an_unreachable_bucket_is_reported_in_one_line(monkeypatch, capsys):
    """gcsfs raises errors of aiohttp, and orbax wraps them. The test needs neither library."""

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
