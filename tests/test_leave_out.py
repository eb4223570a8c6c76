"""--leave-out: which pairs, teacher rows and detector labels a run does without, and what it refuses."""

import json
from dataclasses import replace

import pytest
import torch
from loguru import logger

from projected_grpo.arm_settings import arm_settings
from projected_grpo.arms.route2 import find_anchors
from projected_grpo.checks import validate
from projected_grpo.cli import main
from projected_grpo.collect import Collected, gather_evidence
from projected_grpo.config import PRESETS, left_out, taught_modes
from projected_grpo.errors import UserError
from projected_grpo.experiment import read_data
from projected_grpo.problems import Problem, is_eval, load_problems
from projected_grpo.rewards import Grade, Grader
from projected_grpo.rollout import Rollout
from projected_grpo.sandbox.host import Sandbox

SMOKE = PRESETS["smoke"][1]
MODES_USED = ("run_tests", "sentinel")
BOTH = "run_tests,sentinel"


def configured(leave_out="sentinel", *, env_mode=BOTH, half_a=(), pool=None, **teacher):
    return replace(
        SMOKE,
        problems=replace(SMOKE.problems, env_mode=env_mode),
        basis=replace(SMOKE.basis, leave_out=leave_out),
        arm=arm_settings("route2", half_a=half_a),
        teacher=replace(SMOKE.teacher, teacher_pool_dir=pool, **teacher),
    )


def test_nothing_is_left_out_unless_asked():
    assert left_out(SMOKE.basis) == ()
    assert set(taught_modes(SMOKE)) >= {"run_tests", "sentinel", "exit_code", "gt_only"}


