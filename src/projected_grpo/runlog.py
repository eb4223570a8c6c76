"""Writing things down: atomic files, JSON and JSONL, the text log, what made a run."""

import errno
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from loguru import logger
from tqdm import tqdm

from projected_grpo.errors import UserError, writing

# As a file's name on any file system: where case does not count, `A` and `a` would be one file.
PLAIN_NAME = re.compile(r"[a-z0-9_.-]{1,100}")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # but not tab and newline
PACKAGES = ("projected_grpo", "torch", "transformers", "tokenizers", "safetensors", "numpy", "tyro", "vllm")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a whole file or nothing: temporary name in the same folder, fsync, rename, folder fsync.

    A device or a pipe is written to. An OSError names `path`.
    """
    with writing(path):
        if path.exists() and not path.is_file():
            path.write_bytes(data)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.blake2b(os.fsencode(path.name), digest_size=6).hexdigest()  # a name may be no longer
        temporary = path.with_name(f".{path.name[-32:]}.{digest}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def file_name(text: str) -> str:
    """Any text as part of a file's name, another for every text: itself, or quoted, cut and with a hash."""
    if PLAIN_NAME.fullmatch(text):
        return text
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=6).hexdigest()
    return f"{quote(text, safe='', errors='surrogatepass')[:60]}~{digest}"


def sync_folder(folder: Path) -> None:
    """Make renames in a folder outlive a power cut, where the file system can."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync no folder
            raise
    finally:
        os.close(fd)


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed `write_atomically` left half-written; the caller holds the folder's lock."""
    for path in folder.rglob(".*.tmp"):
        path.unlink()


def lock_folder(folder: Path, stack: ExitStack, option: str) -> None:
    """Take a run folder until `stack` closes or the process dies, however it dies.

    Raises UserError while another process has it.
    """
    lock_file(folder / "lock", stack, f"{option}: {folder}")


def lock_file(path: Path, stack: ExitStack, what: str) -> None:
    """Take a file, made if need be, as `lock_folder` does a folder. `what` names it to whoever is refused."""
    file = stack.enter_context(open(path, "ab"))  # noqa: SIM115 (the stack closes it)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"{what} is being written by another process; wait for it to end") from error
    except OSError as error:
        logger.warning("{} cannot be locked ({}): let no second process write it", path, error)
    if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
        raise UserError(
            f"{what} has just been written by another process"
        )  # which renamed it while we waited


def plain(value: Any) -> Any:
    """A JSON value without NaN or infinity: missing and non-finite numbers become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def write_json(path: Path, value: Any) -> None:
    """Atomically write one JSON document, indented."""
    text = json.dumps(plain(value), indent=1, default=str, allow_nan=False)
    write_atomically(path, (text + "\n").encode())


def read_json(path: Path, option: str) -> dict[str, Any]:
    """A JSON object from a file that `option` named. Raises UserError if it is missing or is not one."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{option}: {path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{option}: {path} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{option}: {path} does not hold a JSON object")
    return value


def shown(value: Any) -> str:
    """A value that was read, for a message: as JSON, cut to its beginning."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."


def jsonl(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(plain(row), allow_nan=False) + "\n" for row in rows).encode()


def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append one line per row in a single write."""
    with writing(path), open(path, "ab") as file:
        file.write(jsonl(rows))


