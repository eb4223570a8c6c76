"""The verb `study`: it makes what is missing, names what failed, reports, and leaves nothing when ended."""

import json
import os
import shlex
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from projected_grpo import cli
from projected_grpo.cli import VERBS
from projected_grpo.errors import GATE_FAILED
from projected_grpo.options.typed import as_typed
from projected_grpo.options.verbs import RESULTS, StudyOptions
from projected_grpo.study.report import study_spec
from projected_grpo.sweep.spec import expand, only
from projected_grpo.verbs.study import found_text
from small_sweeps import in_a_fork, wait

SMALL = ("n-problems=8", "eval-n-prompts=4", "final-n-prompts=8", "eval-ablate-every=0")


@pytest.fixture
def here(tmp_path, monkeypatch, unchecked_children):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def study_command(*more, steps=1):
    return ("study", "nano", "--out=kept", "--seeds=41", *more, "--set", f"steps={steps}", *SMALL)


def test_a_study_makes_what_is_missing_names_what_failed_and_reports(here, monkeypatch, capsys):
    spec = study_spec("nano")
    broken = {"erase": {"intervention": "erase", "model": "/no/such"}}
    few = [arm for arm in spec.arms if arm.name in ("none", "erase")]
    arms = tuple(replace(arm, options=broken.get(arm.name, arm.options)) for arm in few)
    monkeypatch.setattr("projected_grpo.verbs.study.study_spec", lambda name: replace(spec, arms=arms))
    command = study_command("--arms", "erase", "none")
    assert cli.main(list(command)) == GATE_FAILED
    assert {p.name for p in Path("kept").iterdir()} >= {"none_seed41.json", "tables.md", "pareto.png"}
    assert not Path("kept/erase_seed41.json").exists()
    assert any("no such folder" in path.read_text() for path in Path("out/sweeps/nano/jobs").glob("*.txt"))
    data = json.loads(Path("kept/none_seed41.json").read_text())
    assert len(data["steps"]["hack_s"]) == 1 and data["summary"]["finished"] is True
    assert "--intervention=none" in data["command"] and "--seed=41" in data["command"]
    stamp = Path("kept/none_seed41.json").stat().st_mtime_ns
    capsys.readouterr()
    assert cli.main([*study_command("--arms", "none", "--report-only")]) == 0
    assert "## Emergence" in capsys.readouterr().out
    assert cli.main([*study_command("--arms", "none")]) == 0  # nothing left to do
    assert Path("kept/none_seed41.json").stat().st_mtime_ns == stamp
    capsys.readouterr()
    assert cli.main([*study_command("--arms", "none", steps=2)]) == 2  # another run
    assert "steps (1 there, 2 here)" in capsys.readouterr().err
    assert Path("kept/none_seed41.json").stat().st_mtime_ns == stamp


def test_an_interrupted_study_leaves_no_process_and_no_record(here):
    with in_a_fork(*study_command("--arms", "none", "--jobs=1", steps=1000)) as study:
        wait(lambda: list(Path("out/sweeps/nano/jobs").glob("*.txt")))
        os.kill(study, signal.SIGINT)
    assert not Path("kept").exists()
    wait(lambda: not any(str(here) in command and "projected_grpo.train" in command for command in running()))


def running():
    """The command lines of all processes."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield path.read_bytes().decode(errors="replace")
        except OSError:
            continue


def test_a_study_says_what_it_found_and_how_to_make_ones_own(here, capsys):
    """Its records came with the clone; elsewhere a day of runs is not begun by mistake."""
    assert cli.main(["study", "nano"]) == 2
    refused = capsys.readouterr().err
    found = found_text(StudyOptions("nano"), [{"wall_s": 5400.0}] * 10, 0, RESULTS / "tables.md")
    assert "10 records of the study nano lie in docs/results/nano; no run was left to make" in found
    assert "15 hours" in found and str(RESULTS / "tables.md") in found and "root of a clone" in refused
    for text in (refused, found):
        _, own = text.strip().split("your own: ")
        options = VERBS["study"][0]
        words = as_typed(shlex.split(own)[2:], options, "study")
        assert "--out=my_study" in words
        asked = dict(word.removeprefix("--").split("=") for word in words if "=" in word)
        assert len(expand(only(study_spec("nano"), asked["arms"].split(","), asked["seeds"]))) == 6
    assert "to make" not in found_text(StudyOptions("nano", out=Path("my")), [{"wall_s": 1.0}], 1, Path("t"))


def test_trying_a_study_out_does_not_touch_the_real_ones_records(capsys):
    assert cli.main(["study", "nano", "--set", "steps=1"]) == 2
    assert "--out of its own" in capsys.readouterr().err


def test_a_wrong_option_is_refused_before_anything_runs(here, capsys):
    for wrong, said in (
        ("--jobs=-1", "--jobs"),
        ("--arms=erase+hair", "erase+haar"),
        ("--page=x.md", "x.md"),
    ):
        assert cli.main([*study_command(wrong)]) == 2
        assert said in capsys.readouterr().err.splitlines()[-1]
    assert cli.main([*study_command("--report-only")]) == 2
    assert "no record" in capsys.readouterr().err and not Path("kept").exists()
