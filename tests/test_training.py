"""The loop on real files: it learns, resumes bit for bit, and reports errors the user can fix in one line."""

import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from corpora import VOCABULARY
from flax import nnx

from layerskip_jax.checkpoint.arrays import named_arrays
from layerskip_jax.checkpoint.reading import load_model
from layerskip_jax.checkpoint.run_folder import find_checkpoint, read_config
from layerskip_jax.commands.evaluate import table
from layerskip_jax.commands.plots import plot_run, read_metrics
from layerskip_jax.config import (
    Config,
    DecodeConfig,
    EarlyExitConfig,
    LayerDropoutConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from layerskip_jax.data.sentencepiece_tokenizer import train_tokenizer
from layerskip_jax.data.sources import open_documents
from layerskip_jax.data.tokenizer import Tokenizer
from layerskip_jax.errors import Interrupted, UserError
from layerskip_jax.evaluation.exits import checkpoint_quality
from layerskip_jax.training import loop as training
from layerskip_jax.training.loop import train

STEPS = 13


@pytest.fixture
def config(corpus, tmp_path):
    return Config(
        model=ModelConfig(4, 16, 2, 1, 24, VOCABULARY, compute_dtype="float32"),
        layer_dropout=LayerDropoutConfig(p_max=0.3),
        early_exit=EarlyExitConfig(curriculum="rotational", dilation=3, e_scale=0.5),
        data=corpus,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        train=TrainConfig(
            run_dir=str(tmp_path / "run"),
            steps=STEPS,
            batch_size=8,
            loss_chunk=8,
            log_every=1,
            evaluate_every=5,
            evaluate_batches=2,
            checkpoint_every=4,
        ),
        decode=DecodeConfig(exit_layer=2, draft_length=2, max_new_tokens=8),
    )


def changed(config, group, **values):
    return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **values)})


def test_held_out_batches_are_read_once(config, monkeypatch):
    read, seen, original = [], [], training.held_out_batches
    monkeypatch.setattr(training, "held_out_batches", lambda *given: read.append(original(*given)) or read[-1])
    config = changed(config, "train", steps=3, evaluate_every=1, sample_every=0)
    train(config, on_evaluation=lambda step, model, batches, loss_L: seen.append((step, batches)))
    assert [step for step, _ in seen] == [1, 2, 3]
    assert all(batches is read[0] for _, batches in seen)
    assert len(read) == 1


def test_a_sample_prompt_without_a_token_is_refused_before_training(config, monkeypatch):
    """The default prompt is empty, and not every tokenizer adds a BOS."""
    monkeypatch.setattr(Tokenizer, "encode_prompt", lambda self, text: [7] * len(text))
    with pytest.raises(UserError, match=r"train.sample_prompt has no token: set it to a text, or train.sample_every"):
        train(changed(config, "train", sample_every=1))
    assert not Path(config.train.run_dir).exists()
    train(changed(config, "train", steps=2, sample_every=0))
    train(changed(config, "train", steps=3, sample_every=1, sample_prompt="x"))


