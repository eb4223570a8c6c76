"""How a command ends where the system says no, or its user: one line, and an exit code."""

import errno
import os
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

from projected_grpo.errors import ALLOCATOR, answer, as_process, end_now, goes_on, interrupt, writing
from projected_grpo.results import plots
from projected_grpo.runlog import JsonlLog, append_jsonl, text_log, write_atomically, write_json

FULL = Path("/dev/full")
CODES = {
    **dict.fromkeys([errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO], 4),
    **dict.fromkeys([errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EACCES], 2),
    **dict.fromkeys([errno.ENOENT, errno.ELOOP, errno.EPERM, errno.EEXIST], 2),
}


def ended(work, capsys):
    """Exit code and the one line of a command."""
    code = answer(work)
    (line,) = capsys.readouterr().err.splitlines()
    return code, line


def raiser(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize("number", CODES, ids=errno.errorcode.get)
def test_what_the_system_refuses_is_one_line(capsys, number):
    error = OSError(number, os.strerror(number), "some/file")
    assert ended(raiser(error), capsys) == (CODES[number], f"error: some/file: {os.strerror(number)}")


def test_what_a_library_in_rust_was_refused(capsys):
    """As safetensors and tokenizers say it."""
    full = Exception(
        'Error while serializing: I/O error: Io(Os { code: 28, kind: StorageFull, message: "x" })'
    )

    def save():
        with writing(Path("some/folder")):
            raise full

    assert ended(save, capsys) == (4, "error: some/folder: No space left on device")
    assert ended(raiser(Exception("No space left on device (os error 28)")), capsys)[0] == 4


@pytest.mark.parametrize("error", [OSError("no number"), RuntimeError("a bug"), ValueError("error 28")])
def test_a_defect_is_no_refusal(error):
    with pytest.raises(type(error)):
        answer(raiser(error))


WRITERS = {
    "json": lambda path: write_json(path, {}),
    "bytes": lambda path: write_atomically(path, b"x" * 10),
    "rows": lambda path: append_jsonl(path, [{"a": 1}]),
    "picture": lambda path: plots._save(plots._figure(1.0, 1.0), path / "p"),
}


@pytest.mark.parametrize("how", WRITERS)
def test_every_writer_names_the_file(tmp_path, capsys, how):
    file = tmp_path / "file"
    file.write_text("x")
    code, line = ended(lambda: WRITERS[how](file / "y"), capsys)
    assert code == 2 and line.startswith(f"error: {file / 'y'}")


def test_a_full_device_is_not_replaced(capsys):
    before = os.stat("/dev/full")
    code, line = ended(lambda: WRITERS["bytes"](FULL), capsys)
    assert (code, line) == (4, "error: /dev/full: No space left on device")
    code, line = ended(lambda: JsonlLog(FULL).append([{"a": 1}]), capsys)
    assert line.startswith("error: /dev/full: ")
    assert os.path.samestat(os.stat("/dev/full"), before)


def test_a_long_name_has_a_temporary_one_that_is_no_longer(tmp_path):
    write_atomically(tmp_path / ("n" * 255), b"x")
    assert [len(path.name) for path in tmp_path.iterdir()] == [255]


def test_a_text_log_that_is_not_taken_is_told_once(capsys):
    add = text_log(FULL)
    add("one\n")
    add("two\n")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("/dev/full: No space left on device")


def test_standard_output_that_is_full(tmp_path):
    """No second message of Python's at the end of the process."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
        os.dup2(write, 2)
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
        code = answer(lambda: print("a line") or 0)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    os.close(write)
    with open(read) as said:
        assert said.read() == "error: No space left on device\n"
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 4


def test_ctrl_c_is_one_line(capsys):
    assert ended(raiser(KeyboardInterrupt()), capsys) == (130, "stopped")

    def long_work():
        with ExitStack() as stack:
            stack.enter_context(goes_on())
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    try:
        assert ended(long_work, capsys) == (130, "stopped; the same command goes on")
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("imported", [False, True])
def test_ctrl_c_while_modules_are_imported_can_not_be_caught(imported):
    """transformers makes another error of an exception there, and torch's C++ code aborts."""
    caught = []

    def dispatch(argv, loaded):
        if imported:
            loaded()
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            caught.append("as what is done after the imports is")
            raise
        return 0

    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.dup2(write, 2)
        sys.stderr = open(2, "w")  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.modules["projected_grpo.cli"] = SimpleNamespace(dispatch=dispatch)
        code = as_process(["grade"])
        sys.stderr.flush()
        os._exit(code if caught and imported else 1)
    os.close(write)
    with open(read) as said:
        assert said.read() == "stopped\n"
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOMEM, "no memory"), ConnectionResetError(errno.ECONNRESET, "reset")], ids=repr
)
def test_what_no_path_explains_keeps_its_traceback(error, capsys):
    """A sweep then tries again, as it does not after a mistake of the user's."""
    with pytest.raises(type(error)):
        answer(raiser(error))


def test_a_second_ctrl_c_ends_the_process_in_silence(monkeypatch, capsys):
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupt(signal.SIGINT, None)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for what runs in the background
        assert as_process(["--version"]) == 0 and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        signal.signal(signal.SIGINT, signal.default_int_handler)
        assert as_process(["--version"]) == 0 and signal.getsignal(signal.SIGINT) is end_now
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("theirs", [None, *ALLOCATOR])
def test_a_process_asks_for_segments_that_grow_unless_the_user_has_a_wish(monkeypatch, theirs):
    """Before torch is imported, which reads it then."""
    for name in ALLOCATOR:
        monkeypatch.setenv(name, "")  # so that what the command sets is undone
        monkeypatch.delenv(name)
    if theirs is not None:
        monkeypatch.setenv(theirs, "max_split_size_mb:64")
    seen = []

    def dispatch(*_):
        seen.append({name: os.environ.get(name) for name in ALLOCATOR})
        return 0

    monkeypatch.setattr("projected_grpo.cli.dispatch", dispatch)
    assert as_process(["--version"]) == 0
    expected = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    if theirs is not None:
        expected = {theirs: "max_split_size_mb:64"}
    assert seen == [dict.fromkeys(ALLOCATOR) | expected]
