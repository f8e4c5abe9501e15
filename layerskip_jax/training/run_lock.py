"""Let only one process write to a run folder, with a lock that another process takes over when it is stale.

``RUN_DIR/writer.json`` names the process and its last step. The process rewrites the file every few seconds and removes
it at the end. A second process takes the lock over at once if the first one ran on this kernel and has ended. The
second process is refused at once if the first one still runs and has rewritten this file within ``train.hang_seconds``.
Otherwise it watches the file for 2.5 beats if the lock names this host (a restarted container, a copied folder, a
process that hangs). If the lock names another host, it watches until the file is ``train.hang_seconds`` old, and at
least for 2.5 beats. If the file changes, its process is alive. The clocks of two hosts may differ, so the age of the
file only shortens the wait.
"""

import contextlib
import dataclasses
import json
import os
import socket
import sys
import threading
import time
import uuid
from pathlib import Path

import jax

from layerskip_jax.config import Config, TrainConfig
from layerskip_jax.config_dict import from_dict
from layerskip_jax.distributed import agree
from layerskip_jax.errors import UserError, warn
from layerskip_jax.locations import folder_lock, is_remote, locate, modified_time, write_file

LOCK = "writer.json"
BEAT_SECONDS, LOCAL_BEAT_SECONDS = 10.0, 2.0
"""Seconds between signs of life in a bucket and in other folders, at most a quarter of ``train.hang_seconds``."""
SETTLE_SECONDS = 1.0
"""Seconds between writing the lock to a bucket and reading it again. Of two processes that start together, the one
whose lock was overwritten then gives up."""

Sign = tuple[int, bytes]
"""When the file was last changed [seconds], and its content."""


@dataclasses.dataclass(frozen=True)
class Holder:
    """The process that a lock names."""

    host: str = "an unknown host"
    system: str = ""  # boot ID and PID namespace
    process: int = 0
    started: str = ""  # the process's start time
    folder: str = ""
    token: str = ""  # random; tells two locks of one process apart
    every: float = BEAT_SECONDS  # seconds between rewrites
    step: int = 0
    time: float = 0.0
    beats: int = 0  # rewrites so far

    def __str__(self) -> str:
        try:
            moment = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.time))
        except (ValueError, OverflowError, OSError):
            moment = "an unknown time"
        last = f"last step {self.step} at {moment}" if self.step > 0 else f"no step yet, started at {moment}"
        return f"process {self.process} on host {self.host} ({last})"


