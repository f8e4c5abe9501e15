"""Runs that survive: killed processes, full disks, damaged checkpoints, bad numbers, failing loggers. All of it real.

The long forms are ``python -m benchmarks.reliability``; docs/reliability.md lists what is promised.
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

from benchmarks.reliability import HARMLESS, damage, kills, restored
from layerskip_jax.checkpoint.reading import DamagedCheckpoint, load_model
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


def config_of(corpus, run_dir):
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
    """One trainer for all runs here, which differ in their folders and policies only: it compiles once."""
    config = config_of(corpus, "shared")
    return Trainer(config, Recipe.from_config(config), make_mesh(config))


@pytest.fixture
def config(corpus, tmp_path, monkeypatch, shared):
    monkeypatch.setattr(training, "Trainer", lambda config, recipe, mesh: shared)
    monkeypatch.setattr(training, "evaluate", lambda trainer, model: np.zeros(2))  # would compile another program
    return config_of(corpus, tmp_path / "run")


def changed(config, **values):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **values))


def steps_of(config):
    folder = Path(config.train.run_dir) / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def at_step(monkeypatch, acts):
    """Call ``acts[n]`` with the batch of the n-th step of a run, before it goes to the devices."""
    original, taken = training.to_devices, []

    def to_devices(batch, mesh):
        taken.append(batch)
        return original(acts.get(len(taken), lambda batch: None)(batch) or batch, mesh)

    monkeypatch.setattr(training, "to_devices", to_devices)
    return taken


def poisoned(batch):
    return batch | {"mask_BT": batch["mask_BT"] * np.float32("nan")}


def losses(count):
    return {what: value for what, value in count.items() if value and what not in HARMLESS}


def test_killed_at_random_moments_it_ends_with_the_same_parameters(capsys):
    count = kills(trials=4, seed=1, steps=25)
    with capsys.disabled():
        print(dict(count))
    assert count["kills"] == 4
    assert losses(count) == {}


@pytest.fixture
def dropped_reads():
    """When one array cannot be read, orbax drops its reads of the others half done, which Python calls unraisable."""
    yield
    gc.collect()


DROPPED = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@DROPPED
@pytest.mark.usefixtures("dropped_reads")
def test_what_is_damaged_is_recognised_and_the_one_before_taken(capsys):
    count = damage(trials=24)
    with capsys.disabled():
        print(dict(count))
    assert count["recognised, and the one before taken"] > 5
    assert losses(count) == {}


def spoil(config, step):
    """Zero the largest file of a checkpoint's model: orbax reads it without a complaint, or not at all."""
    folder = Path(config.train.run_dir) / "checkpoints" / str(step) / "model"
    file = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    file.write_bytes(bytes(file.stat().st_size))


@DROPPED
@pytest.mark.usefixtures("dropped_reads")
def test_a_damaged_checkpoint_stops_the_run_or_is_passed_over_as_set(config, capsys):
    train(config)
    spoil(config, STEPS)
    with pytest.raises(DamagedCheckpoint, match=r"checkpoints/13 is damaged"):
        load_model(config.train.run_dir)
    with pytest.raises(UserError, match=r"checkpoints/13 is damaged: .*go_back takes the one before"):
        train(changed(config, damaged_checkpoint="stop"))
    assert steps_of(config) == [12, 13]
    capsys.readouterr()
    train(config)
    said = capsys.readouterr()
    assert "WARNING: the checkpoint" in said.err
    assert "resuming after step 12" in said.out
    assert (Path(config.train.run_dir) / "damaged" / "13").is_dir()
    load_model(config.train.run_dir)  # step 13 was saved anew
    for step in (12, 13):
        spoil(config, step)
    with pytest.raises(UserError, match=r"no checkpoint of .* is whole"):
        train(config)
    assert steps_of(config) == [12, 13]


def test_a_tokenizer_that_is_damaged_is_named(config):
    train(changed(config, steps=4))
    file = Path(config.train.run_dir) / "checkpoints" / "tokenizer.model"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DamagedCheckpoint, match=r"tokenizer\.model is damaged"):
        load_model(config.train.run_dir)


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
def test_names_that_lead_out_of_their_folder_are_refused(value):
    for name in ("name", "train_split", "validation_split"):
        with pytest.raises(UserError, match=rf"data\.{name} must be a name"):
            DataConfig(**{name: value})


# A full disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 MiB, where this process may mount one."""
    libc = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
    folder = tmp_path / "disk"
    folder.mkdir()
    if libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, b"size=64m"):
        pytest.skip(f"a small file system can be mounted by root only: {os.strerror(ctypes.get_errno())}")
    yield folder
    libc.umount2(str(folder).encode(), 2)