class JsonlLog:
    """An append-only JSONL that knows its length and hash, so that a saved state can name its place in it.

    Rows that the disk does not take stay pending and are written with the next ones.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self.hash = hashlib.blake2b(digest_size=16)
        self.pending = b""

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add a line per row. Raises OSError if they cannot be written now."""
        self.pending += jsonl(rows)
        self.flush()

    def flush(self, *, sync: bool = False) -> None:
        """Write what is pending, over what an earlier attempt left after the last whole line."""
        with writing(self.path):
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            with open(descriptor, "r+b", buffering=0) as file:
                file.truncate(self.size)
                file.seek(self.size)
                left = memoryview(self.pending)
                while left:
                    left = left[file.write(left) :]
                if sync:
                    os.fsync(file.fileno())
        self.size += len(self.pending)
        self.hash.update(self.pending)
        self.pending = b""

    def mark(self) -> dict[str, Any]:
        """Length and hash of all that was written."""
        return {"bytes": self.size, "blake2b": self.hash.hexdigest()}

    def cut_back(self, mark: Mapping[str, Any]) -> None:
        """Continue after the bytes that `mark` names; later lines, whole or half, are cut off.

        Raises UserError if the file no longer begins with them.
        """
        written = self.read(mark)
        self.size, self.pending = len(written), b""
        self.hash = hashlib.blake2b(written, digest_size=16)
        self.flush()

    def read(self, mark: Mapping[str, Any]) -> bytes:
        """The bytes that `mark` names. Raises UserError if they are no longer what they were."""
        try:
            with open(self.path, "rb") as file:
                written = file.read(mark["bytes"])
        except FileNotFoundError:
            written = b""
        if len(written) < mark["bytes"]:
            raise UserError(f"{self.path.name} has lost lines that stood in it by then")
        if hashlib.blake2b(written, digest_size=16).hexdigest() != mark["blake2b"]:
            raise UserError(f"{self.path.name} no longer holds what stood in it by then")
        return written


def complete_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL up to a line that was cut off mid-write, or is none; none if there is no file."""
    rows: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict):
            break
        rows.append(row)
    return rows


def versions() -> dict[str, str]:
    """Python, platform and the packages whose version can change a result."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def command_line(*words: object) -> str:
    """A command of this program as it can be pasted into this shell."""
    script = Path(sys.executable).with_name("projected-grpo")
    found = shutil.which(script.name)
    if found and (not script.exists() or Path(found).resolve() == script.resolve()):
        program = [script.name]
    elif script.exists():
        here = script.is_relative_to(Path.cwd())
        program = [str(script.relative_to(Path.cwd()) if here else script)]
    else:
        program = [sys.executable, "-m", "projected_grpo.cli"]
    return shlex.join([*program, *map(str, words)])


def git_commit() -> str | None:
    """Commit of the source this runs from, with `+dirty` when it is edited; None outside a checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+dirty" if git("status", "--porcelain", "--", str(here)) else "")
    except (OSError, subprocess.SubprocessError):
        return None


def make_run_dir(runs: Path, name: str) -> Path:
    """Create a folder of that name, with `-2`, `-3`, ... appended if another run took it this second."""
    runs.mkdir(parents=True, exist_ok=True)
    attempt = 1
    while True:
        path = runs / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            path.mkdir()
            return path
        except FileExistsError:
            attempt += 1


def printable(text: str) -> str:
    """Control characters as their escapes: a model's text can neither colour nor move a terminal's cursor."""
    return CONTROL.sub(lambda found: repr(found.group())[1:-1], text)


def _make_printable(record: Any) -> None:
    record["message"] = printable(record["message"])


def log_errors(who: str) -> None:
    """Warnings and errors to the terminal, prefixed with this name: for all processes but the first."""
    logger.remove()
    logger.add(sys.stderr, level="WARNING", format=who + ": {message}", colorize=False)


def start_logging(log_file: Path | None) -> None:
    """INFO to the terminal through tqdm (bars survive), everything to the file; colour on terminals only."""
    logger.remove()
    logger.configure(patcher=_make_printable)
    logger.add(
        lambda line: tqdm.write(line, end="", file=sys.stderr),
        level="INFO",
        format="<level>{message}</level>",
        colorize=sys.stderr.isatty(),
    )
    if log_file is not None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        log_file.touch()  # one that cannot be written ends the run here
        logger.add(
            text_log(log_file),
            level="DEBUG",
            format="{time:HH:mm:ss} {level:<7} {message}",
            colorize=False,
            diagnose=False,  # a traceback would hold the values of variables
        )


def text_log(path: Path) -> Callable[[str], None]:
    """What adds lines to a text log. Where the storage does not take one, that is said once, in one line."""
    failed: list[str] = []

    def add(line: str) -> None:
        try:
            with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(line)
        except OSError as error:
            if not failed:
                print(f"{path}: {error.strerror}; lines of the text log are lost", file=sys.stderr)
            failed.append(path.name)

    return add