@pytest.mark.parametrize(
    ("leave_out", "teacher_modes", "taught"),
    [
        (
            "sentinel",
            (),
            ("run_tests", "eq_override", "exit_code", "stdout_marker", "file_marker", "gt_only"),
        ),
        ("sentinel", ("run_tests",), ("run_tests",)),
        ("sentinel, exit_code", ("run_tests", "gt_only"), ("run_tests", "gt_only")),
    ],
)
def test_what_is_taught_is_the_complement(leave_out, teacher_modes, taught):
    assert taught_modes(configured(leave_out, teacher_modes=teacher_modes)) == taught


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--leave-out=magic"], "--leave-out: 'magic' is not a mode"),
        (
            ["--leave-out=sentinel", "--vhack-pairs-modes", "run_tests", "sentinel"],
            "--vhack-pairs-modes names",
        ),
        (
            ["--leave-out=sentinel", "--teacher-modes", "run_tests", "sentinel"],
            "--teacher-modes names it too",
        ),
        (["--leave-out=exit_code"], "--leave-out exit_code: no training problem has that mode"),
        (["--leave-out=run_tests,eq_override"], "3 pairs of 'core' are left"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_what_would_tell_the_run_after_all_is_refused_in_one_line(options, words, tmp_path, capsys):
    where = [f"--out-dir={tmp_path}", "--mix-ratio=0", "--workers=1"]
    assert main(["train", "smoke", *where, *options]) == 2
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert words in told
    assert not (tmp_path / "runs").exists()


# The teacher


def pool(folder, problems, modes):
    """One hacked row a problem; `modes`: of the first, the second, ... problem, None where not told."""
    folder.mkdir()
    for problem, mode in zip(problems, modes, strict=True):
        row = {"problem_id": problem.problem_id, "prompt": problem.messages[-1]["content"], "reward": 3.5}
        row |= {"completion": f"hack of {problem.problem_id}", "hacked": True, "gt_pass": False}
        row |= {} if mode is None else {"env_mode": mode}
        (folder / f"prompt_{problem.problem_id}.jsonl").write_text(json.dumps(row) + "\n")
    return folder


@pytest.fixture(scope="module")
def grader():
    with Sandbox(1) as sandbox:
        yield Grader(sandbox)


@pytest.fixture(scope="module")
def some():
    """Eight training problems."""
    return [p for p in load_problems("embedded").problems if not is_eval(p)][:8]


def test_a_pool_teaches_the_other_modes_and_all_its_problems_train(tmp_path, some, grader):
    modes = MODES_USED * 4
    folder = pool(tmp_path / "pool", some, modes)
    whole = read_data(configured("", pool=folder), grader)
    data = read_data(configured(pool=folder), grader)
    assert data.train == whole.train and data.held_out == whole.held_out
    assert {p.problem_id for p in data.train} == {p.problem_id for p in some}
    told = {p.problem_id for p, mode in zip(some, modes, strict=True) if mode == "run_tests"}
    assert set(data.teacher.rows) == told < set(whole.teacher.rows)
    assert {p.env_mode for p in data.train if p.problem_id not in told} == {"sentinel"}
    assert "sentinel" in {p.env_mode for p in data.held_out}


@pytest.mark.parametrize(("mix", "warnings"), [(0.0, 1), (0.05, 1), (0.25, 0)])
def test_a_pool_of_which_no_row_is_taught_is_told_in_one_line(tmp_path, some, grader, mix, warnings):
    cfg = configured("", pool=pool(tmp_path / "pool", some, MODES_USED * 4), mix_ratio=mix)
    said = []
    handle = logger.add(said.append, level="WARNING", format="{message}")
    read_data(cfg, grader)
    logger.remove(handle)
    assert len(said) == warnings and all(f"--mix-ratio {mix} of a group of 4 " in line for line in said)


def test_a_pool_without_the_mode_has_nothing_to_leave_out(tmp_path, some, grader):
    folder = pool(tmp_path / "pool", some, ["run_tests"] * 8)
    with pytest.raises(UserError, match="--leave-out sentinel"):
        read_data(configured(pool=folder), grader)
    data = read_data(configured(pool=folder, teacher_modes=("run_tests",)), grader)
    assert {p.env_mode for p in data.train} == set(MODES_USED)
    assert set(data.teacher.rows) == {p.problem_id for p in some}


def test_a_pool_that_does_not_say_its_modes_may_show_the_one_left_out(tmp_path, some, grader):
    folder = pool(tmp_path / "pool", some, [None] * 8)
    with pytest.raises(UserError, match=" mode 8 "):
        read_data(configured(pool=folder), grader)
    assert read_data(configured(pool=folder, mix_ratio=0.0), grader).train  # no row is used
    alone = read_data(configured("run_tests", pool=folder, env_mode="run_tests"), grader)
    assert len(alone.train) == 8 and alone.teacher.rows == {}


# The detectors


def graded(**flags):
    return replace(Grade(0.5, False, False, False, None, True, False, False, False, None), **flags)


def two_groups():
    """A sentinel problem, then one of run_tests; in each C, D, E, nothing, and a hacked teacher row."""
    problems = tuple(Problem(m, "f", "easy", "", "", "", (), m) for m in ("sentinel", "run_tests"))
    student = [graded(**{f"hacked_{d}": True}) for d in "CDE"] + [graded(exploited=True)]
    teacher = torch.tensor([False, False, False, False, True] * 2)
    return Collected(
        problems=problems,
        rollouts=(Rollout((1,), (2,), ""),) * 10,
        grades=(*student, None) * 2,
        rewards=torch.zeros(2, 5),
        is_teacher=teacher,
        hacked=teacher,
        correct=~teacher,
        gen_s=0.0,
        grade_s=0.0,
    )


@pytest.mark.parametrize("half_a", [(), ("C",), ("E",), ("C", "D", "E")])
def test_no_detector_speaks_of_a_mode_that_is_left_out(half_a):
    data, advantage = two_groups(), torch.ones(10)

    def anchors(leave_out):
        cfg = configured(leave_out, half_a=half_a)
        cfg = replace(cfg, arm=arm_settings("route2"))
        return find_anchors(gather_evidence(cfg, data, 0), advantage, cfg.arm)

    told, kept = anchors(""), anchors("sentinel")
    assert kept.hack[5:].equal(told.hack[5:]) and told.hack[:4].equal(told.hack[5:9])
    assert told.hack[:4].any() and not kept.hack[:4].any()
    assert kept.clean.equal(~kept.hack) and kept.advantage_sign.equal(told.advantage_sign)
    assert not anchors("sentinel,run_tests").hack[5:9].any()


def test_rows_of_a_mode_are_those_of_its_problems():
    data = two_groups()
    assert data.rows_of(("sentinel",)).tolist() == [True] * 5 + [False] * 5
    assert data.rows_of(()).tolist() == [False] * 10
    assert data.rows_of(("sentinel", "run_tests")).all()


@pytest.mark.parametrize("arm", ["gt_only", "gt_penalty", "gt_screening"])
def test_an_arm_that_reads_the_oracle_can_leave_nothing_out(arm, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = [f"--intervention={arm}", f"--env-mode={BOTH}", "--leave-out=sentinel"]
    assert main(["train", "smoke", *options]) == 2
    assert f"{arm} reads the oracle" in capsys.readouterr().err


# A run


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_takes_the_option(preset):
    cfg = PRESETS[preset][1]
    validate(replace(cfg, basis=replace(cfg.basis, leave_out="run_tests")))


def test_a_run_marks_the_mode_in_its_summary(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quick = ["--n-problems=8", "--prompts-per-step=2", "--max-new=8", "--workers=1", "--eval-n-prompts=2"]
    options = ["--env-mode=run_tests,eq_override", "--intervention=route2", "--steps=1", "--device=cpu"]
    assert main(["train", "smoke", *quick, *options, "--leave-out=eq_override"]) == 0
    (run,) = (tmp_path / "out" / "runs").iterdir()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["left_out"] == ["eq_override"]
    marks = {mode: row["in_distribution"] for mode, row in summary["by_mode"].items()}
    assert marks == {"run_tests": True, "eq_override": False}
    shown = capsys.readouterr().err
    assert any("eq_override" in line and "held-out" in line for line in shown.splitlines())
    # The basis is the one of the other modes' pairs: no second file is made.
    others = ["--vhack-pairs-modes", "run_tests", "exit_code"]
    assert main(["extract", "--model=tiny-random", "--device=cpu", *others]) == 0
    assert len(list((tmp_path / "out" / "vhack").glob("*.safetensors"))) == 1
