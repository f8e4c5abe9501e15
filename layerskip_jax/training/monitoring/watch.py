"""Inspect a running run: a profiler trace on request, and the stacks of all threads when it hangs."""

import faulthandler
import signal
import sys
import threading
from types import FrameType
from typing import Any

import jax

from layerskip_jax.config import TrainConfig
from layerskip_jax.locations import is_remote, locate


class Profiler:
    """Traces ``profile_steps`` steps from ``profile_step`` on, and again whenever this process gets SIGUSR1.

    Every process traces its own devices into ``RUN_DIR/profile``, for TensorBoard or XProf. The profiler can only
    write to a local disk, so a run in a bucket writes to ``./profile``.
    """

    def __init__(self, config: TrainConfig):
        self._first, self._steps = config.profile_step, config.profile_steps
        run = locate(config.run_dir)
        self._folder = "profile" if is_remote(run) else str(run / "profile")
        self._requested, self._until, self._former = False, 0, signal.SIG_DFL

    def __enter__(self) -> "Profiler":
        if threading.current_thread() is threading.main_thread():
            self._former = signal.signal(signal.SIGUSR1, self._request)  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGUSR1, self._former or signal.SIG_DFL)  # None: not a handler of Python
        if self._until:
            jax.profiler.stop_trace()
            print(f"profile of the last steps: {self._folder}", flush=True)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True

    def before_step(self, step: int, state: Any) -> None:
        """Start or stop a trace before optimizer step number ``step``, counted from 1, runs on ``state``."""
        if self._until and step == self._until:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            print(f"profile of steps {step - self._steps}..{step - 1}: {self._folder}", flush=True)
            self._until = 0
        if not self._until and (self._requested or step == self._first):
            jax.block_until_ready(state)  # keep earlier steps out of the trace
            jax.profiler.start_trace(self._folder)
            self._requested, self._until = False, step + self._steps


class Watchdog:
    """Prints the Python stacks of all threads once if `tick` is not called for ``seconds``; 0 turns it off.

    It runs in a thread, so it prints while the training thread waits for data, a device or another process.
    `faulthandler.dump_traceback_later` cannot print the line that names the setting.
    """

    def __init__(self, seconds: int):
        self._seconds, self._ticked, self._ended = seconds, threading.Event(), False
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._ticked.set()

    def tick(self) -> None:
        """Restart the timeout."""
        self._ticked.set()

    def _watch(self) -> None:
        printed = False
        while not self._ended:
            if self._ticked.wait(None if printed else self._seconds):
                self._ticked.clear()
                printed = False
            else:
                printed = True  # and wait for the next tick without a timeout
                line = f"no step has finished for {self._seconds} s (train.hang_seconds); the stacks of all threads:"
                print(line, file=sys.stderr, flush=True)
                faulthandler.dump_traceback(2)
