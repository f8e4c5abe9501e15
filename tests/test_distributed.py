"""Two real processes with four simulated devices each: they train, stop and fail together."""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
from corpora import VOCABULARY

from layerskip_jax.checkpoint.arrays import named_arrays
from layerskip_jax.checkpoint.reading import load_model
from layerskip_jax.config import (
    Config,
    DecodeConfig,
    DistributedConfig,
    EarlyExitConfig,
    LayerDropoutConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from layerskip_jax.data.load_tokenizer import load_tokenizer
from layerskip_jax.decoding.text import TextGenerator
from layerskip_jax.training import loop as training
from layerskip_jax.training.monitoring.metrics import read_records

ROOT = Path(__file__).parent.parent
STEPS, STOPPED = 8, 5
# A worker that sends itself a signal just before it dispatches step SIGNAL_AT. It votes behind that step, and the votes
# are counted one step later. Gloo's threads write to stdout in the middle of our lines, so stdout becomes a duplicate
# and theirs goes to /dev/null.
WORKER = """
    import os, signal, sys
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    from layerskip_jax.commands import plots
    from layerskip_jax.training import loop as training
    from layerskip_jax.commands import train
    from layerskip_jax.errors import run_command

    steps, to_devices = [], training.to_devices

    def to_devices_and_signal(batch, mesh):
        steps.append(len(steps))
        if len(steps) == int(os.environ.get("SIGNAL_AT", 0)):
            os.kill(os.getpid(), getattr(signal, "SIG" + os.environ.get("SIGNAL", "TERM")))
        return to_devices(batch, mesh)

    training.to_devices = to_devices_and_signal
    plots.plot_run = lambda run_dir: []  # plots take longer than the training
    run_command(train.main)
"""


@pytest.fixture
def config(corpus, tmp_path):
    return Config(
        model=ModelConfig(4, 16, 2, 2, 24, VOCABULARY, compute_dtype="float32"),
        layer_dropout=LayerDropoutConfig(p_max=0.3, time_scale="constant"),
        early_exit=EarlyExitConfig(curriculum="rotational", dilation=3, e_scale=0.5),
        data=corpus,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        train=TrainConfig(
            run_dir=str(tmp_path / "run"),
            steps=STEPS,
            batch_size=8,
            loss_chunk=32,
            log_every=1,
            evaluate_every=STEPS,
            evaluate_batches=2,
            checkpoint_every=STEPS,
            sample_every=STEPS,
        ),
        decode=DecodeConfig(mode="autoregressive", max_new_tokens=4),
    )


def options(config):
    """Return the command line options that make ``config``."""
    flat = {(g, n): v for g, settings in dataclasses.asdict(config).items() for n, v in settings.items()}
    default = {(g, n): v for g, settings in dataclasses.asdict(Config()).items() for n, v in settings.items()}
    return [
        f"--{g}.{n}={str(v).lower() if isinstance(v, bool) else v}" for (g, n), v in flat.items() if default[g, n] != v
    ]


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(config, process, port, timeout=60, heartbeat=100, **environment):
    """Start process number ``process`` of two."""
    here = DistributedConfig(f"localhost:{port}", 2, process, timeout, heartbeat)
    devices = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"}  # the last flag wins
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WORKER), *options(dataclasses.replace(config, distributed=here))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | devices | environment,
    )


def finish(*processes, status, within=120):
    """Return stdout and stderr of the processes, and check that all exit with ``status``."""
    outputs = []
    for process in processes:
        try:
            outputs.append(process.communicate(timeout=within))
        except subprocess.TimeoutExpired:
            for other in processes:
                other.kill()
            raise
    assert [process.returncode for process in processes] == [status] * len(processes), outputs
    return outputs


