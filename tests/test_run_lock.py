"""One writer for a run folder, locally and in a bucket: the second is refused, a stale lock is taken over."""

import contextlib
import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerskip_jax.config import Config, TrainConfig
from layerskip_jax.errors import UserError
from layerskip_jax.locations import locate
from layerskip_jax.training import run_lock
from layerskip_jax.training.run_lock import LOCK, Holder, RunLock

HERE = run_lock._this_process()
OTHER_HOST = ("other", "another kernel", 77, "1")


@pytest.fixture(params=["local", "bucket"])
def run_dir(request, tmp_path):
    """An empty run folder."""
    if request.param == "bucket":
        return f"{request.getfixturevalue('storage').new()}/run"
    (tmp_path / "run").mkdir()
    return str(tmp_path / "run")


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    monkeypatch.setattr(run_lock, "SETTLE_SECONDS", 0.01)


@contextlib.contextmanager
def held(run_dir, monkeypatch, process=HERE, hang=1):
    """Hold the lock as ``process``."""
    with monkeypatch.context() as patch:
        patch.setattr(run_lock, "_this_process", lambda: process)
        lock = RunLock(Config(train=TrainConfig(run_dir=run_dir, hang_seconds=hang)))
    lock.acquire()
    try:
        yield lock
    finally:
        lock.release()


def leave(run_dir, **changes):
    """Leave the lock of a process that was killed."""
    holder = Holder(*HERE, folder=str(locate(run_dir)), token="t", every=0.25, step=40, time=1.8e9)
    (locate(run_dir) / LOCK).write_text(json.dumps(dataclasses.asdict(dataclasses.replace(holder, **changes))))


def test_the_second_writer_is_refused_in_one_line(run_dir, monkeypatch):
    with held(run_dir, monkeypatch) as first:
        first.check(40)
        first._write()
        for process in (HERE, OTHER_HOST):  # the second host sees a sign of life
            with pytest.raises(UserError) as refused, held(run_dir, monkeypatch, process):
                pass
            stated = (
                rf"{re.escape(run_dir)} .*in use: process {os.getpid()} on host {re.escape(HERE[0])} \(last step 40"
            )
            assert re.search(stated + r" at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC\)", str(refused.value))
            assert "\n" not in str(refused.value)
        first.check(41, now=True)
    assert not (locate(run_dir) / LOCK).exists()
    with held(run_dir, monkeypatch):
        pass


def test_the_owner_of_the_files_needs_no_name(tmp_path, monkeypatch):
    """As in a container with --user 12345: `etils` fails to look it up."""
    monkeypatch.setattr("pwd.getpwuid", lambda number: (_ for _ in ()).throw(KeyError(f"uid not found: {number}")))
    with held(str(tmp_path), monkeypatch) as first:
        with pytest.raises(UserError, match="in use"), held(str(tmp_path), monkeypatch):
            pass
        first.check(41, now=True)
        assert first._still_ours()
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize(
    "gone",
    [
        {"process": 2**22 + 1},  # no such process
        {"started": "1"},  # the number belongs to another process now
    ],
)
def test_the_lock_of_a_process_that_is_gone_is_taken_over_at_once(gone, run_dir, monkeypatch, capsys):
    leave(run_dir, **gone)
    with held(run_dir, monkeypatch, hang=1800) as lock:
        lock.check(41, now=True)
    warning = capsys.readouterr().err
    assert warning.startswith("WARNING: process ")
    assert f"on host {HERE[0]} (last step 40 at 2027-01-15 08:00:00 UTC) is gone" in warning
    assert warning.count("\n") == 1


def test_a_zombie_is_gone(run_dir, monkeypatch, capsys):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    leave(run_dir, process=child.pid, started=run_lock._started(child.pid))
    with pytest.raises(UserError, match=f"in use: process {child.pid} on host"), held(run_dir, monkeypatch, hang=1800):
        pass
    child.send_signal(signal.SIGKILL)
    while run_lock._started(child.pid):
        time.sleep(0.01)
    with held(run_dir, monkeypatch):  # not waited for yet
        assert "is gone" in capsys.readouterr().err
    child.wait()


@pytest.mark.parametrize(
    "silent",
    [
        {"host": "other", "system": "another kernel"},  # preempted, and restarted on another host
        {"system": "before the restart of this machine"},
        {"folder": "/somewhere/else"},  # a copy of the folder of a run that is alive
    ],
)
def test_a_lock_without_a_sign_of_life_is_taken_over_after_hang_seconds(silent, run_dir, monkeypatch, capsys):
    leave(run_dir, **silent)
    began = time.monotonic()
    with held(run_dir, monkeypatch):
        assert time.monotonic() - began > 0.5  # it has waited
    waiting, warning = capsys.readouterr().err.splitlines()
    assert "waiting for a sign of life, at most 1 s; if it is gone, remove" in waiting
    setting = r" \(train.hang_seconds\)" if "host" in silent else ""
    assert re.search(rf"WARNING: .* has shown no sign of life for \d+ s{setting}: ", warning)


