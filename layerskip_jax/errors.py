"""Errors the user can fix, reported in one line."""

import contextlib
import difflib
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterable

DISK_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
}
"""The errno values of file-system errors that are no bug of the program."""


class UserError(Exception):
    """An error the user can fix; its text is one line that names the wrong value and the remedy."""


class LostProcess(Exception):  # noqa: N818  (this process has no error)
    """Another process of the run has ended or stopped responding; restart the run to resume from its checkpoint."""

    status = 75
    """The exit status: EX_TEMPFAIL of sysexits.h, which asks for a retry."""


class Interrupted(Exception):  # noqa: N818  (not an error)
    """A signal stopped a run between two steps, after it saved a checkpoint."""

    def __init__(self, number: int, message: str):
        super().__init__(f"{signal.Signals(number).name}: {message}")
        self.status = 128 + number
        """The exit status that a shell reports for the signal: 130 for SIGINT, 143 for SIGTERM."""


def warn(line: str) -> None:
    """Print a warning on stderr, in one line."""
    print(f"WARNING: {' '.join(line.split())}", file=sys.stderr, flush=True)


def note(line: str) -> None:
    """Print a note on stderr, in one line: something unusual, but not wrong."""
    print(f"note: {' '.join(line.split())}", file=sys.stderr, flush=True)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest known word, or ``""`` when none is close.

    >>> nearest("optimizer.learning_rat", ["optimizer.learning_rate", "train.steps"])
    "; did you mean 'optimizer.learning_rate'?"
    """
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def bucket_error(error: BaseException | None) -> BaseException | None:
    """Return the first of ``error`` and its causes that a cloud-storage library raised, or None.

    Such an error concerns the network, credentials or permissions, so a traceback of our code does not help, and files
    in the bucket may be intact. Classes are compared by module name because these libraries are optional. TensorStore
    raises `ValueError` with the status of the request, and gcsfs `OSError` for a missing permission.
    """
    signs = ("[http_response_code=", "[curl_code=", "Forbidden: ")
    while error is not None:
        module = type(error).__module__
        library = module.split(".")[0] in ("gcsfs", "aiohttp", "google", "requests") and "protobuf" not in module
        if library or (type(error) in (OSError, ValueError) and any(sign in str(error) for sign in signs)):
            break
        error = error.__cause__
    return error


def disk_error(error: BaseException) -> str:
    """Return what the file system said if ``error`` is one of `DISK_ERRORS`, or a library's error that quotes one."""
    quoted = type(error) is RuntimeError or type(error).__name__ == "SafetensorError"
    known = isinstance(error, OSError) and error.errno in DISK_ERRORS
    return str(error) if known or (quoted and any(os.strerror(n) in str(error) for n in DISK_ERRORS)) else ""


def report(error: BaseException) -> int:
    """Print one line on stderr that says why a command ended; return its exit status.

    Raises ``error`` again if it is a bug, for its traceback.
    """
    if isinstance(error, UserError):
        text = " ".join(str(error).split())  # it may quote a file that is all one word
        line, status = f"error: {text if len(text) <= 1000 else f'{text[:700]} ... {text[-200:]}'}", 2
    elif isinstance(error, Interrupted | LostProcess):
        line, status = str(error), error.status
    elif (unreachable := bucket_error(error)) is not None:
        line, status = f"error: the bucket cannot be used: {' '.join(str(unreachable).split())}", 2
    elif isinstance(error, BrokenPipeError):  # the reader of a pipe, such as head, has seen enough
        return 141
    elif refused := disk_error(error):
        line, status = f"error: {' '.join(refused.split())}", 2
    elif type(error).__module__ == "google.protobuf.json_format":  # TensorFlow Datasets stores such JSON
        line, status = f"error: the JSON of a prepared dataset is damaged: {' '.join(str(error).split())}", 2
    elif isinstance(error, KeyboardInterrupt):
        line, status = "interrupted", 130
    else:
        raise error
    print(line, file=sys.stderr, flush=True)
    return status


def run_command(main: Callable[[], None]) -> None:
    """Run ``main`` of a command and exit with the status of `report` if it fails."""
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        status = report(error)
        if isinstance(error, OSError):  # the interpreter would flush stdout again, and print a second error
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(status)
