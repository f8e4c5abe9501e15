"""Runs survive killed processes, full disks and damaged checkpoints, all real, and injected bad steps and loggers.

``python -m benchmarks.reliability`` runs longer forms; docs/reliability.md lists the guarantees.
"""

import contextlib
import ctypes
import ctypes.util
import dataclasses
import gc
import json
import os
import pickle
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from corpora import VOCABULARY

from benchmarks.reliability import EXPECTED_COUNTS, damage, kills, restored
from layerskip_jax.checkpoint.arrays import DamagedCheckpoint
from layerskip_jax.checkpoint.reading import load_model
from layerskip_jax.commands import plots
from layerskip_jax.commands import train as command
from layerskip_jax.config import Config, DataConfig, DistributedConfig, ModelConfig, OptimizerConfig, TrainConfig
from layerskip_jax.errors import UserError
from layerskip_jax.recipe.recipe import Recipe
from layerskip_jax.sharding import make_mesh
from layerskip_jax.training import loop as training
from layerskip_jax.training.loop import train
from layerskip_jax.training.step import Trainer

EVERY, STEPS = 4, 13


def make_config(corpus, run_dir):
    return Config(
        model=ModelConfig(2, 16, 2, 1, 24, VOCABULARY, compute_dtype="float32"),
        data=corpus,
        optimizer=OptimizerConfig(warmup_steps=2),
        train=TrainConfig(
            run_dir=str(run_dir),
            steps=STEPS,
            batch_size=8,
            loss_chunk=32,
            log_every=1,
            evaluate_every=STEPS,
            checkpoint_every=EVERY,
        ),
    )


@pytest.fixture(scope="module")
def shared(corpus):
    """One trainer for all runs, which differ only in their folders and policies: it compiles once."""
    config = make_config(corpus, "shared")
    return Trainer(config, Recipe.from_config(config), make_mesh(config))


@pytest.fixture
def config(corpus, tmp_path, monkeypatch, shared):
    monkeypatch.setattr(training, "Trainer", lambda config, recipe, mesh: shared)
    monkeypatch.setattr(training, "component_losses", lambda *_: {"": np.zeros(2)})  # would compile
    return make_config(corpus, tmp_path / "run")


def changed(config, **values):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **values))


def saved_steps(config):
    folder = Path(config.train.run_dir) / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def at_step(monkeypatch, acts):
    """Call ``acts[n]`` with the batch of the n-th step of a run, before the batch goes to the devices."""
    original, taken = training.to_devices, []

    def to_devices(batch, mesh):
        taken.append(batch)
        return original(acts.get(len(taken), lambda batch: None)(batch) or batch, mesh)

    monkeypatch.setattr(training, "to_devices", to_devices)
    return taken


def without_counted_tokens(batch):
    return batch | {"mask_BT": np.zeros_like(batch["mask_BT"])}


def poisoned(batch):
    return batch | {"mask_BT": batch["mask_BT"] * np.float32("nan")}


def losses(count):
    return {what: value for what, value in count.items() if value and what not in EXPECTED_COUNTS}


def test_a_run_killed_at_random_moments_ends_with_the_same_parameters(capsys):
    count = kills(trials=4, seed=1, steps=25)
    with capsys.disabled():
        print(dict(count))
    assert count["kills"] == 4
    assert losses(count) == {}


@pytest.fixture
def dropped_reads():
    """If orbax cannot read one array it abandons the other reads, whose exceptions Python reports as unraisable."""
    yield
    gc.collect()


DROPPED = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@DROPPED
@pytest.mark.usefixtures("dropped_reads")
def test_a_damaged_checkpoint_is_detected_and_the_one_before_restored(capsys):
    count = damage(trials=60)
    with capsys.disabled():
        print(dict(count))
    assert count["detected, and the one before restored"] > 5
    assert losses(count) == {}


def spoil(config, step):
    """Zero the largest file of a checkpoint's model: orbax may read it without an error."""
    folder = Path(config.train.run_dir) / "checkpoints" / str(step) / "model"
    file = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    file.write_bytes(bytes(file.stat().st_size))


@DROPPED
@pytest.mark.usefixtures("dropped_reads")
def test_a_damaged_checkpoint_stops_the_run_or_is_skipped_as_configured(config, capsys):
    train(config)
    spoil(config, STEPS)
    with pytest.raises(DamagedCheckpoint, match=r"checkpoints/13 is damaged"):
        load_model(config.train.run_dir)
    with pytest.raises(UserError, match=r"checkpoints/13 is damaged: .*go_back restores the one before"):
        train(changed(config, damaged_checkpoint="stop"))
    assert saved_steps(config) == [12, 13]
    capsys.readouterr()
    train(config)
    output = capsys.readouterr()
    assert "WARNING: the checkpoint" in output.err
    assert "resuming after step 12" in output.out
    assert (Path(config.train.run_dir) / "damaged" / "13").is_dir()
    load_model(config.train.run_dir)  # step 13 was saved again
    for step in (12, 13):
        spoil(config, step)
    with pytest.raises(UserError, match=r"no checkpoint in .* is intact"):
        train(config)
    assert saved_steps(config) == [12, 13]