def test_a_silent_process_of_this_host_is_taken_over_and_stops(run_dir, monkeypatch):
    """As after SIGSTOP, or a machine that slept; the first then saves no more."""
    with held(run_dir, monkeypatch) as first:
        monkeypatch.setattr(first, "_still_ours", lambda: False)
        monkeypatch.setattr(first, "_write", lambda: None)
        os_time = time.time
        monkeypatch.setattr(time, "time", lambda: os_time() + 10)
        with held(run_dir, monkeypatch) as second:
            monkeypatch.undo()
            second.check(1, now=True)
            with pytest.raises(UserError, match=rf"process {os.getpid()} .* has taken the run folder .* over"):
                first.check(41, now=True)
            first.release()
            second.check(2, now=True)
            assert (locate(run_dir) / LOCK).exists()


@pytest.mark.parametrize("hours", [-5, 5])
def test_clocks_that_differ_do_not_end_a_healthy_run(hours, run_dir, monkeypatch):
    with held(run_dir, monkeypatch):
        os_time = time.time
        monkeypatch.setattr(time, "time", lambda: os_time() + 3600 * hours)
        for process in (HERE, OTHER_HOST):
            with pytest.raises(UserError, match="in use"), held(run_dir, monkeypatch, process):
                pass


def test_a_lock_from_the_future_is_taken_over(run_dir, monkeypatch):
    leave(run_dir, host="other", time=1e12)
    os_time = time.time
    monkeypatch.setattr(time, "time", lambda: os_time() - 1e6)
    with held(run_dir, monkeypatch):
        pass


@given(
    content=st.binary(max_size=30)
    | st.dictionaries(
        st.sampled_from(list(Holder.__dataclass_fields__)),
        st.none() | st.floats() | st.text() | st.integers(),
        max_size=4,
    ).map(lambda values: json.dumps(values).encode())
)
def test_any_content_of_a_lock_is_described(content):
    assert "process" in str(run_lock._parse((0, content)))
    assert 0 < run_lock._parse((0, content)).every <= run_lock.BEAT_SECONDS


@pytest.mark.parametrize("content", [b"", b"{", b"no lock", b"[]"])
def test_a_file_that_is_not_a_lock_ends_no_run_and_blocks_none(content, run_dir, monkeypatch):
    """As a reader may see a write that is not complete."""
    (locate(run_dir) / LOCK).write_bytes(content)
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.2)
    with held(run_dir, monkeypatch) as lock:
        ours = (locate(run_dir) / LOCK).read_bytes()
        (locate(run_dir) / LOCK).write_bytes(content)
        lock.check(1, now=True)
        deadline = time.monotonic() + 60
        while (locate(run_dir) / LOCK).read_bytes() == content and time.monotonic() < deadline:
            time.sleep(0.05)  # the next beat writes the lock again
        assert json.loads((locate(run_dir) / LOCK).read_bytes())["token"] == json.loads(ours)["token"]
    assert not (locate(run_dir) / LOCK).exists()


def test_a_start_that_fails_leaves_no_lock(run_dir, monkeypatch):
    """The next start would wait for it, or would be refused by its own process."""

    def fail():
        raise RuntimeError("can't start new thread")

    lock = RunLock(Config(train=TrainConfig(run_dir=run_dir)))
    monkeypatch.setattr(lock._thread, "start", fail)
    with pytest.raises(RuntimeError, match="new thread"):
        lock.acquire()
    assert not (locate(run_dir) / LOCK).exists()
    with held(run_dir, monkeypatch):
        pass


def test_one_of_many_that_start_at_once_gets_the_lock(run_dir, monkeypatch):
    """With threads, and a stale lock to take over, which all see."""
    monkeypatch.setattr(run_lock, "SETTLE_SECONDS", 0.3)
    for stale in (False, True):
        outcomes, refused, together = [], [], threading.Barrier(8)
        if stale:
            leave(run_dir, started="1")

        def start(outcomes=outcomes, refused=refused, together=together):
            lock = RunLock(Config(train=TrainConfig(run_dir=run_dir)))
            together.wait()
            try:
                lock.acquire()
                outcomes.append(lock)
            except UserError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=start) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(outcomes) == 1
        assert len(refused) == 7
        assert all("in use" in line for line in refused)
        outcomes[0].release()


def test_the_other_processes_of_a_run_take_no_lock(run_dir, monkeypatch):
    with held(run_dir, monkeypatch), monkeypatch.context() as patch:
        patch.setattr(jax, "process_index", lambda: 1)
        with held(run_dir, monkeypatch) as other:
            other.check(3, now=True)
        assert (locate(run_dir) / LOCK).exists()


def test_a_full_disk_is_no_sign_of_death(tmp_path, monkeypatch):
    with held(str(tmp_path), monkeypatch) as lock:
        old = (tmp_path / LOCK).stat().st_mtime_ns

        def full(path, content):
            raise OSError(errno.ENOSPC, "full")

        monkeypatch.setattr(Path, "write_bytes", full)
        lock._write()
        assert (tmp_path / LOCK).stat().st_mtime_ns > old


def test_a_link_to_a_run_folder_has_the_same_lock(tmp_path, monkeypatch):
    (tmp_path / "läufe 1").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "läufe 1")
    with (
        held(str(tmp_path / "läufe 1"), monkeypatch),
        pytest.raises(UserError, match="in use"),
        held(str(tmp_path / "link"), monkeypatch),
    ):
        pass
    shutil.rmtree(tmp_path / "läufe 1")
