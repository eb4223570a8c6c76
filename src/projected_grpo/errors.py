"""The two errors that end a run with one line, and what exit codes mean (2 is such an error)."""

import sys
from collections.abc import Callable


class RankLost(Exception):
    """The processes of one run cannot go on together: one of them is gone, or they no longer agree."""


class UserError(Exception):
    """Bad usage or input. The message is one line that says what to change; the CLI exits with code 2."""


class OneKind(UserError):
    """There is nothing to tell apart: among completions that were scored all are exploits, or none is."""


# What the CLI answers with one line and exit code 2: also paths that the user may not read or write.
MISTAKES = (UserError, PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)

GATE_FAILED = 1  # exit code of a verb whose check did not hold
DIVERGED = 3  # of a run that the tripwire or gradients that are not finite ended
UNSAVED = 4  # of a run whose last save or results the storage did not take
LOST = 5  # of a process whose run lost another of its processes; what was saved last stays
SIGNALLED = 128  # plus the signal's number: stopped after a step and saved (SIGINT 130, SIGTERM 143)


def answer(work: Callable[[], int]) -> int:
    """The exit code of a command; a user's mistake, or the loss of a process, is one line on stderr."""
    try:
        return work()
    except MISTAKES as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RankLost as error:
        print(f"error: {error}", file=sys.stderr)
        return LOST
