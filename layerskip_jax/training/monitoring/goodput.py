"""Goodput: the share of a run's wall-clock time, over all its restarts, that went into steps that were kept."""

import contextlib
import time
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

Phase = Literal["training", "starting", "data", "evaluating", "saving", "sampling"]
PHASES: tuple[Phase, ...] = typing.get_args(Phase)


_START = time.time() - time.monotonic()


def steady_time() -> float:
    """Return the time of day [seconds] from a monotonic clock, which changes of the system clock do not affect."""
    return _START + time.monotonic()


class Goodput:
    """Assigns every second of the training thread to one phase.

    *training* is the time of steps that were kept, without those that a resume repeats. *starting* lasts from a start
    to the end of its first step: reading the checkpoint, compiling. *data* is waiting for a batch. *evaluating*,
    *saving* and *sampling* have their usual meaning. The rest is *lost*: between two starts, and in steps that a resume
    repeats.
    """

    def __init__(
        self,
        earlier: Sequence[Mapping[str, Any]],
        first: int,
        now: Callable[[], float] = steady_time,
        since: float | None = None,
    ):
        """Continue from the ``earlier`` records of the run, which resumes after step ``first``.

        ``now`` is the clock, and ``since`` its time at the start, if that was before this call.
        """
        ledgers = [record for record in earlier if "run/goodput" in record]
        self._now, self._since = now, now() if since is None else since
        self._began = float(ledgers[0]["run/began"]) if ledgers else self._since
        self._seconds = {phase: float(ledgers[-1][_name(phase)]) if ledgers else 0.0 for phase in PHASES}
        before = [record[_name("training")] for record in ledgers if record["step"] <= first]
        self._seconds["training"] = float(before[-1]) if before else 0.0
        self._phase: Phase = "starting"

    def _assign(self) -> None:
        since, self._since = self._since, self._now()
        self._seconds[self._phase] += self._since - since

    def end_start(self) -> None:
        """Assign the time from here on to training; call it after the first step."""
        self._assign()
        self._phase = "training"

    @contextlib.contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Assign the time of the body to ``phase``."""
        self._assign()
        outer, self._phase = self._phase, phase
        try:
            yield
        finally:
            self._assign()
            self._phase = outer

    def values(self) -> dict[str, float]:
        """Return ``run/goodput``, a fraction, and the seconds of each phase, for a `MetricsWriter`."""
        self._assign()
        spent = sum(self._seconds.values())
        total = max(self._since - self._began, spent, 1e-9)  # the clock may have been set back between two starts
        lost = total - spent
        return {
            "run/goodput": self._seconds["training"] / total,
            **{_name(phase): seconds for phase, seconds in self._seconds.items()},
            "run/seconds/lost": lost,
            "run/began": self._began,
        }


def _name(phase: Phase) -> str:
    return f"run/seconds/{phase}"