class RunLock:
    """The lock of a run folder. Process 0 of a run holds it for all its processes, which call the methods together."""

    def __init__(self, config: Config):
        folder = locate(config.train.run_dir)
        self._file, self._run_dir = folder / LOCK, config.train.run_dir
        self._hang = float(config.train.hang_seconds or TrainConfig().hang_seconds)
        beat = BEAT_SECONDS if is_remote(folder) else LOCAL_BEAT_SECONDS
        token, every = uuid.uuid4().hex, min(beat, self._hang / 4)
        self._me = Holder(*_this_process(), str(folder), token, every, time=time.time())
        self._ended, self._taken_over = threading.Event(), ""
        self._thread = threading.Thread(target=self._beat, daemon=True, name="run lock")

    def acquire(self) -> None:
        """Take the lock, with a warning if it is stale; raises `UserError` if a process that is alive holds it.

        A process of another host is watched for up to ``train.hang_seconds``.
        """
        agree("run folder", lambda: self._acquire() if jax.process_index() == 0 else None)

    def _acquire(self) -> None:
        found = self._read()
        stale = self._wait(found) if found else ""
        with folder_lock(self._file.parent, wait=True):
            if (now := self._read()) and not (stale and now == found):
                raise self._refusal(now)
            self._write()
        try:
            if is_remote(self._file):
                time.sleep(SETTLE_SECONDS)
                if (now := self._read()) and _parse(now).token != self._me.token:
                    raise self._refusal(now)
            if stale:
                warn(f"{stale}: its run folder {self._run_dir} is taken over")
            self._thread.start()
        except BaseException:  # do not leave a lock that the next start would wait for
            self._remove()
            raise

    def _wait(self, found: Sign) -> str:
        """Return why the lock ``found`` is stale, or "" if it is removed while this waits.

        Raises `UserError` if its process is alive. The module's docstring names the cases.
        """
        holder, silent = _parse(found), time.time() - found[0]
        one_kernel = (holder.host, holder.system) == (self._me.host, self._me.system)
        if one_kernel and _started(holder.process) != holder.started:
            return f"{holder} is gone"
        if one_kernel and holder.folder == self._me.folder and silent <= self._hang:
            raise self._refusal(found)
        # A restarted container or machine keeps its name, and a copy of a run folder keeps its lock. So neither shows
        # that the process is alive.
        patience = 2.5 * holder.every
        if holder.host != self._me.host:
            patience = max(self._hang - max(silent, 0), patience)
        print(
            f"{holder} has the run folder {self._run_dir}: waiting for a sign of life, at most {patience:.0f} s; if "
            f"it is gone, remove {self._file}",
            file=sys.stderr,
            flush=True,
        )
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            time.sleep(min(holder.every / 4, 1))
            now = self._read()
            if now is None:
                return ""
            if now != found:
                raise self._refusal(now)
        setting = " (train.hang_seconds)" if holder.host != self._me.host else ""
        return f"{holder} has shown no sign of life for {max(silent, 0) + patience:.0f} s{setting}"

    def _refusal(self, found: Sign) -> UserError:
        return UserError(
            f"the run folder {self._run_dir} (train.run_dir) is in use: {_parse(found)} trains in it; stop that "
            f"process or name another --train.run_dir (if it is gone, remove {self._file})"
        )

    def check(self, step: int, now: bool = False) -> None:
        """Record the last ``step``; raises `UserError` if another process has taken the lock over.

        With ``now`` this reads the file; otherwise it uses what the last beat found.
        """
        if step > self._me.step:
            self._me = dataclasses.replace(self._me, step=step, time=time.time())
        if now and self._thread.is_alive():
            with contextlib.suppress(Exception):
                self._still_ours()
        if self._taken_over:
            raise UserError(
                f"{self._taken_over} has taken the run folder {self._run_dir} over, because this process showed no "
                "sign of life; this process stops without saving"
            )

    def release(self) -> None:
        """Remove the lock, if this process still holds it."""
        self._ended.set()
        if self._thread.ident is None:  # not process 0, or not acquired
            return
        self._thread.join(BEAT_SECONDS)
        self._remove()

    def _remove(self) -> None:
        with contextlib.suppress(Exception), folder_lock(self._file.parent, wait=True):  # the network may be down
            if self._still_ours():
                self._file.unlink()

    def _beat(self) -> None:
        while not self._taken_over and not self._ended.wait(self._me.every):
            with contextlib.suppress(Exception), folder_lock(self._file.parent, wait=True):  # the network may be down
                if self._still_ours():
                    self._write()

    def _still_ours(self) -> bool:
        """Return whether no other process has taken the lock over; remember which one has."""
        now = self._read()
        holder = _parse(now) if now else self._me  # the next beat writes a missing file
        ours = holder.token in ("", self._me.token)  # a damaged file has no token
        if not ours:
            self._taken_over = str(holder)
        return ours

    def _read(self) -> Sign | None:
        try:
            return modified_time(self._file), self._file.read_bytes()
        except FileNotFoundError:
            return None

    def _write(self) -> None:
        self._me = dataclasses.replace(self._me, beats=self._me.beats + 1)
        try:
            write_file(self._file, json.dumps(dataclasses.asdict(self._me)))
        except UserError:  # the modification time can change on a full disk
            if self._me.beats == 1 or is_remote(self._file):
                raise
            os.utime(self._file)


def _this_process() -> tuple[str, str, int, str]:
    """Return the host's name, the kernel's boot ID with the PID namespace, the process ID and its start time."""
    system = ""
    with contextlib.suppress(OSError):
        system = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    return socket.gethostname(), system, os.getpid(), _started(os.getpid())


def _started(process: int) -> str:
    """Return when a process of this kernel started, or something else that is constant; "" if it is gone."""
    if Path("/proc/self/stat").exists():
        with contextlib.suppress(OSError, IndexError):
            state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            return "" if state in "ZX" else fields[18]
        return ""
    try:
        os.kill(process, 0)
    except PermissionError:
        return "running"
    except (OSError, OverflowError):
        return ""
    return "running"


def _parse(found: Sign) -> Holder:
    """Parse a lock file; returns an unknown process if the file is damaged."""
    holder = Holder()
    with contextlib.suppress(ValueError, RecursionError, UserError):
        holder = from_dict(json.loads(found[1]), Holder)
    return holder if 0 < holder.every <= BEAT_SECONDS else dataclasses.replace(holder, every=BEAT_SECONDS)
