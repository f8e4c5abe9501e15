"""One way to say that the user, not the program, has something to mend."""

import difflib
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """Something the user can mend; its text is one line that says what is wrong and what would be right."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest known word, or ``""`` when none is close.

    >>> nearest("optimizer.learning_rat", ["optimizer.learning_rate", "train.steps"])
    "; did you mean 'optimizer.learning_rate'?"
    """
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def run_command(main: Callable[[], None]) -> None:
    """Run a command's ``main``; a `UserError` becomes one line on stderr and exit status 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped by the keyboard; the last complete checkpoint, if any, is intact", file=sys.stderr)
        sys.exit(130)