def test_a_damaged_tokenizer_is_named(config):
    train(changed(config, steps=4))
    file = Path(config.train.run_dir) / "checkpoints" / "tokenizer.model"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DamagedCheckpoint, match=r"tokenizer\.model is damaged"):
        load_model(config.train.run_dir)


def test_a_damaged_tokenizer_is_restored_by_a_resume(config, capsys):
    """The run's own tokenizer has the digest that the checkpoint stores, so it is not another one."""
    train(changed(config, steps=4))
    file = Path(config.train.run_dir) / "checkpoints" / "tokenizer.model"
    content = file.read_bytes()
    file.write_bytes(content.replace(b"return", b"RETURN"))
    assert file.read_bytes() != content
    train(changed(config, steps=5))
    assert file.read_bytes() == content
    assert "tokenizer.model was changed after a save: it is replaced by" in capsys.readouterr().err


def test_nothing_is_unpickled(config, monkeypatch):
    train(changed(config, steps=4))

    def refuse(*_, **__):
        raise AssertionError("a checkpoint was unpickled")

    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(np, "load", refuse)
    load_model(config.train.run_dir)
    restored(config)


@pytest.mark.parametrize("value", ["../other", "/etc", "~/x", "a/../../b"])
def test_names_that_leave_their_folder_are_rejected(value):
    for name in ("name", "train_split", "validation_split"):
        with pytest.raises(UserError, match=rf"data\.{name} must be a name"):
            DataConfig(**{name: value})


# A full disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 MiB; skips if this process may not mount one."""
    libc = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
    folder = tmp_path / "disk"
    folder.mkdir()
    if libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, b"size=64m"):
        pytest.skip(f"this process may not mount a file system (CAP_SYS_ADMIN): {os.strerror(ctypes.get_errno())}")
    yield folder
    libc.umount2(str(folder).encode(), 2)


