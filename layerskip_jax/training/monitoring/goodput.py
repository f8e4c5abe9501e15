"""Goodput: which part of a run's time, from its very beginning and across its resumes, went into steps that count."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

Phase = Literal["training", "starting", "data", "evaluating", "saving", "sampling"]
PHASES: tuple[Phase, ...] = ("training", "starting", "data", "evaluating", "saving", "sampling")


class Goodput:
    """The ledger of one run: every second of the training thread is booked to one phase.

    *training* is time in steps that were kept: what a resume does again is struck off. *starting* is all up to the end
    of the first step after a start: reading the checkpoint, compiling. *data* is waiting for a batch. Whatever is in
    no phase is *lost*: the time between two starts, and steps that were done again.
    """

    def __init__(
        self,
        earlier: Sequence[Mapping[str, Any]],
        first: int,
        now: Callable[[], float] = time.time,
        since: float | None = None,
    ):
        """Go on from the records that the run has written so far, at the step ``first`` that it resumes after.

        What has passed ``since`` a time of that clock is booked too.
        """
        ledgers = [record for record in earlier if "run/goodput" in record]
        self._now, self._since = now, now() if since is None else since
        self._began = float(ledgers[0]["run/began"]) if ledgers else self._since
        self._seconds = {phase: float(ledgers[-1][_name(phase)]) if ledgers else 0.0 for phase in PHASES}
        kept = [record[_name("training")] for record in ledgers if record["step"] <= first]
        self._seconds["training"] = float(kept[-1]) if kept else 0.0
        self._phase: Phase = "starting"

    def _book(self) -> None:
        since, self._since = self._since, self._now()
        self._seconds[self._phase] += self._since - since

    def first_step_is_done(self) -> None:
        self._book()
        self._phase = "training"

    @contextlib.contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        self._book()
        outer, self._phase = self._phase, phase
        try:
            yield
        finally:
            self._book()
            self._phase = outer

    def values(self) -> dict[str, float]:
        """Return ``run/goodput``, a fraction, and the seconds that it follows from, for a `MetricsWriter`."""
        self._book()
        total = max(self._since - self._began, 1e-9)
        lost = max(total - sum(self._seconds.values()), 0.0)
        return {
            "run/goodput": self._seconds["training"] / total,
            **{_name(phase): seconds for phase, seconds in self._seconds.items()},
            "run/seconds/lost": lost,
            "run/began": self._began,
        }


def _name(phase: Phase) -> str:
    return f"run/seconds/{phase}"