def test_a_run_on_a_mesh_with_a_sequence_axis_trains_like_one_without(config, tmp_path):
    config = changed(changed(config, "model", num_kv_heads=2), "train", sample_every=0)
    states = []
    for name, mesh in [("rows", MeshConfig(data=8)), ("sequence", MeshConfig(data=4, sequence=2))]:
        run = dataclasses.replace(changed(config, "train", run_dir=str(tmp_path / name)), mesh=mesh)
        # Every shard of the rows draws the same dropout mask, so two numbers of shards would differ.
        states.append(train(changed(run, "layer_dropout", p_max=0.0)))
    for a, b in zip(*(jax.tree.leaves(nnx.state(state.model)) for state in states), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


class Stopped(BaseException):
    """Stands for anything that ends a process in the middle of a run."""


@pytest.fixture
def batches_seen(monkeypatch):
    """Record a digest of every training batch, and raise `Stopped` at the step ``stop[0]``, if given."""
    seen, stop = [], []
    original = training.to_devices

    def to_devices(batch, mesh):
        if stop and len(seen) == stop[0]:
            raise Stopped
        seen.append(hashlib.sha256(b"".join(batch[name].tobytes() for name in sorted(batch))).hexdigest())
        return original(batch, mesh)

    monkeypatch.setattr(training, "to_devices", to_devices)
    # The batches of an evaluation are not training's.
    monkeypatch.setattr(training, "component_losses", lambda *_: {"": np.zeros(4)})
    return seen, stop


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(config, batches_seen):
    """10 trials, each stopped at a random step, which is rarely the step of a checkpoint."""
    seen, stop = batches_seen
    whole = named_arrays(jax.device_get(train(config)))
    order = list(seen)
    assert len(order) == STEPS
    for trial in range(10):
        shutil.rmtree(config.train.run_dir)
        seen.clear()
        stop[:] = [random.Random(trial).randrange(1, STEPS)]
        with pytest.raises(Stopped):
            train(config)
        stop.clear()
        saved = (len(seen) // config.train.checkpoint_every) * config.train.checkpoint_every
        seen.clear()
        resumed = named_arrays(jax.device_get(train(config)))
        assert seen == order[saved:]
        assert resumed.keys() == whole.keys()
        for name, array in whole.items():
            assert np.array_equal(resumed[name], array), f"trial {trial}: {name}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_and_no_step_runs_twice(config, batches_seen, monkeypatch, capsys, number):
    seen, _ = batches_seen
    # Not necessarily the defaults: a shell starts background jobs with SIGINT ignored.
    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    whole = named_arrays(jax.device_get(train(config)))
    order = list(seen)
    shutil.rmtree(config.train.run_dir)
    seen.clear()
    with monkeypatch.context() as patch:
        original = training.to_devices

        def to_devices(batch, mesh):
            if len(seen) == 5:
                os.kill(os.getpid(), number)
            return original(batch, mesh)

        patch.setattr(training, "to_devices", to_devices)
        with pytest.raises(Interrupted, match="stopped after step 6, which is saved") as stop:
            train(config)
    assert stop.value.status == 128 + number
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == handlers
    resumed = named_arrays(jax.device_get(train(config)))
    assert "resuming after step 6" in capsys.readouterr().out
    assert seen == order
    for name, array in whole.items():
        assert np.array_equal(resumed[name], array), name


def test_the_stack_of_a_blocked_source_is_printed(config, monkeypatch, capfd):
    config = changed(config, "train", steps=2, hang_seconds=1)
    original = training.local_batches

    class Blocked:
        """Batches, the second of which is late."""

        def __init__(self, batches):
            self._batches, self.get_state, self._given = batches, batches.get_state, 0

        def __iter__(self):
            return self

        def __next__(self):
            self._given += 1
            if self._given == 2:
                time.sleep(1.5)
            return next(self._batches)

    def local_batches(config, split, mesh, in_order=False, **more):
        batches = original(config, split, mesh, in_order=in_order, **more)
        return batches if in_order else Blocked(iter(batches))

    train(config)  # fills the caches, so that compilation does not count as a hang
    shutil.rmtree(config.train.run_dir)
    monkeypatch.setattr(training, "local_batches", local_batches)
    capfd.readouterr()
    train(config)
    stderr = capfd.readouterr().err
    assert "no step has finished for 1 s (train.hang_seconds)" in stderr
    assert "in __next__" in stderr


def test_a_run_learns_and_writes_all_its_files(config, capsys):
    config = changed(config, "train", sample_every=6, sample_prompt="def ", steps=24)
    state = train(config)
    run = Path(config.train.run_dir)
    metrics = read_metrics(str(run))
    first, last = (metrics["validation/exit_loss/4"][step] for step in (5, 24))
    assert last < first
    assert set(metrics["train/objective"]) == set(range(1, 25))
    # Exit 1 has weight 0 (eq. 6). Exit 2 has a loss when t mod 3 = 1, which is step number t + 1.
    assert set(metrics["train/exit_loss/2"]) == {t + 1 for t in range(24) if t % 3 == 1}
    assert "train/exit_loss/1" not in metrics
    assert {"train/gradient_norm", "train/gradient_norm_of_block/3", "train/learning_rate", "train/mfu"} <= set(metrics)
    assert set(metrics["train/hfu"]) == set(range(2, 25))  # the first step compiles, so its time is no speed
    assert 0 < metrics["run/goodput"][24] < 1
    seconds = sum(points[24] for name, points in metrics.items() if name.startswith("run/seconds/"))
    assert metrics["run/seconds/training"][24] == pytest.approx(metrics["run/goodput"][24] * seconds)
    samples = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if "sample" in line]
    assert [sample["step"] for sample in samples if "sample" in sample] == [6, 12, 18, 24]
    assert list((run / "tensorboard").glob("events.*"))
    pictures = plot_run(str(run))
    assert all(len(picture.read_bytes()) > 10_000 for picture in pictures)
    assert sorted(int(step.name) for step in (run / "checkpoints").iterdir() if step.is_dir()) == [20, 24]
    printed = capsys.readouterr().out
    assert "held-out loss by exit" in printed
    assert "sample: 'def " in printed

    model, saved, tokenizer = load_model(str(run))
    assert saved == config
    assert tokenizer.read_bytes() == Path(config.data.tokenizer).read_bytes()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(model), jax.device_get(state.model))
    assert read_config(find_checkpoint(str(run / "checkpoints" / "20"))) == config


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(config):
    train(changed(config, "train", steps=4))
    with pytest.raises(UserError, match=r"gradient norm nan at step \d+; the newest checkpoint in .* is of step 4"):
        train(changed(config, "optimizer", learning_rate=1e38))
    model, _, _ = load_model(config.train.run_dir)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(model)))


