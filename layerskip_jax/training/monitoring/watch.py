"""Looking into a run while it goes on: a profiler trace when asked, and every thread's stack when it hangs."""

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
    """Traces ``profile_steps`` steps from ``profile_step`` on, and as many whenever this process gets SIGUSR1.

    Every process traces its own devices, into ``RUN_DIR/profile`` (for TensorBoard or XProf). The profiler writes to
    local disks only, so a run in a bucket has its traces in ``./profile``.
    """

    def __init__(self, config: TrainConfig):
        self._first, self._steps = config.profile_step, config.profile_steps
        run = locate(config.run_dir)
        self._folder = "profile" if is_remote(run) else str(run / "profile")
        self._asked, self._until, self._former = False, 0, signal.SIG_DFL

    def __enter__(self) -> "Profiler":
        if threading.current_thread() is threading.main_thread():
            self._former = signal.signal(signal.SIGUSR1, self._ask)  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGUSR1, self._former)
        if self._until:
            jax.profiler.stop_trace()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def before_step(self, step: int, state: Any) -> None:
        """Start or end a trace before optimizer step number ``step``, counted from 1, is begun on ``state``."""
        if self._until and step == self._until:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            print(f"profile of steps {step - self._steps}..{step - 1}: {self._folder}", flush=True)
            self._until = 0
        if not self._until and (self._asked or step == self._first):
            jax.block_until_ready(state)  # so that the trace holds these steps only
            jax.profiler.start_trace(self._folder)
            self._asked, self._until = False, step + self._steps


class Watchdog:
    """Prints every Python stack, once, when nothing has been heard for ``seconds``; 0 turns it off.

    A thread of its own, so it speaks while the training thread waits for data, for a device or for another process.
    """

    def __init__(self, seconds: int):
        self._seconds, self._heard, self._ended = seconds, threading.Event(), False
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._heard.set()

    def hear(self) -> None:
        """Note that the run goes on."""
        self._heard.set()

    def _watch(self) -> None:
        said = False
        while not self._ended:
            if self._heard.wait(None if said else self._seconds):
                self._heard.clear()
                said = False
            else:
                said = True  # once: silent from here on until the run goes on
                line = (
                    f"no step has finished for {self._seconds} s (train.hang_seconds): the run may hang in what follows"
                )
                print(line, file=sys.stderr, flush=True)
                faulthandler.dump_traceback(2)
