"""What a command reads is never written over, and what cannot be written is refused before any work."""

import os
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import get_type_hints

import pytest

from projected_grpo.cli import VERBS, main
from projected_grpo.config import (
    FILE_WRITTEN,
    FOLDER_WRITTEN,
    SMOKE,
    BasisConfig,
    ProblemConfig,
    RunConfig,
    TeacherConfig,
    to_json,
)
from projected_grpo.errors import UserError
from projected_grpo.options import verbs
from projected_grpo.options.paths import check_paths, marks_of
from projected_grpo.runlog import write_json

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


GRADED = verbs.GradeOptions(completions=Path("x.jsonl"), out=Path("o"))
POOL, RUN, X = Path("pool"), Path("run"), Path("x.jsonl")
ROW = POOL / "prompt_e001.jsonl"
OF_X = ProblemConfig("x.jsonl")


@pytest.mark.parametrize("out", ["x.jsonl", "./x.jsonl", "run/../x.jsonl", "soft", "hard"])
def test_an_output_that_is_an_input(place, capsys, out):
    before = X.read_bytes()
    assert main(["grade", "--completions=x.jsonl", f"--out={out}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: --out {Path(out)}: is the file of --completions; name another"
    assert X.read_bytes() == before and not list(place.glob("*.part.*"))


OVERWRITES = [
    replace(GRADED, problems=OF_X, completions=Path("y.part"), out=X),
    replace(GRADED, completions=Path("y.part"), out=Path("y")),
    verbs.PairsLintOptions("x.jsonl", json=Path("soft")),
    verbs.PairsFromPoolOptions(POOL, out=ROW),
    verbs.PoolReportOptions(POOL, json=ROW),
    verbs.PoolReportOptions(POOL, json=POOL),
    verbs.PoolRegradeOptions(POOL, out=Path("hard"), problems=OF_X),
    verbs.PoolRegradeOptions(POOL, out=POOL / "prompt_new.jsonl.gz"),
    verbs.PoolReportOptions(POOL, json=POOL / "partition.json"),
    verbs.PoolBuildOptions(out=X, problems=OF_X),
    verbs.PoolSampleOptions(out=POOL, adapter=POOL),
    verbs.EvaluateOptions(RUN, out=RUN / "summary.json"),
    verbs.EvaluateOptions(RUN, out=Path("z"), completions=Path("z")),
    verbs.EvaluateOptions(X, out=Path("hard")),
    verbs.ExportOptions(RUN, out=RUN),
    verbs.ScoreOptions(("x.jsonl",), json=Path("soft")),
    verbs.ResultsOptions((RUN,), out=RUN / "summary.json"),
    verbs.PlotOptions(out=RUN, runs=(RUN,)),
    verbs.ReportOptions((X,), out=Path("run/../soft")),
    verbs.ExtractOptions(basis=BasisConfig(vhack_pairs_path=POOL), out_dir=POOL),
    verbs.BenchGraderOptions(pool=POOL, json=ROW),
    replace(SMOKE, run=RunConfig(out_dir=POOL), teacher=TeacherConfig(teacher_pool_dir=POOL)),
    replace(SMOKE, run=RunConfig(out_dir=X), problems=OF_X),
]


@pytest.mark.parametrize("options", OVERWRITES, ids=lambda options: type(options).__name__)
def test_in_every_verb(place, options):
    with pytest.raises(UserError, match="^--"):
        check_paths(options)


def test_training_asks_too(place, capsys):
    assert main(["train", "smoke", "--teacher-pool-dir=pool", "--out-dir=./pool"]) == 2
    line = "error: --out-dir pool: is the folder of --teacher-pool-dir; name another\n"
    assert capsys.readouterr().err == line


def test_so_does_a_run_that_goes_on(place, capsys):
    """Under its own settings, or where --resume=auto finds none to go on with."""
    cfg = replace(SMOKE, basis=BasisConfig(v_hack_path=X / "v.safetensors"))
    write_json(RUN / "config.json", {"config": to_json(cfg)})
    before = sorted(place.rglob("*"))
    for options in (["--resume=run"], ["--resume=auto", "--v-hack-path=x.jsonl/v.safetensors"]):
        assert main(["train", "smoke", *options]) == 2
        told = capsys.readouterr().err.splitlines()[-1]
        assert told.startswith("error: --v-hack-path x.jsonl/v.safetensors: ") and "is a file" in told
    assert sorted(place.rglob("*")) == before


def test_a_model_that_is_not_there_is_told_before_a_pool_is_made(place, capsys):
    """As of a run with a relative path that goes on from another folder."""
    assert main(["train", "smoke", "--model=./gone"]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == f"error: --model ./gone: no such folder in {place}" and not Path("out").exists()


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
def test_an_output_that_cannot_be(place, out, why):
    with pytest.raises(UserError, match=why):
        check_paths(verbs.PoolReportOptions(POOL, json=Path(out)))
    assert not Path("new").exists()


def test_a_read_only_place(place, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="run cannot be written"):
        check_paths(verbs.PoolReportOptions(POOL, json=Path("run/new/y.json")))


@pytest.mark.parametrize("kind", [verbs.ExtractOptions, verbs.VerifyOptions])
def test_a_basis_file_is_written_where_it_is_not_there(place, monkeypatch, kind):
    monkeypatch.setattr(os, "access", lambda path, mode: "run" not in str(path))
    check_paths(kind(basis=BasisConfig(v_hack_path=RUN / "summary.json"), out_dir=Path("out")))  # it is read
    new = kind(basis=BasisConfig(v_hack_path=RUN / "new.safetensors"), out_dir=Path("out"))
    with pytest.raises(UserError, match="^--v-hack-path run/new.safetensors: .*run cannot be written"):
        check_paths(new)


def test_a_long_name_of_what_is_read_is_its_own_options_fault(place):
    long = BasisConfig(v_hack_path=Path("n" * 300), vhack_pairs_path=Path("core"))
    with pytest.raises(UserError, match="^--v-hack-path: a name of over 255 bytes"):
        check_paths(verbs.ExtractOptions(basis=long, out_dir=Path("out")))
    with pytest.raises(UserError, match="^--completions: a name of over 255 bytes"):
        check_paths(replace(GRADED, completions=Path("n" * 300)))


def test_a_table_may_be_renewed_in_the_folder_that_it_is_of(place):
    check_paths(verbs.ResultsOptions(runs=(RUN,), out=RUN / "table.md"))


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


@pytest.mark.parametrize("kind", [*dict.fromkeys(options for options, _ in VERBS.values()), RunConfig])
def test_every_output_is_marked_as_one(kind):
    if kind.__name__ != "DoctorOptions":  # which says itself whether the place will do
        assert written(kind)[1].isdisjoint(OUTPUTS)
