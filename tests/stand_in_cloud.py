"""Fixtures: a repository with the real tpu/ scripts, and a stand-in cloud (fixtures/stand_in_gcloud.py)."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FIXTURES = Path(__file__).parent / "fixtures"
SETTINGS = {"POD_NAME": "my-run", "POD_PROJECT": "my-project", "POD_ZONE": "us-east5-b", "POD_ACCELERATOR": "v6e-16"}
TRAIN = ["--", "--config", "configs/some.py", "--train.run_dir", "gs://bucket/run"]

# A stand-in for train.py: it accepts options, keeps running, saves on SIGTERM, and exits with a status.
# A file that another process waits for is renamed into place, so that nobody reads a part of it.
TRAIN_PY = """
import json, os, pathlib, signal, sys, time
home = pathlib.Path(os.environ["HOME"])
def save(*_):
    (home / "saved").touch()
    if not (home / "stubborn").exists():
        sys.exit(143)
signal.signal(signal.SIGTERM, save)
partial = home / "options.json.partial"
partial.write_text(json.dumps(sys.argv[1:]))
partial.replace(home / "options.json")
print("step 1", flush=True)
while not (home / "finish").exists():
    time.sleep(0.02)
sys.exit(int((home / "finish").read_text()))
"""

# The python3 of a worker: a stand-in for pip and uv that accepts only these commands.
WORKER_PYTHON = f"""#!/usr/bin/env bash
case "$*" in
  "-m pip install --quiet --user uv") [ "$PIP_BREAK_SYSTEM_PACKAGES" = 1 ] ;;
  "-m uv venv --quiet --python 3.12 "*)
    mkdir -p "$7/bin"
    printf '#!/bin/sh\\nexec {sys.executable} -S "$@"\\n' > "$7/bin/python"
    chmod +x "$7/bin/python" ;;
  "-m uv pip install --quiet --python $HOME/layerskip_jax_venv/bin/python\
 --constraint $HOME/layerskip_jax/tpu/requirements.txt --editable $HOME/layerskip_jax[tpu]")
    grep -q '^libtpu==' "$HOME/layerskip_jax/tpu/requirements.txt" && [ -f "$HOME/layerskip_jax/pyproject.toml" ] ;;
  *) echo "unexpected arguments of python3: $*" >&2; exit 2 ;;
