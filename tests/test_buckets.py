"""Run folders in a bucket, over the protocol of Cloud Storage: nothing is lost, or written to a folder ``gs:``."""

import asyncio
import contextlib
import dataclasses
import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from bucket import STEPS, objects, run_config, train_once
from corpora import VOCABULARY

from benchmarks.reliability import contents, same
from layerskip_jax import locations
from layerskip_jax.checkpoint.arrays import DamagedCheckpoint, unreadable
from layerskip_jax.checkpoint.reading import load_model
from layerskip_jax.checkpoint.run_folder import (
    checkpoint_steps,
    find_checkpoint,
    read_checksums,
    read_config,
    read_data_positions,
)
from layerskip_jax.checkpoint.swept import SWEPT, swept_settings
from layerskip_jax.commands import decode, evaluate, report, sweep
from layerskip_jax.commands.plots import plot_run
from layerskip_jax.config import Config, DataConfig, TrainConfig
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.data.pipeline import make_batches
from layerskip_jax.data.pretokenize import pretokenize
from layerskip_jax.data.python_stdlib import python_stdlib_dataset_builder as stdlib
from layerskip_jax.data.sources import open_splits, read_metadata
from layerskip_jax.errors import Interrupted, UserError, bucket_error, run_command
from layerskip_jax.locations import locate
from layerskip_jax.recipe.recipe import Recipe
from layerskip_jax.sharding import make_mesh
from layerskip_jax.training import loop, run_lock
from layerskip_jax.training.loop import train
from layerskip_jax.training.monitoring.metrics import MetricsWriter, read_records
from layerskip_jax.training.step import Trainer

CHILD = "import sys; from bucket import *; train(run_config(DataConfig(**json.loads(sys.argv[1])), sys.argv[2]))"


@pytest.fixture(scope="module")
def data(corpus, storage, tmp_path_factory):
    """The settings of a pretokenized corpus in a bucket, with its tokenizer."""
    out, bucket = tmp_path_factory.mktemp("tokens") / "tokens", locate(storage.new())
    pretokenize(corpus, str(out))
    for name in objects(out):
        (bucket / "tokens" / name).write_bytes((out / name).read_bytes())
    (bucket / "tokenizer.model").write_bytes(Path(corpus.tokenizer).read_bytes())
    return dataclasses.replace(
        corpus, source="tokens", path=str(bucket / "tokens"), tokenizer=str(bucket / "tokenizer.model")
    )


