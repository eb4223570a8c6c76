"""The command line, as its own `--help` tells it: fills the page `cli` when the site is built."""

import dataclasses
import io
import os
from collections.abc import Iterator
from contextlib import redirect_stdout
from typing import get_args
from unittest import mock

from sphinx.application import Sphinx

from projected_grpo.arm_settings import SETTINGS
from projected_grpo.cli import VERBS, main, usage
from projected_grpo.config import PRESETS, TrainConfig

MARKER = "<!-- made from the code when the site is built -->"
WIDTH = "100"  # columns of a help text


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.connect("source-read", fill)
    return {"parallel_read_safe": True}


def fill(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put the reference into the page `cli`. Raises ValueError if the page has lost its place for it."""
    if docname != "cli":
        return
    if MARKER not in source[0]:
        raise ValueError(f"docs/cli.md: no line {MARKER}")
    source[0] = source[0].replace(MARKER, "\n".join(reference()))


def reference() -> Iterator[str]:
    """Markdown lines: all verbs, the presets side by side, then each verb's help."""
    yield from block(usage())
    yield from ("## Presets", "", "Options whose value is not the same in all presets.", "")
    yield from preset_table()
    yield from ("", "## train", "", "The defaults shown are those of `full`.", "")
    yield from block(help_text("train", "full"))
    yield from ("", "## Options of each arm", "", "Beside those that every arm has.", "")
    yield from arm_table()
    for verb in VERBS:
        yield from ("", f"## {verb}", "")
        yield from block(help_text(*verb.split()))


def block(text: str) -> Iterator[str]:
    """Text as it is."""
    yield from ("```text", *text.strip().splitlines(), "```")


def help_text(*argv: str) -> str:
    """What `projected-grpo ARGV --help` prints."""
    said = io.StringIO()
    with mock.patch.dict(os.environ, COLUMNS=WIDTH, NO_COLOR="1"), redirect_stdout(said):
        try:
            main([*argv, "--help"])
        except SystemExit as ended:
            if ended.code:
                raise RuntimeError(f"{' '.join(argv)} --help failed") from ended
    return said.getvalue()


def values(cfg: TrainConfig) -> dict[str, object]:
    """Every option of a preset with its value."""
    groups = [getattr(cfg, f.name) for f in dataclasses.fields(cfg) if f.name != "preset"]
    return {name: value for group in groups for name, value in vars(group).items()}


def arm_table() -> Iterator[str]:
    """The options that not every arm has, with their defaults, as a table."""
    yield "| arm | `--control` | options |"
    yield "|-|-|-|"
    for arm, kind in SETTINGS.items():
        fields = {f.name: f for f in dataclasses.fields(kind)}
        own = [f for name, f in fields.items() if name not in ("intervention", "control", "half_a")]
        told = [f"`--{f.name.replace('_', '-')}`" for f in own]
        controls = ", ".join(get_args(fields["control"].type))
        yield f"| `{arm}` | {controls} | {', '.join(told)} |"


def preset_table() -> Iterator[str]:
    """The options in which the presets differ, as a table."""
    columns = [values(cfg) for _, cfg in PRESETS.values()]
    yield "| option | " + " | ".join(PRESETS) + " |"
    yield "|-" * (1 + len(columns)) + "|"
    for name in columns[0]:
        row = [str(column[name]) for column in columns]
        if len(set(row)) > 1:
            yield f"| `--{name.replace('_', '-')}` | " + " | ".join(row) + " |"