def fill(folder, config):
    """Fill the disk once the checkpoint of step 4 is complete."""

    def act(batch):
        while saved_steps(config) != [4]:
            time.sleep(0.01)
        with (folder / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while filler.write(bytes(4096)):
                pass

    return act


def test_a_full_disk_stops_the_run_with_the_old_checkpoint_intact(config, small_disk, monkeypatch):
    config = changed(config, run_dir=str(small_disk / "run"), keep_checkpoints=1)
    at_step(monkeypatch, {6: fill(small_disk, config)})
    with pytest.raises(UserError, match=r"could not be written .*; the newest complete one is of step 4"):
        train(config)
    (small_disk / "filler").unlink()
    assert saved_steps(config) == [4]
    assert not list((small_disk / "run" / "checkpoints").glob("*tmp*"))
    load_model(config.train.run_dir)


def test_a_run_continues_after_a_full_disk_if_configured(config, small_disk, monkeypatch, capsys):
    config = changed(config, run_dir=str(small_disk / "run"), failed_save="go_on", keep_checkpoints=1)
    kept = []

    def free(batch):
        kept.extend(saved_steps(config))
        (small_disk / "filler").unlink()

    at_step(monkeypatch, {6: fill(small_disk, config), 11: free})
    train(config)
    stderr = capsys.readouterr().err
    assert stderr.count("could not be written") == 1
    assert "the newest complete one is of step 4; the run continues" in stderr
    assert kept == [4]
    assert saved_steps(config) == [STEPS]


@pytest.mark.parametrize("ends", ["at its last step", "by a signal"])
def test_a_failed_last_save_always_raises(ends, config, small_disk, monkeypatch):
    """No later save replaces it, so ``failed_save`` go_on does not apply."""
    config = changed(config, run_dir=str(small_disk / "run"), failed_save="go_on", keep_checkpoints=1)

    def act(batch):
        fill(small_disk, config)(batch)
        if ends == "by a signal":
            os.kill(os.getpid(), signal.SIGTERM)

    at_step(monkeypatch, {6: act})
    with pytest.raises(UserError, match=r"could not be written .*; the newest complete one is of step 4; fix this and"):
        train(changed(config, steps=7))
    (small_disk / "filler").unlink()
    assert saved_steps(config) == [4]


def test_the_newest_checkpoints_and_the_permanent_ones_are_kept(config):
    train(changed(config, keep_checkpoints=1, keep_every=8))
    assert saved_steps(config) == [8, STEPS]


def test_foreign_folders_among_the_checkpoints_neither_stop_nor_end_up_in_a_run(config, capsys):
    """Digits alone are not a checkpoint: it would be the newest, and orbax would save no more and delete ours."""
    folder = Path(config.train.run_dir).with_name("mein läuf 実験") / "checkpoints"
    config = changed(config, run_dir=str(folder.parent))
    foreign = [folder / name / "notes.txt" for name in ("notes_20990101", "good_9", "20990101", "2024")]
    for file in foreign:
        file.parent.mkdir(parents=True)
        file.write_text("mine")
    train(changed(config, steps=8))
    train(config)
    assert "resuming after step 8" in capsys.readouterr().out
    assert saved_steps(config) == [12, 13, 2024, 20990101]
    assert all(file.read_text() == "mine" for file in foreign)
    load_model(config.train.run_dir)


def test_a_second_training_is_refused_and_the_first_goes_on(config, monkeypatch):
    """At a step after a save has begun: its temporary folder must stay."""

    def start_again(batch):
        while json.loads((Path(config.train.run_dir) / "writer.json").read_text())["step"] == 0:
            time.sleep(0.01)
        with pytest.raises(UserError, match=rf"in use: process {os.getpid()} on host .* \(last step [1-4] at 20"):
            train(changed(config, seed=1))

    at_step(monkeypatch, {6: start_again})
    train(config)
    assert saved_steps(config) == [12, 13]
    lines = (Path(config.train.run_dir) / "metrics.jsonl").read_text().splitlines()
    assert [r["step"] for r in map(json.loads, lines) if "train/applied" in r] == list(range(1, STEPS + 1))
    assert not (Path(config.train.run_dir) / "writer.json").exists()


def test_a_run_that_was_taken_over_saves_no_more(config, monkeypatch):
    def take_over(batch):
        file = Path(config.train.run_dir) / "writer.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"token": "other", "host": "other"}))

    at_step(monkeypatch, {6: take_over})
    with pytest.raises(UserError, match=r"on host other .* has taken the run folder .* over"):
        train(config)
    assert saved_steps(config) == [4]
    assert (Path(config.train.run_dir) / "writer.json").exists()


@pytest.mark.parametrize("name", ["lr[1e-3]", "what?", "a*b"])
def test_a_run_folder_in_which_orbax_would_lose_its_files_is_refused(config, name):
    folder = Path(config.train.run_dir).with_name(name) / "run"
    with pytest.raises(UserError, match=r"checkpoints cannot be saved below a folder with [*?[] in its name"):
        train(changed(config, run_dir=str(folder)))
    assert not folder.parent.exists()


# Bad steps


def test_a_bad_step_is_not_applied_and_its_batch_is_stored(config, monkeypatch, capsys):
    taken = at_step(monkeypatch, {3: poisoned, 7: without_counted_tokens})
    state = train(changed(config, steps=9))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state.model)))
    stderr = capsys.readouterr().err
    for step, reason in [(3, "not finite): loss nan"), (7, "no token has a loss): loss 0")]:
        file = Path(config.train.run_dir) / "bad_batches" / f"{step}.npz"
        assert f"step {step} is not applied ({reason}" in stderr
        assert str(file) in stderr
        with np.load(file) as stored:
            assert all(np.array_equal(stored[name], taken[step - 1][name]) for name in taken[step - 1])
    lines = (Path(config.train.run_dir) / "metrics.jsonl").read_text().splitlines()
    applied = {r["step"]: r["train/applied"] for r in map(json.loads, lines) if "train/applied" in r}
    assert [step for step, value in applied.items() if not value] == [3, 7]


def test_too_many_bad_steps_in_a_row_end_the_run_and_none_is_saved(config, monkeypatch):
    at_step(monkeypatch, dict.fromkeys(range(6, 20), poisoned))
    with pytest.raises(
        UserError, match=r"4 steps in a row were not applied .* step 9; the newest checkpoint in .* is of step 4"
    ):
        train(changed(config, bad_steps=4))
    assert saved_steps(config) == [4]


# Loggers and plots


def test_a_failing_logger_warns_once_and_the_run_continues(config, monkeypatch, capsys):
    from tensorboardX.record_writer import RecordWriter

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(RecordWriter, "write", fail)
    (Path(config.train.run_dir) / "metrics.jsonl").mkdir(parents=True)
    train(changed(config, steps=5))
    stderr = capsys.readouterr().err
    assert stderr.count("WARNING: no more metrics are written to TensorBoard: no space left") == 1
    assert stderr.count("WARNING: no more metrics are written to metrics.jsonl") == 1
    assert saved_steps(config) == [4, 5]


def test_a_failing_plot_warns(config, monkeypatch, capsys):
    def fail(run_dir):
        raise ValueError("no font")

    monkeypatch.setattr(plots, "plot_run", fail)
    alone = dataclasses.replace(changed(config, steps=2), distributed=DistributedConfig(num_processes=1))
    monkeypatch.setattr(command, "parse_config", lambda parser, argv: (alone, None))
    command.main([])
    output = capsys.readouterr()
    assert "WARNING: no plots: no font" in output.err
    assert f"{config.train.run_dir} has 2 steps; next: " in output.out
