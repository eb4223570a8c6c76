"""The paths of a command, checked before any work: what is read is not written over, all can be written."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import tyro

from projected_grpo.config import FILE_MADE, FILE_WRITTEN, FOLDER_WRITTEN
from projected_grpo.errors import UserError

POSITIONAL = get_args(tyro.conf.Positional[Path])[1]
MAY_BE_PATHS = ("problems", "model", "pairs", "directions")  # options that take a path or a name
LONGEST_NAME = 255  # bytes of a file's name, on nearly all file systems
# What is read of a folder that an option names: of a run, a pool, a model.
READ_OF_A_FOLDER = re.compile(
    r"(config|summary|deploy|partition|sampled|tokenizer.*|.*index)\.json|.*\.(jsonl|gz|safetensors)"
)
ROW_OF_A_POOL = re.compile(r"partition\.json|prompt_.*\.jsonl(\.gz)?")  # also where it is new


@dataclass(frozen=True)
class Named:
    """A path that an option names, and whether it is written, as a file or as a folder."""

    option: str  # empty: it is typed without one
    path: Path
    written: str

    def __str__(self) -> str:
        return f"{self.option} {self.path}".strip()


def check_paths(options: object) -> None:
    """Raises UserError for a path that is written and also read, that cannot be written, or has too long a
    name."""
    found = list(paths(options))
    for each in found:
        check_length(each)
    for out in (each for each in found if each.written):
        try:
            check_writable(out)
            for other in found:
                if other is not out and writes_over(out, other):
                    kind = "folder" if other.path.is_dir() else "file"
                    where = "the" if same(out.path, other.path) or kind == "file" else "in the"
                    also = other.option or f"the input {other.path}"
                    raise UserError(f"{out}: is {where} {kind} of {also}; name another")
        except OSError as error:
            raise UserError(f"{out}: {error.strerror}") from error


def paths(options: Any) -> Iterator[Named]:
    """The paths among a command's options, those of its groups included."""
    hints = get_type_hints(type(options), include_extras=True)
    for field in fields(options):
        value, marks = getattr(options, field.name), marks_of(hints[field.name])
        if is_dataclass(value):
            yield from paths(value)
            continue
        option = "" if POSITIONAL in marks else f"--{field.name.replace('_', '-')}"
        written = next((mark for mark in (FILE_WRITTEN, FOLDER_WRITTEN) if mark in marks), "")
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, Path) or (isinstance(each, str) and each and field.name in MAY_BE_PATHS):
                path = Path(each).expanduser()
                made = FILE_MADE in marks and not os.path.exists(path)
                yield Named(option, path, FILE_WRITTEN if made else written)


def marks_of(hint: Any) -> list[Any]:
    """What annotates a type, at any depth: `Annotated[Path, mark] | None` has the mark."""
    own = list(getattr(hint, "__metadata__", ()))
    return own + [mark for part in get_args(hint) for mark in marks_of(part)]


def writes_over(out: Named, other: Named) -> bool:
    """Whether writing one path would change another, whatever names and links they have."""
    if any(same(path, other.path) for path in (out.path, Path(f"{out.path}.part"))):
        return True
    inside = out.written == FILE_WRITTEN and not other.written and other.path.is_dir()
    place = Path(os.path.realpath(out.path))
    read = READ_OF_A_FOLDER if out.path.exists() else ROW_OF_A_POOL
    return inside and bool(read.fullmatch(place.name)) and other.path.resolve() in place.parents


def same(one: Path, other: Path) -> bool:
    """Whether two paths are one file, also where it is not there yet."""
    if one.exists() and other.exists():
        return os.path.samefile(one, other)
    return os.path.realpath(one) == os.path.realpath(other)


def check_length(named: Named) -> None:
    """Raises UserError for a path that no file can have; asking for it would be an OSError."""
    path = named.path.absolute()
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in path.parts):
        what = named.option or "the input"
        raise UserError(f"{what}: a name of over {LONGEST_NAME} bytes in {str(path)[:60]}...; shorten it")


def check_writable(out: Named) -> None:
    """Raises UserError or OSError for a path that can be seen not to take what is written."""
    path = out.path.absolute()
    if out.written == FILE_WRITTEN and path.is_dir():
        raise UserError(f"{out}: is a folder; name a file")
    place = next(each for each in (path, *path.parents) if each.exists())
    if not place.is_dir() and (place != path or out.written == FOLDER_WRITTEN):
        raise UserError(f"{out}: {place} is a file; name a folder")
    into = path.parent if place == path and path.is_file() else place
    if not os.access(into, os.W_OK):
        raise UserError(f"{out}: {into} cannot be written; name another")
