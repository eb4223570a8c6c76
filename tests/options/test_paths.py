"""What a command reads is never written over, and what cannot be written is refused before any work."""

import os
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest

from projected_grpo.cli import VERBS, main
from projected_grpo.config import FILE_WRITTEN, FOLDER_WRITTEN, RunConfig
from projected_grpo.options.paths import check_paths, marks_of
from projected_grpo.options.verbs import ResultsOptions

OUTPUTS = ("out", "json", "plot", "page", "out_dir")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a file, its links, a pool and a run."""
    monkeypatch.chdir(tmp_path)
    Path("x.jsonl").write_text('{"problem_id": "e001", "completion": "no code"}\n')
    Path("y.part").write_text("no line end")
    Path("soft").symlink_to("x.jsonl")
    os.link("x.jsonl", "hard")
    for name in ("pool/prompt_e001.jsonl", "run/summary.json", "run/table.md"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("{}\n")
    return tmp_path


def told(argv, capsys):
    """The one line of a command that is refused."""
    assert main(argv.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("out", ["x.jsonl", "./x.jsonl", "run/../x.jsonl", "soft", "hard"])
def test_an_output_that_is_an_input(place, capsys, out):
    before = Path("x.jsonl").read_bytes()
    line = told(f"grade --completions x.jsonl --out {out}", capsys)
    assert line == f"error: --out {Path(out)}: is the file of --completions; name another"
    assert Path("x.jsonl").read_bytes() == before and not list(place.glob("*.part.*"))


@pytest.mark.parametrize(
    "argv",
    [
        "grade --problems x.jsonl --completions y.part --out x.jsonl",
        "grade --completions y.part --out y",
        "pairs lint x.jsonl --json soft",
        "pairs from-pool pool --out pool/prompt_e001.jsonl",
        "pool report pool --json pool/prompt_e001.jsonl",
        "pool report pool --json pool",
        "pool regrade pool --problems x.jsonl --out hard",
        "pool build --problems x.jsonl --out x.jsonl",
        "pool sample --out pool --adapter pool",
        "evaluate run --out run/summary.json",
        "evaluate run --out z.json --completions z.json",
        "evaluate x.jsonl --out hard",
        "export run --out run",
        "score x.jsonl --json soft",
        "results run --out run/summary.json",
        "results x.jsonl --out x.jsonl",
        "plot run --out run",
        "report run --out run/summary.json",
        "extract --vhack-pairs-path pool --out-dir pool",
        "bench grader --pool pool --json pool/prompt_e001.jsonl",
        "train smoke --teacher-pool-dir pool --out-dir pool",
        "train smoke --problems x.jsonl --out-dir x.jsonl",
    ],
)
def test_in_every_verb(place, capsys, argv):
    files = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    assert told(argv, capsys).startswith("error: --")
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == files


@pytest.mark.parametrize(
    ("out", "why"),
    [
        ("x.jsonl/y.json", "is a file"),
        ("n" * 300, "255 bytes"),
        (f"new/{'é' * 200}/y.json", "255 bytes"),
        ("run", "is a folder"),
        (".", "is a folder"),
    ],
)
def test_an_output_that_cannot_be(place, capsys, out, why):
    assert why in told(f"pool report pool --json {out}", capsys)
    assert not Path("new").exists()


def test_a_read_only_place(place, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "run cannot be written" in told("pool report pool --json run/new/y.json", capsys)


def test_a_table_may_be_renewed_in_the_folder_that_it_is_of(place):
    check_paths(ResultsOptions(runs=(Path("run"),), out=Path("run/table.md")))


def written(kind):
    """The names of a class's fields, with its groups', that are marked as written; and of the others."""
    marked, others = set(), set()
    for field in fields(kind):
        hint = get_type_hints(kind, include_extras=True)[field.name]
        if is_dataclass(hint):
            pair = written(hint)
            marked, others = marked | pair[0], others | pair[1]
        else:
            (marked if {FILE_WRITTEN, FOLDER_WRITTEN} & set(marks_of(hint)) else others).add(field.name)
    return marked, others


@pytest.mark.parametrize("kind", [*{options for options, _ in VERBS.values()}, RunConfig])
def test_every_output_is_marked_as_one(kind):
    if kind.__name__ != "DoctorOptions":  # which says itself whether the place will do
        assert written(kind)[1].isdisjoint(OUTPUTS)