def test_two_processes_stop_resume_and_train_as_one_does(config, tmp_path, capsys):
    """The parameters after a stop and a resume equal those of one process with 8 devices to 1e-6, not bit for bit.

    Gradients are summed in another order over processes than over devices; the largest difference so far is 8.6e-7.
    """
    port = free_port()
    stopped = finish(start(config, 0, port), start(config, 1, port, SIGNAL_AT="4"), status=143)
    run = Path(config.train.run_dir)
    for _, stderr in stopped:
        assert f"SIGTERM: stopped after step {STOPPED}, which is saved" in stderr
    assert "a second signal ends the run at once" in stopped[1][1]
    assert [step.name for step in (run / "checkpoints").iterdir() if step.is_dir()] == [str(STOPPED)]

    port = free_port()
    first, second = finish(start(config, 0, port), start(config, 1, port), status=0)
    assert (
        f"of 2 processes (data 2, fsdp 2, sequence 1, tensor 2); {STEPS} steps, resuming after step {STOPPED}\n"
        in first[0]
    )
    assert second[0] == ""
    steps = [record["step"] for record in read_records(str(run)) if "train/objective" in record]
    assert steps == list(range(1, STEPS + 1))  # no step runs twice, and the second process writes nothing
    assert len(list((run / "tensorboard").iterdir())) == 2  # one for each start
    model, _, tokenizer = load_model(str(run))
    alone = TextGenerator(model.unstacked(), load_tokenizer(str(tokenizer)), config.decode)
    sample = (
        alone.generate([config.train.sample_prompt]).completions[0].text
    )  # the two processes generated it on their mesh
    assert [(r["step"], r["sample"]) for r in read_records(str(run)) if "sample" in r] == [(STEPS, sample)]

    alone = dataclasses.replace(
        config, train=dataclasses.replace(config.train, run_dir=str(tmp_path / "alone"), sample_every=0)
    )
    reference = named_arrays(jax.device_get(training.train(alone).model))
    trained = named_arrays(jax.device_get(load_model(str(run))[0]))
    difference = max(float(np.abs(trained[name] - array).max()) for name, array in reference.items())
    with capsys.disabled():
        print(f"largest difference of a parameter: {difference:.1e}")
    assert difference <= 1e-6
    ours, theirs = (
        {(r["step"], n): v for r in read_records(d) for n, v in r.items() if n.startswith("validation")}
        for d in (config.train.run_dir, alone.train.run_dir)
    )
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_one_of_two_processes_is_killed_the_other_exits_and_one_process_resumes(config, tmp_path):
    """Four devices per process before, eight in one process after: the same batches, parameters equal to 1e-6."""
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, checkpoint_every=3, sample_every=0))
    port = free_port()
    first, second = (
        start(config, 0, port, heartbeat=30),
        start(config, 1, port, heartbeat=30, SIGNAL_AT="6", SIGNAL="KILL"),
    )
    finish(second, status=-signal.SIGKILL)
    _, stderr = first.communicate(timeout=90)
    if first.returncode == 75:  # the transport reported it
        assert "process 0 of 2 exits because another process stopped responding" in stderr
        assert "Traceback" not in stderr
    else:  # jax's heartbeat reported it
        assert first.returncode == -signal.SIGABRT
        assert "another task died" in stderr

    resumed = named_arrays(jax.device_get(training.train(config).model))
    alone = dataclasses.replace(config, train=dataclasses.replace(config.train, run_dir=str(tmp_path / "alone")))
    reference = named_arrays(jax.device_get(training.train(alone).model))
    assert max(float(np.abs(resumed[name] - array).max()) for name, array in reference.items()) <= 1e-6
    steps = [record["step"] for record in read_records(config.train.run_dir) if "train/objective" in record]
    assert steps[-5:] == [4, 5, 6, 7, 8]  # from the checkpoint of step 3 on


def test_an_error_of_one_process_is_raised_on_both(config):
    """At the next agreement, though the other process has no error."""
    port = free_port()
    broken = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer="nowhere.model"))
    first, second = finish(start(config, 0, port), start(broken, 1, port), status=2)
    assert "error: process 1 failed: no tokenizer at nowhere.model" in first[1]
    assert "error: no tokenizer at nowhere.model" in second[1]
    assert not Path(config.train.run_dir).exists()


def test_waiting_for_a_missing_process_times_out(config):
    first, second = free_port(), free_port()
    runs = finish(start(config, 0, first, timeout=3), start(config, 1, second, timeout=3), status=2, within=30)
    waited = "error: waited 3 s (distributed.timeout)"
    assert runs[0][1] == f"{waited} at localhost:{first}: fewer than 2 processes connected\n"
    assert runs[1][1] == f"{waited} for process 0 of 2 at localhost:{second}: Connection refused\n"
