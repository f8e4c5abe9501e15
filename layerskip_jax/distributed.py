"""Runs of several processes, one per host: start, agreement, stopping at the same step, and failure of one process."""

import contextlib
import hashlib
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

EXIT_DELAY_SECONDS = 3
"""How long process 0 waits to exit after an error: it hosts the coordinator, and jax ends the others when it exits."""

GATHERED_BYTES = 8192
"""Size of the text that each process sends when they compare results [bytes]: an all-gather needs equal shapes."""


@contextlib.contextmanager
def distributed_session(config: DistributedConfig) -> Iterator[None]:
    """Run the body as one process of the run, or alone if neither a cluster nor the settings name other processes.

    Enter it before anything touches a device. Raises `UserError` if the other processes do not connect in time. After
    an error in the body this process exits at once, without jax's shutdown barrier: the other processes may be waiting
    in a collective, and detect the exit after at most ``distributed.heartbeat``.
    """
    if config.num_processes != 1:
        _join(config)
    try:
        yield
    except Interrupted:
        raise  # all processes raise it, so jax's shutdown barrier completes
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        try:
            status = report(_translate(error))
        except BaseException:
            traceback.print_exc()
            status = 1
        if jax.process_index() == 0:
            time.sleep(EXIT_DELAY_SECONDS)
        with contextlib.suppress(OSError, ValueError):  # stdout may be a closed pipe
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _translate(error: BaseException) -> BaseException:
    """Return `LostProcess` for an error with which jax reports that another process stopped responding."""
    lost = re.search(r"Gloo|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|heartbeat", str(error))
    if not isinstance(error, jax.errors.JaxRuntimeError) or not lost:
        return error
    return LostProcess(
        f"process {jax.process_index()} of {jax.process_count()} exits because another process stopped responding "
        f"({str(error).splitlines()[0][:300]}): restart all processes to resume from the newest checkpoint"
    )


def _join(config: DistributedConfig) -> None:
    address = config.coordinator_address
    # On its own timeout jax aborts the process with a long C++ trace, so time out first, with one line.
    timer = threading.Timer(config.timeout, _exit_on_timeout, [config])
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
            return  # jax detects no cluster
        raise UserError(f"the cluster does not name the processes of the run ({error}): set distributed.*") from error
    except RuntimeError as error:
        raise UserError(f"the processes could not connect to {address or 'the coordinator'}: {error}") from error
    finally:
        timer.cancel()


def _exit_on_timeout(config: DistributedConfig) -> None:
    address, process = config.coordinator_address, config.process_id
    waited = f"waited {config.timeout} s (distributed.timeout)"
    if not address:
        line = f"{waited} for all processes that the cluster names; --distributed.num_processes 1 trains alone"
    elif process == 0:
        line = f"{waited} at {address}: fewer than {config.num_processes} processes connected"
    else:
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            line = f"{waited} at {address}: process 0 is up, but fewer than {config.num_processes} processes connected"
        except OSError as error:
            line = f"{waited} for process 0 of {config.num_processes} at {address}: {error.strerror or error}"
    os._exit(report(UserError(line)))


def agree(what: str, make: Callable[[], T], same: Callable[[T], object] = lambda result: None) -> T:
    """Call ``make`` on every process and return its result; a `UserError` on one process is raised on all.

    Raises `UserError` that names ``what`` unless all processes have equal values of ``same(result)``. This is a
    collective: all processes must call it.
    """
    if jax.process_count() == 1:
        return make()
    result: Any = None
    problem: UserError | None = None
    try:
        result = make()
    except UserError as error:
        problem = error
    lines = _gather(f"!{problem}" if problem else f"={same(result)}")
    if problem:
        raise problem
    for process, line in enumerate(lines):
        if line.startswith("!"):
            raise UserError(f"process {process} failed: {line[1:]}")
        if line != lines[0]:
            differs = next(i for i, pair in enumerate(zip(line + "\0", lines[0] + "\0")) if pair[0] != pair[1])
            here, there = (text[max(differs - 30, 1) :][:60] for text in (line, lines[0]))
            raise UserError(
                f"the {what} must be the same on all processes, but process {process} has {here!r} where process 0 has "
                f"{there!r}: start them with the same settings, on the same files"
            )
    return result


def first_message(text: str) -> str:
    """Return, on every process, the first ``text`` that is not empty, in the order of the processes."""
    return next(filter(None, _gather(text)), "") if jax.process_count() > 1 else text


def _gather(text: str) -> list[str]:
    """Return every process's ``text``. One of more than `GATHERED_BYTES` is cut, and ends with its digest."""
    content = text.encode()
    if len(content) > GATHERED_BYTES:
        digest = hashlib.sha256(content).hexdigest().encode()
        content = content[: GATHERED_BYTES - len(digest)] + digest
    data = np.frombuffer(content.ljust(GATHERED_BYTES, b"\0"), np.uint8)
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in multihost_utils.process_allgather(data)]


def local_rows(sharding: NamedSharding, batch_size: int) -> list[int]:
    """Return the rows of a batch on this process's devices; `UserError` if another process holds some of them too."""
    by_rows = NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0]))
    indices: dict[Any, Any] = dict(by_rows.devices_indices_map((batch_size,)))
    local = {
        row
        for device, (rows,) in indices.items()
        if device.process_index == jax.process_index()
        for row in range(*rows.indices(batch_size))
    }
    if len(local) * jax.process_count() != batch_size:
        raise UserError(
            f"this mesh gives several of the {jax.process_count()} processes the same sequences of a batch: "
            f"mesh.sequence * mesh.tensor must stay within the {jax.local_device_count()} devices of a process"
        )
    return sorted(local)


class StopRequest:
    """Handle SIGTERM and SIGINT, sent to any process, as a request to save and stop all processes after the same step.

    A second signal ends the process that receives it at once. The context manager restores the former handlers. Outside
    the main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self, mesh: Mesh):
        self._received = 0
        self._vote: jax.Array | None = None
        self._former: dict[int, Any] = {}
        self._sharded = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._highest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._former[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: jax set it, outside Python
        outer = getattr(self._former.get(self._received), "__self__", None)
        if isinstance(outer, StopRequest):  # a search: this run may have ended before it could stop for the signal
            outer._received = self._received

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        for second in self._former:
            signal.signal(second, signal.SIG_DFL)
        name = signal.Signals(number).name
        os.write(2, f"{name}: saving and stopping after this step; a second signal ends the run at once\n".encode())

    def agreed(self) -> int:
        """Return the signal that stops the run after this step, or 0. Call it once after every step.

        With several processes it is the largest signal that any had received one step earlier. That reduction was
        queued behind the previous step, whose metrics are already on the host, so it blocks nothing.
        """
        if jax.process_count() == 1:
            return self._received
        previous, here = self._vote, np.full(jax.local_device_count(), self._received, np.int32)
        self._vote = self._highest(jax.make_array_from_process_local_data(self._sharded, here))
        return 0 if previous is None else int(previous)
