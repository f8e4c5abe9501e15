"""Goodput, FLOPs by formula, profiles on request, and stacks of a run that hangs."""

import contextlib
import dataclasses
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import time

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tqdm import tqdm

from layerskip_jax.config import Config, DataConfig, LayerDropoutConfig, ModelConfig, OptimizerConfig, TrainConfig
from layerskip_jax.recipe.distillation import SelfDistillation, kl_divergence
from layerskip_jax.recipe.recipe import Recipe
from layerskip_jax.training.monitoring import metrics
from layerskip_jax.training.monitoring.flops import flops_per_token, step_flops
from layerskip_jax.training.monitoring.goodput import PHASES, Goodput, steady_time
from layerskip_jax.training.monitoring.metrics import MetricsWriter, read_records
from layerskip_jax.training.monitoring.progress import Progress
from layerskip_jax.training.monitoring.watch import Profiler, Watchdog
from layerskip_jax.training.step import StepMetrics


class Clock:
    def __init__(self):
        self.time = 1000.0

    def __call__(self):
        return self.time


def test_goodput_excludes_time_that_was_lost():
    """A run with a pause and repeated steps, computed by hand."""
    clock, written = Clock(), []

    def spend(goodput, phase, seconds):
        with goodput.during(phase) if phase else contextlib.nullcontext():
            clock.time += seconds

    first = Goodput([], 0, clock)
    spend(first, None, 10)
    first.end_start()
    spend(first, None, 20)
    spend(first, "data", 5)
    spend(first, "saving", 1)
    written.append({"step": 4, **first.values()})
    spend(first, None, 7)  # steps after the checkpoint of step 4 ...
    spend(first, "evaluating", 3)
    written.append({"step": 6, **first.values()})
    clock.time += 100  # ... are lost with this process; the next start comes 100 s later
    second = Goodput(written, 4, clock)
    spend(second, None, 4)
    second.end_start()
    spend(second, None, 50)
    values = second.values()
    assert values["run/began"] == 1000
    seconds = {name.removeprefix("run/seconds/"): v for name, v in values.items() if name.startswith("run/seconds/")}
    expected = {"training": 70, "starting": 14, "data": 5, "saving": 1, "evaluating": 3, "sampling": 0, "lost": 107}
    assert seconds == expected
    assert values["run/goodput"] == 70 / 200
    assert set(expected) == {*PHASES, "lost"}


@given(jumps=st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3))
def test_goodput_stays_a_share_when_the_clock_is_set(jumps):
    """Between two starts, the only moments at which `steady_time` follows it."""
    written, time_of_day = [], 1e6
    for start, jump in enumerate(jumps):
        clock = Clock()
        clock.time = time_of_day + jump
        goodput = Goodput(written, start, clock)
        clock.time += 3
        goodput.end_start()
        clock.time += 5
        written.append({"step": start + 1, **goodput.values()})
        time_of_day = clock.time
        values = written[-1]
        seconds = {name: value for name, value in values.items() if name.startswith("run/seconds/")}
        assert values["run/seconds/training"] == pytest.approx(5 * (start + 1))
        assert all(value >= 0 for value in seconds.values())
        assert 0 < values["run/goodput"] <= 5 / 8 + 1e-6
        assert values["run/goodput"] == pytest.approx(values["run/seconds/training"] / sum(seconds.values()))


def test_the_steady_clock_ignores_a_clock_that_is_set(monkeypatch):
    before = steady_time()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert 0 <= steady_time() - before < 3600