def test_a_checkpoint_of_another_model_raises(config):
    train(changed(config, "train", steps=4))
    with pytest.raises(UserError, match=r"has model.ffn_dim 24, but the config says 32"):
        train(changed(config, "model", ffn_dim=32))
    with pytest.raises(UserError, match=r"trained with optimizer.name adamw, but the config says lion"):
        train(changed(config, "optimizer", name="lion"))


def test_a_run_keeps_its_tokenizer(config, tmp_path):
    train(changed(config, "train", steps=4))
    train_tokenizer(_Reversed(open_documents(config.data, "train")), str(tmp_path / "other.model"), VOCABULARY)
    other, stored = tmp_path / "other.model", Path(config.train.run_dir, "checkpoints", "tokenizer.model")
    with pytest.raises(UserError, match=r"than .*other\.model: continue with --data.tokenizer .*tokenizer\.model"):
        train(changed(config, "data", tokenizer=str(other)))
    # The digest in the checkpoint decides, whatever happened to the stored file.
    for change in (lambda: shutil.copy(other, stored), stored.unlink):
        change()
        with pytest.raises(UserError, match=r"than .*other\.model: give the --data.tokenizer that it was trained with"):
            train(changed(config, "data", tokenizer=str(other)))


class _Reversed:
    def __init__(self, documents):
        self._documents = documents

    def __len__(self):
        return len(self._documents)

    def __getitem__(self, index):
        return self._documents[index][::-1]


def test_a_checkpoint_evaluates_as_the_run_did(config):
    train(config)
    at_the_end = read_metrics(config.train.run_dir)["validation/exit_loss/3"][STEPS]
    quality = checkpoint_quality(config.train.run_dir, batches=2)
    assert quality.loss_L[2] == pytest.approx(at_the_end, rel=1e-5)
    assert "the loss at exit 2 is" in table({"run": quality})


def test_changed_settings_are_printed(config, capsys):
    train(changed(config, "train", steps=4))
    capsys.readouterr()
    train(config)
    opening = capsys.readouterr().out.splitlines()[0]
    assert "resuming after step 4; the learning rate of step 5 goes from 0.001 to " in opening
    assert "changed settings: train.steps 4 -> 13" in opening
    rates = read_metrics(config.train.run_dir)["train/learning_rate"]
    assert f"goes from 0.001 to {rates[5]:.3g};" in opening
    assert rates[5] > 5 * 0.001


@pytest.mark.parametrize("steps", [2, 4])
def test_a_finished_run_trains_nothing_and_reports_it(config, capsys, steps):
    train(changed(config, "train", steps=4))
    capsys.readouterr()
    assert int(train(changed(config, "train", steps=steps)).step) == 4
    opening = capsys.readouterr().out.splitlines()[0]
    assert "the run has 4 steps already, so nothing is trained" in opening
    assert "learning rate" not in opening


def test_an_unchanged_schedule_does_not_mention_the_learning_rate(config, capsys):
    train(changed(changed(config, "train", steps=4), "optimizer", schedule="constant"))
    capsys.readouterr()
    train(changed(config, "optimizer", schedule="constant"))
    opening = capsys.readouterr().out.splitlines()[0]
    assert "resuming after step 4; changed settings: train.steps 4 -> 13" in opening


def test_settings_that_do_not_fit_raise_before_anything_is_written(config, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "single").mkdir()
    (tmp_path / "single" / "only.txt").write_text("one document")
    cases = [
        (changed(config, "data", path=str(tmp_path / "single")), "the 'validation' split of .*single is empty"),
        (changed(config, "data", path=str(empty)), "no files under"),
        (
            changed(config, "train", run_dir=str(tmp_path / "single" / "only.txt" / "run")),
            r"the run folder .*run \(train.run_dir\) cannot be created: .*only\.txt",
        ),
        (changed(config, "data", tokenizer="nowhere.model"), "no tokenizer at nowhere.model"),
        (
            changed(config, "model", vocab_size=VOCABULARY + 1),
            "the tokenizer has 340 pieces and the model's vocabulary 341",
        ),
        (changed(config, "train", batch_size=12), "is not divisible by mesh.data"),
        (
            changed(config, "early_exit", curriculum="rotational", exits=(1,), exit_weights=()),
            r"early_exit\.exits 1 have no loss, .*: set early_exit\.exit_weights",
        ),
    ]
    for bad, message in cases:
        with pytest.raises(UserError, match=message):
            train(bad)
        assert not Path(config.train.run_dir).exists()


def test_paths_without_a_checkpoint_raise(config, tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint at .*nowhere: the folder does not exist"):
        find_checkpoint(str(tmp_path / "nowhere"))
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    with pytest.raises(UserError, match=r"did you mean '.*quickstart'"):
        find_checkpoint(str(tmp_path / "runs" / "quickstrat"))
    with pytest.raises(UserError, match=r"expected a run folder with checkpoints/STEP"):
        find_checkpoint(str(tmp_path / "runs" / "quickstart"))
