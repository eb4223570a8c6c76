"""Whole runs: repeated and resumed to the bit, when they end early, what their files hold."""

import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from itertools import count

import pytest
import torch
from safetensors.torch import load_file

from projected_grpo import step as step_module
from projected_grpo import train as train_module
from projected_grpo.cli import main
from projected_grpo.run.checkpoint import state_paths
from short_runs import copied_after, go_on, lines

pytestmark = pytest.mark.usefixtures("unchecked")
SMALL = (
    *("--n-problems=6", "--eval-n-prompts=2", "--max-new=8", "--workers=1", "--device=cpu"),
    "--vhack-pairs-path=pairs.json",
)


@pytest.fixture
def run(home, monkeypatch):
    """Run the training verb in the folder of all short runs; (exit code, run folder)."""
    monkeypatch.chdir(home)
    runs = home / "out" / "runs"

    def start(*options, arm="route2", steps=4):
        before = set(runs.glob("*"))
        code = main(["train", "smoke", *SMALL, f"--intervention={arm}", f"--steps={steps}", *options])
        (folder,) = set(runs.glob("*")) - before
        return code, folder

    return start


def same_run(one, two):
    assert lines(one) == lines(two)
    assert (one / "rollouts.jsonl").read_bytes() == (two / "rollouts.jsonl").read_bytes()
    a, b = (load_file(folder / "train.safetensors") for folder in (one, two))
    assert set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)
    a, b = (load_file(state_paths(folder)[0]) for folder in (one, two))
    assert set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)
    a, b = (json.loads((folder / "deploy.json").read_text()) for folder in (one, two))
    assert a == b


def test_the_same_seed_gives_the_same_run_whatever_the_workers(run):
    one, two = run("--workers=1"), run("--workers=2")
    assert one[0] == two[0] == 0
    same_run(one[1], two[1])
    assert (one[1] / "train.safetensors").read_bytes() == (two[1] / "train.safetensors").read_bytes()


def test_another_seed_gives_another_run(run):
    one, two = run("--seed=1", steps=2)[1], run("--seed=2", steps=2)[1]
    assert lines(one, "rollouts.jsonl") != lines(two, "rollouts.jsonl")
    held = [json.loads((f / "deploy.json").read_text())["problems"] for f in (one, two)]
    assert held[0] == held[1]  # seeds of a comparison share their problems


INTERRUPTED = (
    "--save-every=2",
    "--eval-ablate-every=2",
    "--vhack-refresh-every=3",
)


@pytest.mark.parametrize(
    ("arm", "options"),
    [
        ("erase", ("--project=purge",)),
        ("route2", ("--rollout-ablate-frac=0.5",)),
        ("advmod", ("--advmod-buffer=5",)),
        ("route2", ("--gate-signal=activation", "--quarantine=block", "--block-init=direction")),
    ],
    ids=["erase", "route2", "advmod", "activation and block"],
)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(run, tmp_path, arm, options):
    with copied_after(tmp_path, 5):
        _, whole = run(*INTERRUPTED, *options, arm=arm, steps=6)
    cut = shutil.copytree(tmp_path / "5", whole.with_name(f"{whole.name}_cut"))
    assert len(lines(cut)) == 5 and not (cut / "summary.json").exists()
    with open(cut / "steps.jsonl", "a") as file:
        file.write('{"step": 5, "re')  # cut off in mid-write
    runs = set(whole.parent.iterdir())
    assert go_on(cut) == 0 and set(whole.parent.iterdir()) == runs
    same_run(whole, cut)
    assert {p.name for p in cut.iterdir()} == {p.name for p in whole.iterdir()}
    summaries = [json.loads((f / "summary.json").read_text()) | {"seconds": 0} for f in (whole, cut)]
    assert summaries[0] == summaries[1] and summaries[1]["finished"]


def poison(patch, steps):
    """Let these steps (as given by the run's own count) see a loss that is not finite."""
    real, seen = step_module.per_rollout_grads, count()

    def poisoned(*arguments, **options):
        grads = real(*arguments, **options)
        return replace(grads, loss=math.nan) if next(seen) in steps else grads

    patch.setattr(step_module, "per_rollout_grads", poisoned)


def test_a_run_goes_on_behind_skipped_steps_and_says_how_many(run, monkeypatch):
    poison(monkeypatch, {0, 1, 3})
    code, folder = run(steps=5)
    assert code == 0
    assert [r["skipped"] for r in lines(folder)] == [1, 1, 0, 1, 0]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["skipped"] == 3 and summary["finished"]


def test_a_run_ends_after_so_many_skipped_steps_in_a_row_with_its_state(run, monkeypatch):
    with monkeypatch.context() as patch:
        poison(patch, {1, 2, 3})
        code, folder = run(steps=6)
    assert code == train_module.DIVERGED
    assert [r["skipped"] for r in lines(folder)] == [0, 1, 1, 1]
    assert json.loads((folder / "summary.json").read_text())["finished"] is False
    assert state_paths(folder)[0].name == "state_step0004.safetensors"
    assert go_on(folder) == 0
    assert len(lines(folder)) == 6


