"""Sweeps: what a file expands to, slots and locks, who makes a run and when."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fake_runs
from arm_lists import CONTROLS_OF, SIGNALS
from projected_grpo.cli import main
from projected_grpo.errors import UserError
from projected_grpo.options.train import parse
from projected_grpo.pairs import load_pairs
from projected_grpo.sweep.jobs import (
    failures_since,
    in_process,
    is_locked,
    jobs_of,
    locked,
    make,
    read_job,
    states,
    write_job,
)
from projected_grpo.sweep.local import Children, Slot, deal, pinned, run_pool
from projected_grpo.sweep.spec import (
    Spec,
    SweepArm,
    SweepLimits,
    basis_options,
    expand,
    flags,
    only,
    quick_spec,
    read_spec,
    seed_range,
)

SWEEPS = Path(__file__).parents[2] / "docs" / "sweeps"


@pytest.fixture
def here(tmp_path, monkeypatch, unchecked_children):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# What a sweep is


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_sweep_file_may_begin_with_a_byte_order_mark(here, encoding):
    (here / "s.toml").write_bytes('preset = "nano"\nname = "mine"\n'.encode(encoding))
    assert read_spec(here / "s.toml").name == "mine"
    (here / "s.toml").write_bytes(b'preset = "n\xff"\n')
    with pytest.raises(UserError, match="s.toml: not text in UTF-8 or UTF-16"):
        read_spec(here / "s.toml")


def test_a_sweep_is_arms_times_axes(here):
    (here / "s.toml").write_text(
        'preset = "nano"\n[options]\nlr = 0.01\n[[arms]]\nname = "none"\noptions = {intervention = "none"}\n'
        '[[arms]]\nname = "erase"\noptions = { preserve-magnitude = false }\ngrid = { v-hack-k = [1, 3] }\n'
        '[grid]\nseed = [41, "50-51"]\nvhack-pairs-modes = [["sentinel"], ["run_tests", "file_marker"]]\n'
    )
    spec = read_spec(here / "s.toml")
    runs = expand(spec)
    modes = [("sentinel",), ("run_tests", "file_marker")]
    wanted = {("none", s, m, 5, True) for s, m in product((41, 50, 51), modes)}
    wanted |= {("erase", *x) for x in product((41, 50, 51), modes, (1, 3), (False,))}
    found = [
        (r.cfg.arm.intervention, r.cfg.run.seed, r.cfg.basis.vhack_pairs_modes, r.cfg.basis.v_hack_k,
         getattr(r.cfg.arm, "preserve_magnitude", True)) for r in runs
    ]  # fmt: skip
    assert set(found) == wanted and len(found) == len(wanted)
    assert len({r.id for r in runs}) == len({r.name for r in runs}) == len(runs)
    assert [r.cfg.run.seed for r in runs] == sorted(r.cfg.run.seed for r in runs)
    assert all(r.cfg.optim.lr == 0.01 and parse(r.argv) == r.cfg for r in runs)
    assert spec.home == Path("out/sweeps/s")


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("41-43", [41, 42, 43]),
        ("41,43", [41, 43]),
        ("41 43-44", [41, 43, 44]),
        ([1, "3-4"], [1, 3, 4]),
        (7, [7]),
    ],
)
def test_seeds_are_numbers_and_ranges(text, seeds):
    assert list(seed_range(text)) == seeds


@pytest.mark.parametrize("text", ["", "a", "5-4", "1,1", "1-3,2", "-1", []])
def test_seeds_that_are_none_or_twice_are_refused(text):
    with pytest.raises(UserError, match="seeds"):
        seed_range(text)


@settings(max_examples=6)
@given(
    st.dictionaries(
        st.sampled_from(["lr", "beta", "clip"]), st.floats(1e-6, 0.5, allow_subnormal=False), min_size=1
    ),
    st.sampled_from([True, False]),
)
def test_options_read_back_as_they_were_typed(numbers, flag):
    cfg = parse(["nano", *flags({**numbers, "unbiased": flag})])
    assert cfg.loss.unbiased is flag
    for name, value in numbers.items():
        assert getattr(cfg.optim if name == "lr" else cfg.loss, name) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('preset = "nano"\ncolour = 1', "unknown key 'colour'"),
        ('preset = "huge"', "preset must be one of"),
        ('preset = "nano"\n[options]\nstepps = 3', "--steps"),
        ('preset = "nano"\n[options]\nout-dir = "x"', "sets out-dir itself"),
        ('preset = "nano"\n[options]\nsteps = "many"', "--steps 'many' is no whole number"),
        ('preset = "nano"\n[[arms]]\nname="a"\noptions={intervention="none", control="haar"}', "--control"),
        ('preset = "nano"\n[[arms]]\nname="a"\n[[arms]]\nname="a"', "two arms are called 'a'"),
        (
            'preset="nano"\n[[arms]]\nname="a"\ngrid={lr=[1.0]}\n[[arms]]\nname="a_lr=1.0"\noptions={lr=2.0}',
            "two runs would be kept as a_lr=1.0_seed41; rename an arm",
        ),
        ('preset = "nano"\n[[arms]]\nname="a"\n[[arms]]\nname="b"', "same run"),
        ('preset = "nano"\n[[arms]]\noptions={}', "needs a name"),
        ('preset = "nano"\n[grid]\nlr = 0.1', "lr must be a list"),
        ('preset = "nano"\n[limits]\nfast = 1', "unknown key 'fast'"),
        ('preset = "nano"\nengine = "cloud"', "engine must be one of"),
        ('preset = "nano"\nname = "../x"', "fit a folder name"),
        ("preset = ", "not valid TOML"),
        ('preset = "nano"\n[limits]\njobs = -1', "--jobs must be >= 0"),
        ('preset = "nano"\n[limits]\njobs = "two"', "must be a whole number"),
        ('preset = "nano"\noptions = 3', "options must be a table"),
        ('preset = "nano"\narms = 3', "[[arms]] entries"),
        ('preset = "nano"\n[[arms]]\nname="a"\noptions="b"', "a: options must be a table"),
        ('preset = "nano"\n[pueue]\ncolour = 1\n[grid]\nseed = [1]', "unknown key 'colour'"),
    ],
)  # fmt: skip
def test_a_spec_that_is_wrong_is_told_in_one_line(here, capsys, text, message):
    (here / "s.toml").write_text(text)
    assert main(["sweep", "s.toml", "--dry-run", *(["--engine=pueue"] if "pueue" in text else [])]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last


def test_the_quick_form_is_the_file_in_short(here, capsys):
    command = [
        "sweep",
        "--preset=nano",
        "--grid",
        "intervention=none,erase",
        "lr=1e-3,0.01",
        "--set",
        "steps=2",
    ]
    assert main([*command, "--seeds=41-42", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# 8 of 8 runs to make" and "GB of memory each" in lines[1] and len(lines) == 12
    spec = quick_spec(
        "nano", "quick", ("intervention=none,erase", "lr=1e-3,0.01", "seed=41-42"), ("steps=2",)
    )
    for run, line in zip(expand(spec), lines[4:], strict=True):
        words = shlex.split(line)
        assert words[:2] == ["projected-grpo", "train"]
        assert parse(words[2:-2]) == run.cfg and words[-1] == f"--out-tag=_{run.id}"
    assert not (here / "out").exists()
    assert main(["sweep", "--dry-run"]) == 2
    assert main(["sweep", "x.toml", "--preset=nano"]) == 2
    assert main([*command, "--gates"]) == 2  # only pueue has them
    assert main([*command, "--name=a/b"]) == 2


def test_the_full_sweep_that_is_shipped_is_three_arms_with_their_questions():
    spec = read_spec(SWEEPS / "full.toml")
    runs = expand(spec)
    found = {(r.cfg.preset, r.cfg.arm.intervention, r.cfg.run.seed) for r in runs}
    assert found == {("full", a, s) for a in ("none", "erase", "route2") for s in (41, 42, 43)}
    assert all(arm.why and arm.resolve for arm in spec.arms) and spec.limits.gpus == 1


def test_the_sweep_of_every_arm_has_every_control_that_an_arm_takes():
    arms = [run.cfg.arm for run in expand(read_spec(SWEEPS / "every_arm.toml"))]
    assert {(a.intervention, a.control) for a in arms} == {
        (a, c) for a, cs in CONTROLS_OF.items() for c in cs
    }
    assert {getattr(a, "project", "gradient") for a in arms} == {"gradient", "update", "purge"}
    for arm, (option, signals) in SIGNALS.items():
        assert {getattr(a, option) for a in arms if a.intervention == arm} == set(signals)


def test_each_sampling_that_is_swept_is_there_with_its_controls_and_its_records(monkeypatch):
    monkeypatch.chdir(SWEEPS.parents[1])
    spec = read_spec(SWEEPS / "samplings.toml")
    runs = expand(spec)
    assert all(job.kept() for job in jobs_of(runs, spec.home, spec.limits, spec.keep))
    asked = {(r.cfg.basis.vhack_pairs_path, r.cfg.arm.control) for r in runs if r.cfg.arm.control != "haar"}
    files = sorted((SWEEPS.parent / "results" / "samplings").glob("9*.json"))
    sampled = {path: len(load_pairs(path).pairs) for path in files}
    assert sampled == {files[0]: 31, files[1]: 26}
    kept = [path.relative_to(SWEEPS.parents[1]) for path in files]
    controls = set(product(kept, ("none", "shuffled", "haar_matched")))
    assert asked == {(Path("nano"), "none"), *controls}
    assert {r.cfg.run.seed for r in runs} == set(range(41, 46)) and len(runs) == 40


def test_a_part_of_a_sweep_is_some_arms_and_seeds(here):
    (here / "s.toml").write_text(
        'preset = "nano"\n[grid]\nseed = "1-3"\n[[arms]]\nname = "a"\nlater = true\n'
        '[[arms]]\nname = "b"\noptions = {intervention = "none"}\ngrid = { seed = "1-5" }\ncontrols = "a"\n'
    )
    spec = read_spec(here / "s.toml")
    assert [(r.arm.name, r.cfg.run.seed) for r in expand(spec)] == [
        *(("b", seed) for seed in range(1, 6)),
        *(("a", seed) for seed in range(1, 4)),  # later
    ]
    part = expand(only(spec, ["b"], "2,9"))
    assert [(r.arm.name, r.cfg.run.seed) for r in part] == [("b", 2), ("b", 9)]
    assert expand(only(spec, [], "")) == expand(spec)
    with pytest.raises(UserError, match="--arms c: .*a, b"):
        only(spec, ["c"], "")


def test_options_of_the_command_line_stand_over_the_files_own(capsys):
    assert main(["sweep", str(SWEEPS / "every_arm.toml"), "--set", "steps=7", "model=nano", "--dry-run"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("projected-grpo train")]
    assert len(lines) > 30
    assert all("--steps=7" in line and "--model=nano" in line and "--group=4" in line for line in lines)
    assert main(["sweep", str(SWEEPS / "every_arm.toml"), "--set", "steps"]) == 2


def test_extract_gets_what_makes_the_basis_of_the_run():
    cfg = parse(["nano", "--intervention=erase", "--v-hack-extract-top-k=3", "--steps=2"])
    options = basis_options(cfg)
    assert "--model=nano" in options and "--v-hack-extract-top-k=3" in options
    assert "--vhack-pairs-path=nano" in options and not any("steps" in o for o in options)
    again = parse(["nano", "--intervention=erase", "--steps=2", *options])
    assert again == cfg


def test_a_sweep_for_a_larger_machine_is_shown_on_a_small_one(here, capsys):
    command = ["sweep", "--preset=nano", "--grid=seed=41", "--gpus=99"]
    assert main([*command, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("# not on this machine: --gpus 99: this machine has ") for line in lines)
    assert lines[-1].startswith("projected-grpo train nano")
    assert main(command) == 2 and "--gpus 99: this machine has" in capsys.readouterr().err


# Slots, locks, the pool


def test_slots_are_dealt_in_turn():
    assert deal(0, [0, 1, 2, 3], cores_each=2) == [Slot(frozenset({0, 1})), Slot(frozenset({2, 3}))]
    assert deal(2, [0, 1, 2, 3]) == [Slot(frozenset({0, 1})), Slot(frozenset({2, 3}))]
    assert [s.gpus for s in deal(0, [0, 1], ["4", "5", "7"], gpus_each=1)] == [("4",), ("5",), ("7",)]
    assert [s.gpus for s in deal(0, [0], ["4", "5", "7"], gpus_each=2)] == [("4", "5")]
    assert [s.cores for s in deal(3, [5])] == [frozenset({5})] * 3  # more runs than cores share them
    assert [s.gpus for s in deal(4, [0], ["a", "b"], gpus_each=1)] == [("a",), ("b",), ("a",), ("b",)]
    assert deal(1, [0])[0].gpus is None
    with pytest.raises(UserError, match="--gpus 2: this machine has 1"):
        deal(0, [0], ["0"], gpus_each=2)


def test_a_child_gets_its_cores_and_gpus_and_its_parent_keeps_its_own(tmp_path):
    core = min(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    show = "import os; print(sorted(os.sched_getaffinity(0)), os.environ['CUDA_VISIBLE_DEVICES'])"
    slot = Slot(frozenset({core}), ("3", "5"))
    with locked(tmp_path / "lock") as held:
        assert Children().run([sys.executable, "-c", show], tmp_path / "out", held, slot) == 0
    assert (tmp_path / "out").read_text() == f"[{core}] 3,5\n"
    assert os.sched_getaffinity(0) == before
    with pytest.raises(RuntimeError), pinned(frozenset({core})):
        raise RuntimeError
    assert os.sched_getaffinity(0) == before


def test_a_lock_stays_with_the_child_when_its_taker_is_gone(tmp_path):
    path = tmp_path / "lock"
    assert not is_locked(path)
    with locked(path) as held:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(held,))
        with locked(path) as second:
            assert second is None
    assert is_locked(path)
    child.communicate(b"\n")
    assert not is_locked(path)
    with locked(path) as held:
        assert held is not None


def test_a_pool_makes_everything_and_tells_what_failed():
    seen = []

    def odd_fails(n, slot):
        seen.append((n, slot))
        if n == 3:
            raise UserError("three")
        return "odd" if n % 2 else ""

    slots = [Slot(), Slot(gpus=("1",))]
    failed = run_pool(range(6), odd_fails, slots, Children(), name=str, desc="test")
    assert sorted(failed) == [1, 3, 5] and sorted(n for n, _ in seen) == list(range(6))
    assert {slot for _, slot in seen} <= set(slots)


def test_a_signal_that_does_not_wake_the_main_thread_ends_the_pool_too():
    children, told_to_end = Children(), []

    def signalled(item, slot):  # as the kernel may choose: the main thread goes on waiting
        time.sleep(0.3)  # by now it waits
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        deadline = time.monotonic() + 20
        while not children.ended and time.monotonic() < deadline:
            time.sleep(0.01)
        told_to_end.append(children.ended)
        return ""

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            run_pool([0], signalled, [Slot()], children, name=str, desc="test")
    finally:
        signal.signal(signal.SIGINT, before)
    assert told_to_end == [True]


# Making one run


def job(here, **limits):
    spec = Spec("t", "smoke", here / "t", (SweepArm(""),), {"steps": 2})
    (only,) = jobs_of(expand(spec), spec.home, SweepLimits(**limits))
    return only


def folder_of(job, number, *, saved=False, ended=False, finished=True):
    folder = Path(job.home) / "runs" / f"2026010{number}T000000_smoke_erase_seed41_{job.id}"
    (folder / "state").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    if saved:
        (folder / "state" / "state.safetensors").touch()
    if ended:
        figures = {"finished": finished, "hack_deploy": 0.5, "solve_deploy": 0.25, "seconds": 3.2, "steps": 2}
        (folder / "summary.json").write_text(json.dumps(fake_runs.summary(fake_runs.config()) | figures))
    return folder


def script(job, *codes):
    """A launch that ends with these codes in turn; a code of 0 leaves an outcome."""
    calls = []

    def launch(argv, output, held):
        calls.append(list(argv))
        code = codes[len(calls) - 1]
        if code in (0, 3):
            folder_of(job, len(calls), ended=True, finished=code == 0)
        elif code is not None:
            folder_of(job, len(calls), saved=code == 137)
        return code

    return launch, calls


def test_a_finished_run_is_not_made_again(here):
    one = job(here)
    launch, calls = script(one, 0)
    assert make(one, launch).kind == "done" and make(one, launch).kind == "done"
    assert len(calls) == 1 and calls[0][-1] == f"--out-tag=_{one.id}"
    (state,) = states([one])
    assert (state.state, state.steps, state.hack, state.solve, state.wall_s) == (
        "finished",
        2,
        0.5,
        0.25,
        3.2,
    )


def test_a_run_that_diverged_has_ended(here):
    one = job(here)
    assert make(one, script(one, 3)[0]).kind == "done"
    assert (states([one])[0].state, states([one])[0].note) == ("finished", "diverged")


def test_a_killed_run_goes_on_from_what_it_saved(here):
    one = job(here)
    launch, calls = script(one, 137, 0)
    assert make(one, launch).kind == "done"
    assert calls[1] == ["smoke", f"--resume={one.folders()[0]}"]
    assert states([one])[0].note == "attempt 2"


def test_retries_and_failures_are_capped(here):
    one = job(here, retries=2, max_failures=1)
    launch, calls = script(one, 1, 1, 1, 0)
    outcome = make(one, launch)
    assert (outcome.kind, outcome.exit_code, len(calls)) == ("failed", 1, 3)
    assert states([one])[0].state == "failed"
    assert failures_since(here / "t", 0.0) == 1
    assert make(one, launch).kind == "held back" and len(calls) == 3
    later = replace(one, submitted=time.time() + 1)  # asked for again: earlier failures are forgiven
    assert make(later, launch).kind == "done"
    assert failures_since(here / "t", 0.0) == 0


def test_bad_usage_is_not_tried_twice(here):
    one = job(here, retries=5)
    launch, calls = script(one, 2, 0)
    assert make(one, launch).kind == "failed" and len(calls) == 1


def test_a_run_that_is_told_to_stop_is_interrupted_and_not_failed(here):
    one = job(here)
    assert make(one, script(one, None)[0]).kind == "stopped"
    assert states([one])[0].state == "interrupted" and failures_since(here / "t", 0.0) == 0


def test_a_queues_signal_handler_ends_the_process_and_a_bad_command_line_does_not(here, monkeypatch):
    def leave(argv):
        sys.exit(255)

    one = job(here)
    monkeypatch.setattr("projected_grpo.train.main", leave)
    with pytest.raises(SystemExit):
        make(one, in_process)
    assert states([one])[0].state == "interrupted"
    monkeypatch.undo()
    assert in_process(["smoke", "--stepps=1"], here / "out", 0) == 2


def test_two_processes_do_not_make_one_run(here):
    one = job(here)
    launch, calls = script(one, 0)
    with locked(one.file(".lock")):
        assert states([one])[0].state == "running"
        outcome = make(one, launch, patience_s=0.0)
    assert (outcome.kind, outcome.exit_code, calls) == ("elsewhere", 0, [])
    assert states([one])[0].state == "to do"


def test_a_job_file_holds_all_that_another_machine_needs(here):
    one = job(here)
    path = write_job(one)
    assert read_job(path) == one
    path.write_text("{}")
    with pytest.raises(UserError, match="not a sweep's job file"):
        read_job(path)
