"""How a command ends: the errors that end it with one line, Ctrl-C, and what exit codes mean."""

import errno
import gc
import importlib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType


class RankLost(Exception):
    """The processes of one run cannot go on together: one of them is gone, or they no longer agree."""


class UserError(Exception):
    """Bad usage or input. The message is one line that says what to change; the CLI exits with code 2."""


class OneKind(UserError):
    """There is nothing to tell apart: among completions that were scored all are exploits, or none is."""


GATE_FAILED = 1  # exit code of a verb whose check did not hold
BAD_USAGE = 2  # bad usage or input, also a path that cannot be read or written
DIVERGED = 3  # of a run that the tripwire or gradients that are not finite ended
UNSAVED = 4  # the storage did not take a run's last save, or results: it is full, or fails
LOST = 5  # of a process whose run lost another of its processes; what was saved last stays
SIGNALLED = 128  # plus the signal's number: stopped (SIGINT 130, SIGTERM 143), a run after a step and saved

STORAGE_FAILS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
PATH_FAILS = (  # what a path's owner can mend; other errors of the system are not the user's
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EBUSY, errno.ENOTEMPTY, errno.EXDEV, errno.ENXIO, errno.EINVAL),
)
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # torch reads both; the second in any release
RUST_ERROR = re.compile(r"(?:os error |Os \{ code: )(\d+)")  # how safetensors and tokenizers say it


def answer(work: Callable[[], int]) -> int:
    """The exit code of a command; a user's mistake, storage that fails and Ctrl-C are one line on stderr."""
    try:
        code = work()
        sys.stdout.flush()
        return code
    except (UserError, RankLost) as error:
        print(f"error: {error}", file=sys.stderr)
        return LOST if isinstance(error, RankLost) else BAD_USAGE
    except KeyboardInterrupt as stopped:
        print(f"stopped; {stopped}" if stopped.args else "stopped", file=sys.stderr)
        return SIGNALLED + signal.SIGINT
    except BrokenPipeError:  # who read the output has gone
        close_stdout()
        return SIGNALLED + signal.SIGPIPE
    except Exception as error:
        refused = refusal(error)
        if refused is None or refused.errno not in (*STORAGE_FAILS, *PATH_FAILS):
            raise
        close_stdout()
        print(f"error: {said(refused)}", file=sys.stderr)
        return UNSAVED if refused.errno in STORAGE_FAILS else BAD_USAGE


def close_stdout() -> None:
    """Drop what standard output does not take: Python would try again at its end, in many lines."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def refusal(error: Exception) -> OSError | None:
    """What the system refused, if that is what an exception is about."""
    if isinstance(error, OSError):
        return error if error.errno is not None else None
    found = RUST_ERROR.search(str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None


def said(error: OSError) -> str:
    """A refusal of the system as `file: what it says`."""
    return f"{error.filename}: {error.strerror}" if error.filename is not None else str(error.strerror)


@contextmanager
def writing(path: os.PathLike[str]) -> Iterator[None]:
    """Let what the system refuses in this block name the file that is meant, not a temporary one or none."""
    try:
        yield
    except Exception as error:
        refused = refusal(error)
        if refused is None:
            raise
        raise OSError(refused.errno, refused.strerror, os.fspath(path)) from error


@contextmanager
def goes_on(how: str = "the same command goes on") -> Iterator[None]:
    """Tell whoever presses Ctrl-C in this block that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(how) from None


def as_process(argv: Sequence[str] | None = None) -> int:
    """`projected-grpo ...` as a process of its own. Ctrl-C has its answer also while the rest is imported."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it is ignored in the background
        signal.signal(signal.SIGINT, end_now)
    if not any(name in os.environ for name in ALLOCATOR):  # torch reads it when it is imported
        # Batches of many lengths leave holes in a GPU's memory; segments that grow do not.
        os.environ[ALLOCATOR[1]] = "expandable_segments:True"
    cli = "projected_grpo.cli"
    return answer(lambda: importlib.import_module(cli).dispatch(argv or sys.argv[1:], all_imported))


def all_imported() -> None:
    """From here on Ctrl-C unwinds the work."""
    if signal.getsignal(signal.SIGINT) is end_now:
        signal.signal(signal.SIGINT, interrupt)
    gc.freeze()  # collections, and the end of the process, need not walk what was imported


def end_now(number: int, frame: FrameType | None) -> None:
    """Ctrl-C during the imports: an exception could be caught there, or end in torch's C++ code."""
    os.write(2, b"stopped\n")
    os._exit(SIGNALLED + number)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C: end what is being done; the next one ends the process as it is, in silence."""
    signal.signal(number, signal.SIG_DFL)
    raise KeyboardInterrupt
