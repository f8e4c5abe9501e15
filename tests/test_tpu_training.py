"""The commands of tpu/README.md, from an empty cloud to a trained model in a bucket, with real training processes.

Only gcloud and the chips are stand-ins: two workers with 8 simulated devices each, which find each other through
Slurm's variables as TPU workers do through their metadata.
"""

import os
import re
import shlex
import shutil
import socket
import sys
import time

import numpy as np
import pytest
from bucket import objects
from corpora import VOCABULARY
from stand_in_cloud import ROOT, Cloud

from benchmarks.reliability import contents
from layerskip_jax.checkpoint.run_folder import read_config
from layerskip_jax.commands import plots, train
from layerskip_jax.data.pretokenize import pretokenize
from layerskip_jax.locations import locate
from layerskip_jax.training.monitoring.metrics import read_records

STEPS = 6
# Without layer dropout: every shard of the batch gets the same drop mask, so another mesh drops other sequences.
SMALL = f"""
    --model.num_layers 3 --model.dim 32 --model.num_heads 2 --model.num_kv_heads 2 --model.ffn_dim 48
    --model.vocab_size {VOCABULARY} --model.compute_dtype float32 --data.sequence_length 32 --data.shuffle_window 128
    --layer_dropout.p_max 0 --train.loss_chunk 32 --train.steps {STEPS} --train.checkpoint_every 2
    --train.evaluate_every {STEPS} --train.evaluate_batches 1 --train.sample_every 0 --train.log_every 1
    --optimizer.warmup_steps 2
""".split()

# The Python of a worker: the number of the worker is the number of its process.
VENV_PYTHON = f"""#!/bin/sh
SLURM_PROCID="${{HOME##*worker-}}" SLURM_LOCALID="${{HOME##*worker-}}" exec {sys.executable} "$@"
"""
WORKER_PYTHON = """#!/bin/sh
case "$*" in "-m uv venv "*) mkdir -p "$7/bin"; cp "$CLOUD/venv_python" "$7/bin/python" ;; esac
"""


def readme_commands():
    """Return the settings of tpu/README.md as variables, and the words of its `tpu/pod watch`."""
    lines = [line.strip() for line in (ROOT / "tpu/README.md").read_text().splitlines()]
    settings = next(line for line in lines if line.startswith("export POD_NAME="))
    watch = next(line for line in lines if line.startswith("tpu/pod watch -- "))
    return dict(word.split("=") for word in shlex.split(settings)[1:]), shlex.split(watch)[1:]


def job_with_a_free_port():
    """Return a number of a Slurm job. jax computes the port of the coordinator from it."""
    for job in range(os.getpid() % 4096, os.getpid() % 4096 + 4096):
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", 61440 + job % 4096)):
                return str(job)
    raise AssertionError("no free port")


@pytest.fixture
def bucket(storage, corpus, tmp_path):
    """A bucket with a pretokenized corpus and its tokenizer, as the README expects them."""
    bucket = storage.new()
    pretokenize(corpus, str(tmp_path / "tokens"))
    for name in objects(tmp_path / "tokens"):
        (locate(bucket) / "tokens" / name).write_bytes((tmp_path / "tokens" / name).read_bytes())
    shutil.copyfile(corpus.tokenizer, tmp_path / "tokenizer.model")
    (locate(bucket) / "tokenizer.model").write_bytes((tmp_path / "tokenizer.model").read_bytes())
    return bucket


@pytest.fixture
def pods(bucket, tmp_path):
    """A stand-in cloud whose workers train; it starts after the bucket, whose address is in the environment."""
    pods = Cloud.new(tmp_path / "pods")
    shutil.copytree(ROOT / "layerskip_jax", pods.repository / "layerskip_jax")
    for name in ("train.py", "configs/quickstart.py", "pyproject.toml"):
        shutil.copyfile(ROOT / name, pods.repository / name)
    for file, text in {"venv_python": VENV_PYTHON, "worker_bin/python3": WORKER_PYTHON}.items():
        (pods.folder / file).write_text(text)
        (pods.folder / file).chmod(0o755)
    slurm = {"SLURM_JOB_ID": job_with_a_free_port(), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    pods.environment |= slurm
    yield pods
    pods.end()


def test_a_preempted_slice_trains_as_one_process_does(pods, bucket, storage, monkeypatch, tmp_path, capsys):
    variables, watch = readme_commands()
    command = [word.replace("gs://BUCKET", bucket) for word in watch] + SMALL
    run = f"{bucket}/runs/first"
    assert run in command
    monkeypatch.setattr(storage.faults, "seconds", (0.005, 0.015))  # so that the run does not end before the preemption
    process = pods.start(command[0], "--poll=1", *command[1:], **variables)
    checkpoints = storage.local(run) / "checkpoints"
    while process.poll() is None and not (checkpoints / "2/commit_success.txt").exists():
        time.sleep(0.02)
    pods.preempt(variables["POD_NAME"])
    monkeypatch.undo()
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0, output
    assert "PREEMPTED" in output

    log = (pods.folder / variables["POD_NAME"] / "worker-0/layerskip_jax_run/log").read_text()
    assert "of 2 processes (data 1, fsdp 16, sequence 1, tensor 1)" in log
    assert re.search(r"6 steps, resuming after step [24]\n", log)
    assert log.count(": python train.py") == 1
    assert [record["step"] for record in read_records(run) if "train/objective" in record] == list(range(1, STEPS + 1))

    local = str(tmp_path / "local")
    monkeypatch.setattr(plots, "plot_run", lambda run_dir: [])
    alone = ["--mesh.fsdp", "8", "--distributed.num_processes", "1"]  # the last value of an option counts
    train.main([word.replace(run, local) for word in command[2:]] + alone)
    capsys.readouterr()
    ours, theirs = contents(run), contents(local)
    assert read_config(locate(run) / "checkpoints" / str(STEPS)).mesh.fsdp == 16
    arrays = [name for name in ours if ours[name].dtype == np.float32]
    assert arrays
    for name in arrays:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-6, rtol=0)