@given(
    weights=st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=6),
    taught=st.booleans(),
    agreement_exit=st.integers(0, 5),  # 0: no exit teaches the last
    rate=st.floats(0, 0.9),
    tied=st.booleans(),
    remat=st.sampled_from(["none", "dots", "full", "offload"]),
    form=st.sampled_from(["masked", "skipping"]),
)
def test_step_flops_are_the_sum_of_the_matmuls(weights, taught, agreement_exit, rate, tied, remat, form):
    """Counted matmul by matmul; the standard rule adds 6 FLOPs per norm weight, which are not matmuls."""
    layers, exits = len(weights), int(sum(weights))
    agrees = 0 < agreement_exit < layers
    D, F, V, T, B, heads = 16, 24, 48, 8, 4, 2
    config = Config(
        model=ModelConfig(layers, D, heads, 1, F, V, tied_embedding=tied),
        layer_dropout=LayerDropoutConfig(p_max=0.5, form=form),
        data=DataConfig(sequence_length=T),
        train=TrainConfig(batch_size=B, remat=remat),
    )
    matmuls = D * D + 2 * D * (D // heads) + D * D + 3 * D * F  # queries; keys, values; output; SwiGLU
    block = 2 * matmuls + 4 * T * D  # scores, and their matmul with the values
    norms = 2 * D
    rates = np.full(layers, rate if form == "skipping" else 0)
    recipe = Recipe.from_config(config)
    if taught:
        recipe = dataclasses.replace(recipe, distillation=SelfDistillation(kl_divergence))
    if agrees:
        recipe = dataclasses.replace(recipe, agreement=SelfDistillation(kl_divergence), agreement_exit=agreement_exit)
    flops = step_flops(config, recipe, np.array(weights), np.full(layers, rate))
    whole = layers * (3 * block + 6 * norms) + 3 * 2 * D * V + 6 * D
    assert flops.plain == pytest.approx(B * T * whole)
    assert flops.plain == B * T * flops_per_token(config)
    assert flops.skipped == pytest.approx(B * T * (3 * block + 6 * norms) * rates.sum())
    last = weights[-1] > 0
    # Exit E and the last exit, if both have a loss, compute the logits of their teachers anyway.
    together = agrees and last and weights[agreement_exit - 1] > 0
    teachers = (exits - last - together if taught else 0) + (agrees and last and not together)
    assert flops.exits == B * T * (6 * D * V * (exits - 1) + 2 * D * V * teachers)
    again = (block - 2 * D * F + 2 * norms) * (1 - rates).sum()
    again = again if remat in ("full", "offload") else 0
    assert flops.recomputed == pytest.approx(B * T * again)
    assert flops.hardware == flops.plain + flops.exits - flops.skipped + flops.recomputed


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("first", [0, 40])
@pytest.mark.parametrize("stderr", [io.StringIO, Terminal], ids=["lines", "bar"])
def test_the_time_left_is_estimated_from_compiled_steps(first, stderr, tmp_path, monkeypatch, capsys):
    """A start of 100 s, then steps of 2 s: 58 of them take 116 s."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", stderr())
    model = ModelConfig(2, 16, 2, 1, 24, 340)
    train = TrainConfig(run_dir=str(tmp_path), steps=first + 60, log_every=1, hang_seconds=0)
    config = Config(model, optimizer=OptimizerConfig(warmup_steps=1), train=train)
    goodput = Goodput([], first, lambda: now[0])
    one, zero_L = np.float32(1), np.zeros(2, np.float32)
    metrics = StepMetrics(one, zero_L, zero_L + 1, zero_L, one, zero_L, one, np.float32(100), np.bool_(True))
    estimates = []
    with Progress(config, Recipe.from_config(config), first, goodput, 1e12) as progress:
        for step, seconds in ((1, 100), (2, 2), (3, 2)):
            now[0] += seconds
            progress.after_step(first + step, metrics)
            shown = progress._bar.format_dict
            estimates.append(tqdm.format_meter(**shown) if stderr is Terminal else capsys.readouterr().out)
    if stderr is Terminal:
        assert "<?" in estimates[0]
        assert "<01:56" in estimates[1]
        assert "<01:54" in estimates[2]
    else:
        assert estimates[0] == f"step {first + 1}/{first + 60}  loss 0.000\n"
        assert "50 tok/s" in estimates[1]
        assert "  2 min left" in estimates[1]


def test_a_profile_is_written_at_its_step_and_after_sigusr1(tmp_path, capsys):
    folder = tmp_path / "profile"
    with Profiler(TrainConfig(run_dir=str(tmp_path), profile_step=3, profile_steps=1)) as profiler:
        for step in range(1, 8):
            profiler.before_step(step, jnp.zeros(2))
            if step == 5:
                os.kill(os.getpid(), signal.SIGUSR1)
            assert folder.exists() == (step > 3)
    assert capsys.readouterr().out == f"profile of steps 3..3: {folder}\nprofile of steps 6..6: {folder}\n"
    assert list(folder.rglob("*.xplane.pb"))


def test_metrics_after_half_a_line_are_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 0.5}\n{"step": 2, "a"')
    writer = MetricsWriter(Config(train=TrainConfig(run_dir=str(tmp_path))))
    writer.write(3, {"a": 0.25})
    writer.close()
    assert read_records(str(tmp_path)) == [{"step": 1, "a": 0.5}, {"step": 3, "a": 0.25}]


def test_metrics_that_a_bucket_does_not_take_are_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "is_remote", lambda folder: True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    blocked = tmp_path / "bucket"
    writer = MetricsWriter(Config(train=TrainConfig(run_dir=str(blocked))))
    writer.write(3, {"a": 0.25})
    blocked.write_text("no folder")
    writer.publish()
    writer.close()
    said = capsys.readouterr().err
    assert said.count("each checkpoint tries again") == 1
    kept = re.search(r"metrics could not be copied to .*: they are in (.*)", said)
    assert read_records(kept[1]) == [{"step": 3, "a": 0.25}]


def test_a_trace_that_ends_with_the_run_is_announced(tmp_path, capsys):
    with Profiler(TrainConfig(run_dir=str(tmp_path), profile_step=2, profile_steps=5)) as profiler:
        for step in (1, 2):
            profiler.before_step(step, jnp.zeros(2))
    assert capsys.readouterr().out == f"profile of the last steps: {tmp_path / 'profile'}\n"


def test_the_watchdog_prints_every_hang_once(capfd):
    with Watchdog(1) as watchdog:
        time.sleep(2.5)
        stacks = capfd.readouterr().err
        watchdog.tick()
        time.sleep(1.5)
        again = capfd.readouterr().err
    assert stacks.startswith("no step has finished for 1 s (train.hang_seconds)")
    assert (stacks.count("no step"), again.count("no step")) == (1, 1)
    assert "test_the_watchdog_prints_every_hang_once" in stacks


def test_a_second_signal_ends_the_process_at_once():
    code = """
import os, signal, jax
from layerskip_jax.config import Config
from layerskip_jax.distributed import StopRequest
from layerskip_jax.sharding import make_mesh
with StopRequest(make_mesh(Config())) as stop:
    os.kill(os.getpid(), signal.SIGINT)
    print(stop.agreed(), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": ""}
    )
    assert done.returncode == -signal.SIGTERM
    assert done.stdout == f"{int(signal.SIGINT)}\n"
    assert done.stderr.startswith("SIGINT: saving and stopping after this step")
