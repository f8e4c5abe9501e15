"""Several processes, one a host, as one run: how they meet, agree, stop together, and part when one of them fails."""

import contextlib
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from layerskip_jax.config import DistributedConfig
from layerskip_jax.errors import Interrupted, LostProcess, UserError, report

T = TypeVar("T")

LAST_WORDS_SECONDS = 3
"""Process 0 carries the rendezvous: when it goes, jax ends the others, so after an error it leaves last."""


@contextlib.contextmanager
def joined(config: DistributedConfig) -> Iterator[None]:
    """Run the body as one process of the run, or alone where there is neither a cluster nor settings that say so.

    Must come before anything that touches a device. Raises `UserError` if the others have not come in time. After an
    error in the body this process ends at once, without the usual farewell, which would wait for the others: they may
    be waiting for it in turn, and now find it gone, after ``distributed.heartbeat`` at most.
    """
    if config.num_processes != 1:
        _join(config)
    try:
        yield
    except Interrupted:
        raise  # all processes alike
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        try:
            status = report(_as_lost(error))
        except BaseException:
            traceback.print_exc()
            status = 1
        if jax.process_index() == 0:
            time.sleep(LAST_WORDS_SECONDS)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _as_lost(error: BaseException) -> BaseException:
    """Return the error as what it means, where jax says that another process does not answer any more."""
    gone = re.search(r"Gloo|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|heartbeat", str(error))
    if not isinstance(error, jax.errors.JaxRuntimeError) or not gone:
        return error
    return LostProcess(
        f"process {jax.process_index()} of {jax.process_count()} ends, since another one does not answer any more "
        f"({str(error).splitlines()[0][:300]}): start all of them again, and they go on from the newest checkpoint"
    )


def _join(config: DistributedConfig) -> None:
    address = config.coordinator_address
    # When its own time is up, jax aborts the process over a page of C++; so this comes first, in one line.
    timer = threading.Timer(config.timeout, _give_up, [config])
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            address or None,
            config.num_processes or None,
            config.process_id if config.process_id >= 0 else None,
            initialization_timeout=config.timeout + 60,
            heartbeat_timeout_seconds=config.heartbeat,
        )
    except ValueError as error:
        if not address and "coordinator_address" in str(error):
            return  # jax knows no cluster here
        raise UserError(f"the cluster does not say who takes part ({error}): set distributed.*") from error
    except RuntimeError as error:
        raise UserError(f"the processes could not meet at {address or 'the coordinator'}: {error}") from error
    finally:
        timer.cancel()


def _give_up(config: DistributedConfig) -> None:
    address, me = config.coordinator_address, config.process_id
    waited = f"waited {config.timeout} s (distributed.timeout)"
    if not address:
        line = f"{waited} for all processes that the cluster names; --distributed.num_processes 1 trains alone"
    elif me == 0:
        line = f"{waited} at {address}: fewer than {config.num_processes} processes have come"
    else:
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            line = f"{waited} at {address}: process 0 is there, but fewer than {config.num_processes} processes"
        except OSError as error:
            line = f"{waited} for process 0 of {config.num_processes} at {address}: {error.strerror or error}"
    os._exit(report(UserError(line)))


def together(what: str, make: Callable[[], T], same: Callable[[T], object] = lambda made: None) -> T:
    """Call ``make`` on every process: a `UserError` of one becomes an error of all, so that none waits for it.

    What ``same`` says of the results must be equal everywhere, or else all raise a `UserError` about ``what``.
    """
    if jax.process_count() == 1:
        return make()
    made: Any = None
    problem: UserError | None = None
    try:
        made = make()
    except UserError as error:
        problem = error
    lines = _gather(f"!{problem}" if problem else f"={same(made)}")
    if problem:
        raise problem
    for process, line in enumerate(lines):
        if line.startswith("!"):
            raise UserError(f"process {process} has failed: {line[1:]}")
        if line != lines[0]:
            differs = next(i for i, pair in enumerate(zip(line + "\0", lines[0] + "\0")) if pair[0] != pair[1])
            here, there = (text[max(differs - 30, 1) :][:60] for text in (line, lines[0]))
            raise UserError(
                f"the {what} must be the same on all processes, but process {process} has {here!r} where process 0 has "
                f"{there!r}: start them with the same settings, on the same files"
            )
    return made


def first_said(text: str) -> str:
    """Return the first ``text`` that is not empty, of any process, to all of them."""
    return next(filter(None, _gather(text)), "") if jax.process_count() > 1 else text


def _gather(text: str, size: int = 8192) -> list[str]:
    """Return every process's ``text``, cut to ``size`` bytes."""
    data = np.frombuffer(text.encode()[:size].ljust(size, b"\0"), np.uint8)
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in multihost_utils.process_allgather(data)]


def own_rows(sharding: NamedSharding, batch_size: int) -> list[int]:
    """Return which rows of a batch this process's devices hold, which no other process's do; `UserError` if some do."""
    places: dict[Any, Any] = dict(sharding.devices_indices_map((batch_size, 1)))
    held = {
        row
        for device, (rows, _) in places.items()
        if device.process_index == jax.process_index()
        for row in range(*rows.indices(batch_size))
    }
    if len(held) * jax.process_count() != batch_size:
        raise UserError(
            f"this mesh gives several of the {jax.process_count()} processes the same sequences of a batch: "
            f"mesh.sequence * mesh.tensor must stay within the {jax.local_device_count()} devices of a process"
        )
    return sorted(held)


class StopRequest:
    """SIGTERM and SIGINT, to any process, as a request to save and end after a step: the same step on all processes.

    A second signal ends its process at once. As a context manager it puts the former handlers back; outside the main
    thread, where Python allows no handlers, it asks for nothing.
    """

    def __init__(self, mesh: Mesh):
        self._received = 0
        self._vote: jax.Array | None = None
        self._former: dict[int, Any] = {}
        self._split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._highest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._former[number] = signal.signal(number, self._notice)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: a handler that Python did not set, as jax does

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        for again in self._former:
            signal.signal(again, signal.SIG_DFL)
        name = signal.Signals(number).name
        os.write(2, f"{name}: the run saves and ends after this step; a second signal ends it at once\n".encode())

    def agreed(self) -> int:
        """Return the signal that ends the run after this step, or 0; to be asked once after every step.

        Several processes take the largest of what each had received one step before: that reduction runs behind the
        step before, whose metrics are on the host by now, so nothing waits for it.
        """
        if jax.process_count() == 1:
            return self._received
        answer, here = self._vote, np.full(jax.local_device_count(), self._received, np.int32)
        self._vote = self._highest(jax.make_array_from_process_local_data(self._split, here))
        return 0 if answer is None else int(answer)
