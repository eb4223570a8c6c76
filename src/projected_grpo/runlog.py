"""Writing things down: atomic files, JSON and JSONL, the text log, what made a run."""

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loguru import logger
from tqdm import tqdm

from projected_grpo.errors import UserError

PACKAGES = ("projected_grpo", "torch", "transformers", "tokenizers", "safetensors", "numpy", "tyro")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a whole file or nothing: temporary name in the same folder, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
        value = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{option}: {path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{option}: {path} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{option}: {path} does not hold a JSON object")
    return value


def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append one line per row in a single write."""
    text = "".join(json.dumps(plain(row), allow_nan=False) + "\n" for row in rows)
    with open(path, "ab") as file:
        file.write(text.encode())


def truncate_jsonl(path: Path, step: int) -> None:
    """Drop the rows of steps >= step and a line cut off mid-write, so that a resumed run can append."""
    if path.exists():
        kept = [json.dumps(row) + "\n" for row in complete_lines(path) if row["step"] < step]
        write_atomically(path, "".join(kept).encode())


def complete_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL up to a line that was cut off mid-write; none if there is no file."""
    rows: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def versions() -> dict[str, str]:
    """Python, platform and the packages whose version can change a result."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        found[package] = importlib.metadata.version(package)
    return found


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


def run_id(preset: str, arm: str, seed: int, tag: str) -> str:
    """`<timestamp>_<preset>_<arm>_seed<seed><tag>`, local time to the second."""
    return f"{time.strftime('%Y%m%dT%H%M%S')}_{preset}_{arm}_seed{seed}{tag}"


def make_run_dir(runs: Path, name: str) -> Path:
    """Create a folder of that name, with `-2`, `-3`, ... behind it if another run took it this second."""
    runs.mkdir(parents=True, exist_ok=True)
    attempt = 1
    while True:
        path = runs / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            path.mkdir()
            return path
        except FileExistsError:
            attempt += 1


def start_logging(log_file: Path | None) -> None:
    """INFO to the terminal through tqdm (bars survive), everything to the file; colour on terminals only."""
    logger.remove()
    logger.add(
        lambda line: tqdm.write(line, end="", file=sys.stderr),
        level="INFO",
        format="<level>{message}</level>",
        colorize=sys.stderr.isatty(),
    )
    if log_file is not None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        logger.add(log_file, level="DEBUG", format="{time:HH:mm:ss} {level:<7} {message}", colorize=False)