def test_a_refresh_that_is_not_finite_ends_the_run_with_the_state_before_it(run, monkeypatch):
    _, whole = run("--vhack-refresh-every=2", steps=4)

    def broken(*arguments):
        raise FloatingPointError("a pair gradient is not finite")

    with monkeypatch.context() as patch:
        patch.setattr(step_module, "refresh", broken)
        code, cut = run("--vhack-refresh-every=2", steps=4)
    assert code == train_module.DIVERGED
    assert len(lines(cut)) == 2
    assert json.loads((cut / "summary.json").read_text())["finished"] is False
    assert go_on(cut) == 0
    same_run(whole, cut)


@pytest.mark.parametrize(
    ("where", "saved"),
    [("collect", 2), ("per_rollout_grads", 2), ("correct_change", None), ("describe_step", None)],
)
def test_any_error_saves_a_state_that_is_whole_and_no_other(run, home, monkeypatch, where, saved):
    """From AdamW's step until its line is written, parameters are a step ahead of all else."""
    _, whole = run("--vhack-refresh-every=0", steps=4)
    real, calls = getattr(step_module, where), count()

    def broken(*arguments, **options):
        if next(calls) == 2:
            raise RuntimeError("CUDA error: a GPU fell off the bus (injected)")
        return real(*arguments, **options)

    before = set((home / "out" / "runs").glob("*"))
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="fell off"):
        patch.setattr(step_module, where, broken)
        run("--vhack-refresh-every=0", "--save-every=0", steps=4)
    (cut,) = set((home / "out" / "runs").glob("*")) - before
    assert [path.name for path in state_paths(cut)] == (
        [] if saved is None else ["state_step0002.safetensors"]
    )
    if saved is not None:
        assert go_on(cut) == 0
        same_run(whole, cut)


def watched(monkeypatch, series):
    """Let the loop see these (lp_t, lp_ref) instead of the measured ones."""
    real = train_module.train_step

    def altered(exp, state):
        record, data = real(exp, state)
        lp_t, lp_ref = series[state.step]
        return record | {"lp_t": lp_t, "lp_ref": lp_ref}, data

    monkeypatch.setattr(train_module, "train_step", altered)


@pytest.mark.parametrize(
    "series",
    [
        [(-1.0, -1.0), (-1.0, -1.0), (-6.5, -1.0), (-6.5, -1.0), (-1.0, -1.0)],
        [(None, -1.0), (None, -1.0), (None, -6.5), (None, -6.5), (None, -1.0)],
    ],
    ids=["teacher text", "student text"],
)
def test_a_falling_log_probability_ends_the_run(run, monkeypatch, series):
    watched(monkeypatch, series)
    code, folder = run(steps=5)
    assert code == train_module.DIVERGED
    assert len(lines(folder)) == 4
    assert json.loads((folder / "summary.json").read_text())["finished"] is False


def test_teacher_and_student_text_are_each_held_to_their_own_best(run, monkeypatch):
    """When the teacher leaves, the student's text is not measured against the teacher's."""
    watched(monkeypatch, [(-1.0, -8.0), (-1.0, -8.0), (None, -8.0), (None, -8.0), (None, -8.1)])
    code, folder = run(steps=5)
    assert code == 0 and len(lines(folder)) == 5


def test_the_teachers_leaving_shows_in_the_log(run):
    _, folder = run("--teacher-off-step=2")
    rows = lines(folder)
    assert [r["hack_t"] is not None for r in rows] == [True, True, False, False]
    assert [r["hack_s"][1] for r in rows] == [2, 2, 4, 4]


def test_ablated_rollouts_are_told_apart_in_the_files(run):
    _, folder = run("--rollout-ablate-frac=0.5", arm="route", steps=2)
    for row in lines(folder):
        assert row["hack_abl"][1] == row["solve_abl"][1] == 1
    rollouts = lines(folder, "rollouts.jsonl")
    assert Counter(r["ablated"] for r in rollouts) == {True: 2, False: 2}
    _, plain = run(arm="route", steps=2)
    assert all(r["hack_abl"] is None and r["solve_abl"] is None for r in lines(plain))


def test_the_first_hack_keeps_its_adapter(run, monkeypatch):
    """A student that hacks at step 1 (played by a teacher's text in its mouth)."""
    real = train_module.rollout_rows

    def hacking(step, data, group):
        rows = real(step, data, group)
        return [r | {"exploited": True, "mechanism": r["env_mode"]} for r in rows] if step >= 1 else rows

    monkeypatch.setattr(train_module, "rollout_rows", hacking)
    _, folder = run(arm="route")
    names = {name.split("/")[0] for name in load_file(folder / "first_hack.safetensors")}
    assert names == {"delta_s", "delta_hack"}
    final = load_file(state_paths(folder)[0])
    assert any(not torch.equal(final[n], t) for n, t in load_file(folder / "first_hack.safetensors").items())
    by_mode = json.loads((folder / "summary.json").read_text())["by_mode"]
    firsts = [m["first_exploit_step"] for m in by_mode.values() if m["student_n"]]
    assert min(f for f in firsts if f is not None) == 1