@pytest.fixture(scope="module", autouse=True)
def one_program(corpus):
    """All runs differ only in their folders: compile once, and do not evaluate."""
    config = run_config(corpus, "shared")
    shared = Trainer(config, Recipe.from_config(config), make_mesh(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Trainer", lambda config, recipe, mesh: shared)
        patch.setattr(loop, "component_losses", lambda model, batches, config, mesh: {"": np.zeros(2)})
        patch.setattr(run_lock, "SETTLE_SECONDS", 0.01)
        yield


@pytest.fixture(scope="module", autouse=True)
def empty_folder(tmp_path_factory):
    """The working directory; at the end it must be empty: nothing was written to a local folder named ``gs:``."""
    folder = tmp_path_factory.mktemp("work")
    with contextlib.chdir(folder):
        yield
    assert list(folder.iterdir()) == []


@pytest.fixture(scope="module")
def whole(corpus):
    """The arrays of a run in a local folder that nothing stopped."""
    return contents(train_once(corpus))


@pytest.fixture(scope="module")
def run(data, storage):
    """A run in a bucket that SIGTERM stopped after its third step, and that was resumed."""
    run = f"{storage.new()}/runs/one"
    to_devices, batches = loop.to_devices, []

    def stop_at_the_third(batch, mesh):
        batches.append(batch)
        if len(batches) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return to_devices(batch, mesh)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "to_devices", stop_at_the_third)
        with pytest.raises(Interrupted):
            train(run_config(data, run))
    assert checkpoint_steps(locate(run) / "checkpoints") == [3, 2]
    train(run_config(data, run))
    return run


@pytest.fixture
def dropped_reads():
    """Let Python report the reads that orbax abandoned within the test, whose mark ignores them."""
    yield
    gc.collect()


def writer(run):
    return MetricsWriter(Config(train=TrainConfig(run_dir=run)))


def test_a_stopped_and_resumed_run_in_a_bucket_equals_a_local_one(run, whole, storage):
    assert same(contents(run), whole)
    records = read_records(run)
    assert [record["step"] for record in records if "train/objective" in record] == list(range(1, STEPS + 1))
    assert checkpoint_steps(locate(run) / "checkpoints") == [4, 3]
    names = objects(storage.local(run))
    assert {name.split("/")[1] for name in names if name.startswith("checkpoints/")} == {"3", "4", "tokenizer.model"}
    assert {name.split("/")[0] for name in names} == {"checkpoints", "metrics.jsonl", "tensorboard"}


def test_the_files_of_a_run_are_read_from_and_written_to_its_bucket(run, corpus, storage):
    assert str(find_checkpoint(run)) == f"{run}/checkpoints/{STEPS}"
    assert read_config(find_checkpoint(run)).model == run_config(corpus, run).model
    assert load_tokenizer(f"{run}/checkpoints/tokenizer.model").vocab_size == VOCABULARY
    pictures = plot_run(run)
    assert [str(path) for path in pictures] == [f"{run}/plots/{name}.png" for name in ("loss", "exits", "schedules")]
    assert all(path.stat().length > 10_000 for path in pictures)


def test_a_sweep_is_stored_in_the_bucket(run, storage, capsys):
    lengths = ["--try_exits", "1", "--try_lengths", "2", "--repeats", "1", "--max_new_tokens", "4"]
    sweep.main([run, "--prompt", "def x", *lengths])
    assert f"{run}/checkpoints/{SWEPT}" in capsys.readouterr().out
    assert {f"checkpoints/{SWEPT}", "plots/sweep.png"} <= objects(storage.local(run))
    assert swept_settings(run, set())
    (locate(run) / "checkpoints" / SWEPT).unlink()


def test_a_report_is_written_to_the_bucket(run, storage):
    page = report.write_report(run, ["def x"], 3, 1)
    assert str(page) == f"{run}/report.html"
    assert (storage.local(run) / "report.html").stat().st_size > 100_000
    assert {"plots/exits.png", "plots/speed.png"} <= objects(storage.local(run))
    assert not Path("/gs").exists()


def test_commands_print_the_same_for_a_run_in_a_bucket_and_a_local_one(run, corpus, capsys):
    printed = []
    for folder in (train_once(corpus), run):
        evaluate.main([folder, "--batches", "1", "--json"])
        decode.main([folder, "--prompt", "def x", "--json"])
        quality, text, _ = (json.loads(line) for line in capsys.readouterr().out.splitlines())
        assert quality.pop("run") == folder
        printed.append((quality, text))
    assert printed[0] == printed[1]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # as in `test_survival.DROPPED`
@pytest.mark.usefixtures("dropped_reads")
def test_a_damaged_object_is_found_and_the_checkpoint_before_used(run, whole, data, storage, capfd):
    copy = f"{storage.new()}/run"
    for name in objects(storage.local(run)):
        if name.startswith("checkpoints/"):
            (locate(copy) / name).write_bytes((locate(run) / name).read_bytes())
    model = find_checkpoint(copy) / "model"
    sizes = {name: (model / name).stat().length for name in objects(storage.local(str(model)))}
    file = model / max(sizes, key=sizes.get)
    content = file.read_bytes()
    file.unlink()
    with pytest.raises(DamagedCheckpoint, match=f"checkpoints/{STEPS} is damaged"):
        load_model(copy)
    file.write_bytes(bytes(len(content)))
    capfd.readouterr()
    train(run_config(data, copy))
    output = capfd.readouterr()
    assert output.err.count("WARNING: ") == output.err.count("\n") == 1
    assert f"checkpoints/{STEPS} is damaged" in output.err
    assert "resuming after step 3" in output.out
    assert same(contents(copy), whole)
    assert {"damaged/4/config/metadata", "damaged/4.txt"} <= objects(storage.local(copy))


def test_a_mixture_of_a_tfds_dataset_and_tokens_is_read_from_a_bucket(data, storage, tmp_path, monkeypatch):
    files = dict(itertools.islice(stdlib.source_files().items(), 60))
    monkeypatch.setattr(stdlib, "source_files", lambda: files)
    prepared = open_splits(DataConfig(source="python_stdlib", data_dir=str(tmp_path)))
    bucket = storage.new()
    for name in objects(tmp_path):
        (locate(bucket) / name).write_bytes((tmp_path / name).read_bytes())
    version = next((tmp_path / "python_stdlib").rglob("dataset_info.json")).parent.relative_to(tmp_path)
    config, version = run_config(data, "unused"), f"{version.parent}:{version.name}"
    mixture = (f"1=tfds:{version}", f"1=tokens:{data.path}")

    def rows(data_dir):
        mixed = dataclasses.replace(data, source="python_stdlib", path="", mixture=mixture, data_dir=data_dir)
        dataset = next(iter(open_splits(mixed)[0].parts.values()))
        assert [dataset[i] for i in range(len(dataset))] == [prepared[0][i] for i in range(len(prepared[0]))]
        return list(itertools.islice(make_batches(dataclasses.replace(config, data=mixed), "train", batch_size=8), 3))

    for remote, local in zip(rows(bucket), rows(str(tmp_path)), strict=True):
        assert all(np.array_equal(remote[name], local[name]) for name in local)


def unfinished(checkpoints):
    """Return the steps whose checkpoints have objects, but not the one that is written last."""
    names = objects(checkpoints)
    steps = {name.split("/")[0] for name in names if name[0].isdigit()}
    return {step for step in steps if f"{step}/commit_success.txt" not in names}


def test_a_run_killed_within_a_save_resumes_and_ends_equal(whole, data, storage, monkeypatch, capfd):
    run = f"{storage.new()}/run"
    checkpoints = storage.local(run) / "checkpoints"
    command = [sys.executable, "-c", CHILD, json.dumps(dataclasses.asdict(data)), run]
    child = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    while child.poll() is None and not (checkpoints / "2/commit_success.txt").exists():
        time.sleep(0.005)
    monkeypatch.setattr(storage.faults, "seconds", (0.01, 0.03))  # so that the next save takes a while
    while child.poll() is None and not unfinished(checkpoints):
        time.sleep(0.005)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    assert unfinished(checkpoints)
    monkeypatch.undo()
    capfd.readouterr()
    train(run_config(data, run))
    assert "resuming after step 2" in capfd.readouterr().out
    assert same(contents(run), whole)
    assert not unfinished(checkpoints)


@pytest.fixture
def impatient(monkeypatch):
    """gcsfs waits only a little before it repeats a request."""
    wait = asyncio.sleep
    monkeypatch.setattr("gcsfs.retry.asyncio", SimpleNamespace(sleep=lambda seconds: wait(seconds / 50)))


@pytest.mark.usefixtures("impatient")
def test_a_run_goes_on_while_the_bucket_refuses_delays_and_drops_requests(whole, data, storage, monkeypatch, capfd):
    run = f"{storage.new()}/run"
    before = storage.faults.count.total()
    monkeypatch.setattr(storage.faults, "rate", 0.06)
    monkeypatch.setattr(storage.faults, "seconds", (0.0, 0.02))
    train(run_config(data, run))
    monkeypatch.undo()
    assert storage.faults.count.total() >= before + 5
    assert capfd.readouterr().err == ""
    assert same(contents(run), whole)
    assert len([record for record in read_records(run) if "train/objective" in record]) == STEPS


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("kind", ["503", "dropped"])
def test_a_bucket_that_does_not_answer_is_no_damage(kind, run, data, storage, monkeypatch):
    """The checkpoint would be moved away, and the run would repeat the steps since the one before."""
    checkpoint = find_checkpoint(run)
    monkeypatch.setattr(storage.faults, "rate", 1.0)
    monkeypatch.setattr(storage.faults, "KINDS", (kind,))
    for read in (read_config, read_checksums, read_data_positions):
        with pytest.raises(Exception, match=r"injected, 503|disconnected|the bucket cannot be used") as raised:
            read(checkpoint)
        assert not isinstance(raised.value, DamagedCheckpoint)
        assert isinstance(raised.value, UserError) or bucket_error(raised.value)
    with pytest.raises(Exception, match=r"injected, 503|disconnected") as raised:
        read_metadata(locate(data.path))
    assert bucket_error(raised.value)


@pytest.mark.parametrize(
    "error",
    [
        OSError("Forbidden: https://storage.example.org/b/bucket/o"),
        ValueError("ABORTED: All 32 retry attempts failed: Service Unavailable [http_response_code='503']"),
        ValueError("Error opening \"zarr\" driver: All 32 retry attempts failed: CURL error [curl_code='7']"),
    ],
)
def test_refusals_that_the_libraries_raise_are_told_from_damage(error):
    assert bucket_error(error) is error
    assert not isinstance(unreadable("damaged", error), DamagedCheckpoint)
    assert isinstance(unreadable("damaged", ValueError("NOT_FOUND: no such array")), DamagedCheckpoint)


@pytest.mark.usefixtures("impatient")
def test_a_bucket_that_refuses_all_requests_is_reported_in_one_line(run, storage, monkeypatch, capfd):
    monkeypatch.setattr(storage.faults, "rate", 1.0)
    monkeypatch.setattr(storage.faults, "KINDS", ("503",))
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: find_checkpoint(run))
    assert ended.value.code == 2
    assert capfd.readouterr().err == "error: the bucket cannot be used: injected, 503\n"


def test_metrics_continue_those_in_the_bucket(storage):
    run = f"{storage.new()}/run"
    first = writer(run)
    first.write(1, {"a": 0.5})
    assert read_records(run) == []
    first.publish()
    assert read_records(run) == [{"step": 1, "a": 0.5}]
    second = writer(run)  # as after the process was killed
    second.write(2, {"a": 0.125})
    second.close()
    assert read_records(run) == [{"step": 1, "a": 0.5}, {"step": 2, "a": 0.125}]
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
    with pytest.raises(UserError, match=r"gs://bucket needs gcsfs: pip install 'layerskip-jax\[gcs\]'"):
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
    assert capsys.readouterr().err == "error: the bucket cannot be used: Cannot connect to host example.org\n"