esac
"""


class Cloud:
    """A repository with the real scripts and the stand-in cloud; `pod` runs tpu/pod."""

    def __init__(self, folder):
        self.repository, self.folder = folder / "a repository", folder / "cloud"
        path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
        bare = {key: value for key, value in os.environ.items() if not key.startswith(("POD_", "GIT_"))}
        self.environment = {**bare, **SETTINGS, "PATH": path, "CLOUD": str(self.folder)}
        self.started = []

    @classmethod
    def new(cls, folder):
        cloud = cls(folder)
        for directory in (cloud.folder / "worker_bin", folder / "bin", cloud.repository / "configs"):
            directory.mkdir(parents=True)
        shutil.copytree(ROOT / "tpu", cloud.repository / "tpu")
        (cloud.repository / ".gitignore").write_text("build/\n")
        (cloud.repository / "pyproject.toml").write_text("")
        (cloud.repository / "train.py").write_text(TRAIN_PY)
        (cloud.repository / "configs/some.py").write_text("")
        cloud.git("init", "--quiet", "--template=")
        cloud.git("add", "--all")
        for file, text in {
            folder / "bin/gcloud": f'#!/bin/sh\nexec {sys.executable} -S {FIXTURES}/stand_in_gcloud.py "$@"\n',
            cloud.folder / "worker_bin/python3": WORKER_PYTHON,
        }.items():
            file.write_text(text)
            file.chmod(0o755)
        return cloud

    def git(self, *words):
        return subprocess.run(["git", *words], cwd=self.repository, check=True, capture_output=True, text=True).stdout

    def start(self, *words, **environment):
        process = subprocess.Popen(
            [str(self.repository / "tpu/pod"), *words],
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def end(self):
        """End every process that a failed test has left, so that it cannot fail a later test as well."""
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with its children
                process.wait()
            process.stdout.close()
        self.kill_runs()  # last, because `watch` starts new ones

    def pod(self, *words, status=0, **environment):
        process = self.start(*words, **environment)
        output = process.communicate(timeout=60)[0]
        assert process.returncode == status, output
        return output

    def refused(self, *words, status=2, **environment):
        """Return the error line of a command that fails."""
        output = self.pod(*words, status=status, **environment)
        lines = [line for line in output.splitlines() if line.startswith("error:")]
        assert lines
        assert status == 1 or output.splitlines() == lines[-1:]
        return lines[-1].removeprefix("error: ")

    def calls(self, command=""):
        file = self.folder / "calls.jsonl"
        calls = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [call for call in calls if f"compute tpus {command}" in " ".join(call)]

    def forget_calls(self):
        (self.folder / "calls.jsonl").unlink(missing_ok=True)

    @property
    def state(self):
        return json.loads((self.folder / "state.json").read_text())

    def preempt(self, node="my-run", queued=False):
        """Preempt a slice: first its state changes, as on Cloud TPU, so that `watch` never sees only lost workers."""
        pids, state = self.pids(node), self.state
        state["nodes"][node] = "PREEMPTED"
        if queued:
            state["queued"]["my-run"]["state"] = "SUSPENDED"
        write_whole(self.folder / "state.json", json.dumps(state))
        kill_runs(pids)

    def fault(self, command, message, **more):
        write_whole(self.folder / "faults.json", json.dumps([{"command": command, "message": message, **more}]))

    def homes(self):
        return sorted(self.folder.glob("my-run*/worker-*"))

    def write(self, name, text=""):
        for home in self.homes():
            write_whole(home / name, text)

    def options(self):
        return [json.loads((home / "options.json").read_text()) for home in self.homes()]

    def wait_for(self, pattern, count, seconds=20):
        for _ in range(seconds * 50):
            found = sorted(self.folder.glob(pattern))
            if len(found) == count:
                return found
            time.sleep(0.02)
        raise AssertionError(f"{pattern}: {found}, not {count}")

    def pids(self, node="*", worker="*"):
        pids = [file.read_text().strip() for file in self.folder.glob(f"{node}/{worker}/layerskip_jax_run/pid")]
        return [pid for pid in pids if pid]  # the launch script creates the file before it writes the number

    def kill_runs(self, node="*", worker="*"):
        kill_runs(self.pids(node, worker))


def write_whole(file, text):
    """Write a file that a running process may read at any time: it sees the old text or the new text."""
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(text)
    partial.replace(file)


def kill_runs(pids):
    for pid in pids:
        running = subprocess.run(["ps", "-p", pid, "-o", "args="], capture_output=True, text=True)
        if "train.py --config" in running.stdout:
            subprocess.run(["kill", "-KILL", pid], check=False, capture_output=True)


@pytest.fixture(scope="session")
def templates(tmp_path_factory):
    """An empty cloud, and one with a slice on which the package is installed; each test gets a copy."""
    empty, full = tmp_path_factory.mktemp("empty"), tmp_path_factory.mktemp("full")
    for folder in (empty, full):
        Cloud.new(folder)
    cloud = Cloud(full)
    cloud.pod("create")
    cloud.pod("install")
    cloud.forget_calls()
    return empty, full


def copied(template, folder):
    shutil.copytree(template, folder, dirs_exist_ok=True)
    cloud = Cloud(folder)
    yield cloud
    cloud.end()


@pytest.fixture
def cloud(templates, tmp_path):
    yield from copied(templates[0], tmp_path)


@pytest.fixture
def installed(templates, tmp_path):
    yield from copied(templates[1], tmp_path)
