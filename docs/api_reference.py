"""The public interface, as its docstrings tell it: fills the page `api` when the site is built."""

import ast
import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from cli_reference import MARKER, block
from sphinx.application import Sphinx

from projected_grpo.config import EnvMode

MODULES = (
    "projected_grpo.api.grading",
    "projected_grpo.api.method",
)
# By their source: each imports a trainer, which need not be installed.
ADAPTERS = ("trl", "verl", "verifiers")
SOURCE = Path(__file__).parents[1] / "src" / "projected_grpo" / "integrations"
PARTS = ("Shapes", "Units", "Errors", "Source")
# What else these types have, and every method of the other types, is not part of the interface.
METHODS = {
    "Grader": ("grade", "grade_all", "submit", "close"),
    "PairSet": ("split",),
    "Policy": ("deltas", "write_gradients"),
    "Problem": ("messages", "task"),
}


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.connect("source-read", fill)
    return {"parallel_read_safe": True}


def fill(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put the reference into the page `api`. Raises ValueError if the page has lost its place for it."""
    if docname != "api":
        return
    if MARKER not in source[0]:
        raise ValueError(f"docs/api.md: no line {MARKER}")
    source[0] = source[0].replace(MARKER, "\n".join(reference()))


def reference() -> Iterator[str]:
    """Markdown lines: every module with its names."""
    for name in MODULES:
        module = importlib.import_module(name)
        yield from (f"## {name}", "", inspect.getdoc(module) or "", "")
        for entry in module.__all__:
            yield from (f"### {entry}", "", *described(entry, getattr(module, entry)), "")
    for name in ADAPTERS:
        yield from (f"## projected_grpo.integrations.{name}", "")
        for entry, parsed in adapter(name).items():
            first = next((part for part in parsed.body if getattr(part, "name", "") == "__init__"), parsed)
            taken = ast.unparse(first.args) if isinstance(first, ast.FunctionDef) else "config"
            yield from (f"### {entry}", "", *block(f"{entry}({taken.removeprefix('self, ')})"), "")
            yield from (as_list(ast.get_docstring(parsed) or ""), "")


def adapter(name: str) -> dict[str, ast.FunctionDef | ast.ClassDef]:
    """What an adapter offers, as its source has it, by name."""
    body = ast.parse((SOURCE / f"{name}.py").read_text()).body
    (listed,) = (x for x in body if isinstance(x, ast.Assign) and ast.unparse(x.targets[0]) == "__all__")
    parts = {x.name: x for x in body if isinstance(x, ast.FunctionDef | ast.ClassDef)}
    return {entry: parts[entry] for entry in ast.literal_eval(listed.value)}


def as_list(docstring: str) -> str:
    """A docstring whose last lines are a list."""
    return re.sub(rf"^({'|'.join(PARTS)}):", r"- **\1.**", docstring, flags=re.M)


def described(name: str, value: object) -> Iterator[str]:
    """One name: signature, docstring, fields and methods, whichever it has; else its value."""
    if isinstance(value, Mapping) or get_args(value):
        yield "One of " + ", ".join(
            f"`{key}`" for key in (value if isinstance(value, Mapping) else get_args(value))
        )
        return
    if not dataclasses.is_dataclass(value) and not (inspect.isclass(value) and issubclass(value, Exception)):
        yield from block(f"{name}{signature(value)}")
    yield from ("", as_list(inspect.getdoc(value) or ""), "")
    if dataclasses.is_dataclass(value):
        yield from block("\n".join(f"{f.name}: {short(f.type)}" for f in dataclasses.fields(value)))
    for method in METHODS.get(name, ()):
        does = getattr(value, method)
        said = (inspect.getdoc(does) or "").splitlines()[0]
        yield f"- `{method}{'' if isinstance(does, property) else signature(does)}`: {said}"


def signature(value: Any) -> str:
    """What it is called with, without the names of modules."""
    return short(inspect.signature(value))


def short(annotation: object) -> str:
    """A type as text, without the names of modules."""
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    text = re.sub(r"(?<=: |> )'([^']+)'", r"\1", text.replace(str(EnvMode), "EnvMode"))
    return re.sub(r"\b(?:[a-z_]\w*\.)+(?=\w)", "", text)
