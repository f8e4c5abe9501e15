"""One way to say that the user, not the program, has something to mend."""

import difflib
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """Something the user can mend; its text is one line that says what is wrong and what would be right."""


class LostProcess(Exception):  # noqa: N818  (nothing is wrong with this one)
    """Another process of the run has ended or is silent; started again, all go on from the newest checkpoint."""

    status = 75
    """The exit status: EX_TEMPFAIL of sysexits.h, which asks for another try."""


class Interrupted(Exception):  # noqa: N818  (nothing is wrong)
    """A signal has ended a run between two steps, with everything saved."""

    def __init__(self, signal: int, message: str):
        super().__init__(message)
        self.status = 128 + signal
        """The exit status, as a shell would report the signal: 130 for SIGINT, 143 for SIGTERM."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest known word, or ``""`` when none is close.

    >>> nearest("optimizer.learning_rat", ["optimizer.learning_rate", "train.steps"])
    "; did you mean 'optimizer.learning_rate'?"
    """
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def bucket_error(error: BaseException | None) -> BaseException | None:
    """Return the error or the cause of it that a library for buckets has raised, or None.

    Such an error is about the network, credentials or permissions, so a traceback through our code does not help. The
    classes are compared by module name because the libraries are optional.
    """
    while error is not None and type(error).__module__.split(".")[0] not in ("gcsfs", "aiohttp", "google"):
        error = error.__cause__
    return error


def report(error: BaseException) -> int:
    """Print in one line on stderr why a command ended; return its exit status. Raises an error that is a bug again."""
    if isinstance(error, UserError):
        line, status = f"error: {' '.join(str(error).split())}", 2
    elif isinstance(error, Interrupted | LostProcess):
        line, status = str(error), error.status
    elif (unreachable := bucket_error(error)) is not None:
        line, status = f"error: the bucket does not answer: {' '.join(str(unreachable).split())}", 2
    elif isinstance(error, KeyboardInterrupt):
        line, status = "stopped by the keyboard; the last complete checkpoint, if any, is intact", 130
    else:
        raise error
    print(line, file=sys.stderr, flush=True)
    return status


def run_command(main: Callable[[], None]) -> None:
    """Run a command's ``main``; a `UserError` becomes one line on stderr and exit status 2."""
    try:
        main()
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(report(error))