def fill(folder, config):
    """Fill the disk when the checkpoint of step 4 is complete."""

    def act(batch):
        while steps_of(config) != [4]:
            time.sleep(0.01)
        with (folder / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while filler.write(bytes(4096)):
                pass

    return act


def test_a_full_disk_stops_the_run_with_the_old_checkpoint_intact(config, small_disk, monkeypatch):
    config = changed(config, run_dir=str(small_disk / "run"), keep_checkpoints=1)
    at_step(monkeypatch, {6: fill(small_disk, config)})
    with pytest.raises(UserError, match=r"could not be written .*; the checkpoint of step 4 is intact"):
        train(config)
    (small_disk / "filler").unlink()
    assert steps_of(config) == [4]
    assert not list((small_disk / "run" / "checkpoints").glob("*tmp*"))
    load_model(config.train.run_dir)


def test_a_full_disk_is_outlasted_if_so_set(config, small_disk, monkeypatch, capsys):
    config = changed(config, run_dir=str(small_disk / "run"), failed_save="go_on", keep_checkpoints=1)
    kept = []

    def free(batch):
        kept.extend(steps_of(config))
        (small_disk / "filler").unlink()

    at_step(monkeypatch, {6: fill(small_disk, config), 11: free})
    train(config)
    said = capsys.readouterr().err
    assert said.count("could not be written") == 1
    assert "the checkpoint of step 4 is intact; the run goes on" in said
    assert kept == [4]
    assert steps_of(config) == [STEPS]


@pytest.mark.parametrize("ends", ["at its last step", "by a signal"])
def test_a_last_save_that_fails_is_never_called_saved(ends, config, small_disk, monkeypatch):
    """There is no next save that would make up for it, so that going on is no choice."""
    config = changed(config, run_dir=str(small_disk / "run"), failed_save="go_on", keep_checkpoints=1)

    def act(batch):
        fill(small_disk, config)(batch)
        if ends == "by a signal":
            os.kill(os.getpid(), signal.SIGTERM)

    at_step(monkeypatch, {6: act})
    with pytest.raises(UserError, match=r"could not be written .*; the checkpoint of step 4 is intact; mend that and"):
        train(changed(config, steps=7))
    (small_disk / "filler").unlink()
    assert steps_of(config) == [4]


def test_the_newest_are_kept_and_those_for_good(config):
    train(changed(config, keep_checkpoints=1, keep_every=8))
    assert steps_of(config) == [8, STEPS]


# Bad numbers


def test_a_bad_step_is_left_out_and_its_batch_stored(config, monkeypatch, capsys):
    taken = at_step(monkeypatch, {3: poisoned, 7: poisoned})
    state = train(changed(config, steps=9))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state.model)))
    said = capsys.readouterr().err
    for step in (3, 7):
        file = Path(config.train.run_dir) / "bad_batches" / f"{step}.npz"
        assert f"step {step} is not applied, since it is not finite: loss nan" in said
        assert str(file) in said
        with np.load(file) as stored:
            assert all(np.array_equal(stored[name], taken[step - 1][name]) for name in taken[step - 1])
    lines = (Path(config.train.run_dir) / "metrics.jsonl").read_text().splitlines()
    applied = {r["step"]: r["train/applied"] for r in map(json.loads, lines) if "train/applied" in r}
    assert [step for step, value in applied.items() if not value] == [3, 7]


def test_so_many_bad_steps_in_a_row_end_the_run_and_none_is_saved(config, monkeypatch):
    at_step(monkeypatch, dict.fromkeys(range(6, 20), poisoned))
    with pytest.raises(
        UserError, match=r"4 steps in a row were not applied .* step 9; the checkpoint of step 4 in .* is"
    ):
        train(changed(config, bad_steps=4))
    assert steps_of(config) == [4]


# What only watches


def test_a_logger_that_fails_is_said_once_and_the_run_goes_on(config, monkeypatch, capsys):
    from tensorboardX.record_writer import RecordWriter

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(RecordWriter, "write", fail)
    (Path(config.train.run_dir) / "metrics.jsonl").mkdir(parents=True)
    train(changed(config, steps=5))
    said = capsys.readouterr().err
    assert said.count("WARNING: no more is written to TensorBoard: no space left") == 1
    assert said.count("WARNING: no more is written to metrics.jsonl") == 1
    assert steps_of(config) == [4, 5]


def test_a_plot_that_fails_is_said(config, monkeypatch, capsys):
    def fail(run_dir):
        raise ValueError("no font")

    monkeypatch.setattr(plots, "plot_run", fail)
    alone = dataclasses.replace(changed(config, steps=2), distributed=DistributedConfig(num_processes=1))
    monkeypatch.setattr(command, "parse_config", lambda parser, argv: (alone, None))
    command.main([])
    said = capsys.readouterr()
    assert "WARNING: no plots: no font" in said.err
    assert "trained: " in said.out
