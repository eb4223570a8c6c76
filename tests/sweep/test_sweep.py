"""Sweeps: what a spec expands to, ids, who makes a run and when, each engine as far as it can be run here."""

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fake_runs
from arm_lists import CONTROLS_OF
from projected_grpo import config
from projected_grpo.cli import main
from projected_grpo.config import PRESETS
from projected_grpo.errors import UserError
from projected_grpo.pairs import load_pairs
from projected_grpo.sweep.jobs import failures_since, in_process, jobs_of, make, read_job, states, write_job
from projected_grpo.sweep.runner import Children, Slot, deal, is_locked, locked, pinned, run_pool
from projected_grpo.sweep.spec import (
    Limits,
    Spec,
    SweepArm,
    basis_options,
    expand,
    flags,
    identity,
    quick_spec,
    read_spec,
    seed_range,
)
from projected_grpo.train import parse
from projected_grpo.verbs import sweep as verbs_sweep

SWEEPS = Path(__file__).parents[2] / "docs" / "sweeps"
SMALL = "steps = {steps}\nn-problems = 6\neval-n-prompts = 2\nmax-new = 8\nworkers = 1\nsave-every = 1\n"
TINY = """
name = "four"
preset = "smoke"
[options]
{small}
[[arms]]
name = "none"
options = {{ intervention = "none" }}
why = "H4: does vanilla hack"
resolve = "if not, stop"
[[arms]]
name = "erase"
options = {{ intervention = "erase" }}
why = "H1"
[grid]
seed = "1-2"
"""


def spec_file(folder, steps=3, more=""):
    path = folder / "four.toml"
    path.write_text(TINY.format(small=SMALL.format(steps=steps)) + more)
    return path


@pytest.fixture
def here(tmp_path, monkeypatch, unchecked_children):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# What a sweep is


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
         r.cfg.arm.preserve_magnitude) for r in runs
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


def test_an_id_hangs_on_what_decides_the_outcome_and_on_nothing_else(monkeypatch):
    cfg = PRESETS["nano"][1]
    elsewhere = replace(
        cfg,
        run=replace(cfg.run, workers=7, threads=3, out_dir=Path("else"), save_every=3, out_tag="_x"),
        model=replace(cfg.model, device="cuda:1", svd_cache=None),
    )
    assert identity(elsewhere) == identity(cfg) and re.fullmatch("[0-9a-f]{10}", identity(cfg))
    others = [
        replace(cfg, run=replace(cfg.run, seed=42)),
        replace(cfg, optim=replace(cfg.optim, lr=0.03)),
        replace(cfg, arm=replace(cfg.arm, control="haar")),
        replace(cfg, preset="fast"),
        replace(cfg, problems=replace(cfg.problems, env_mode="sentinel")),
    ]
    assert len({identity(c) for c in [cfg, *others]}) == 1 + len(others)

    def with_a_new_option(cfg):
        found = config.settings(cfg)
        found["loss"]["invented_later"] = 0.5
        return found

    before = [identity(c) for c in [cfg, *others]]
    monkeypatch.setattr("projected_grpo.sweep.spec.settings", with_a_new_option)
    assert [identity(c) for c in [cfg, *others]] == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('preset = "nano"\ncolour = 1', "unknown key 'colour'"),
        ('preset = "huge"', "preset must be one of"),
        ('preset = "nano"\n[options]\nstepps = 3', "did you mean 'steps'"),
        ('preset = "nano"\n[options]\nout-dir = "x"', "sets out-dir itself"),
        ('preset = "nano"\n[options]\nsteps = "many"', "train does not take"),
        ('preset = "nano"\n[[arms]]\nname="a"\noptions={intervention="none", control="haar"}', "a: --con"),
        ('preset = "nano"\n[[arms]]\nname="a"\n[[arms]]\nname="a"', "two arms are called 'a'"),
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
    assert lines[0] == "# 8 of 8 runs to make" and len(lines) == 10
    spec = quick_spec(
        "nano", "quick", ("intervention=none,erase", "lr=1e-3,0.01", "seed=41-42"), ("steps=2",)
    )
    for run, line in zip(expand(spec), lines[2:], strict=True):
        words = shlex.split(line)
        assert words[:2] == ["projected-grpo", "train"]
        assert parse(words[2:-3]) == run.cfg and words[-1] == f"--out-tag=_{run.id}"
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
    assert {a.project for a in arms} == {"gradient", "update", "purge"}


def test_each_sampling_that_is_swept_is_there_with_its_controls():
    runs = expand(read_spec(SWEEPS / "samplings.toml"))
    asked = {(r.cfg.basis.vhack_pairs_path, r.cfg.arm.control) for r in runs if r.cfg.arm.control != "haar"}
    files = sorted((SWEEPS.parent / "results" / "samplings").glob("9*.json"))
    sampled = {path: len(load_pairs(path).pairs) for path in files}
    assert sampled == {files[0]: 31, files[1]: 26}
    kept = [path.relative_to(SWEEPS.parents[1]) for path in files]
    controls = set(product(kept, ("none", "shuffled", "haar_matched")))
    assert asked == {(Path("nano"), "none"), *controls}
    assert {r.cfg.run.seed for r in runs} == set(range(41, 46)) and len(runs) == 40


def test_options_of_the_command_line_stand_over_the_files_own(capsys):
    assert main(["sweep", str(SWEEPS / "every_arm.toml"), "--set", "steps=7", "model=nano", "--dry-run"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("projected-grpo train")]
    assert len(lines) == len(expand(read_spec(SWEEPS / "every_arm.toml")))
    assert all("--steps=7" in line and "--model=nano" in line and "--group=4" in line for line in lines)
    assert main(["sweep", str(SWEEPS / "every_arm.toml"), "--set", "steps"]) == 2


def test_extract_gets_what_makes_the_basis_of_the_run():
    cfg = parse(["nano", "--intervention=erase", "--v-hack-extract-top-k=3", "--steps=2"])
    options = basis_options(cfg)
    assert "--model=nano" in options and "--v-hack-extract-top-k=3" in options
    assert "--vhack-pairs-path=nano" in options and not any("steps" in o for o in options)
    again = parse(["nano", "--intervention=erase", "--steps=2", *options])
    assert again == cfg


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
    (only,) = jobs_of(expand(spec), spec.home, Limits(**limits))
    return only


def folder_of(job, number, *, saved=False, ended=False, finished=True):
    folder = Path(job.home) / "runs" / f"2026010{number}T000000_smoke_projected_seed41_{job.id}"
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


# The engines


def test_a_local_sweep_runs_is_killed_and_goes_on(here, capsys):
    path = spec_file(here, steps=20)
    command = [sys.executable, "-m", "projected_grpo.cli", "sweep", str(path), "--jobs=2", "--seeds=1"]
    jobs, saved = here / "out/sweeps/four/jobs", "out/sweeps/four/runs/*/state/*.safetensors"
    with ExitStack() as stack:
        sweep = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        stack.callback(sweep.wait)
        stack.callback(sweep.terminate)
        wait(lambda: list(here.glob(saved)))
        assert main(["sweep", "status", str(path), "--seeds=1"]) == 0
        assert "2 runs: 2 running" in capsys.readouterr().out
        assert main(["sweep", str(path), "--seeds=1", "--dry-run"]) == 0  # nothing for a second sweep to do
        assert "2 running" in capsys.readouterr().out
        sweep.send_signal(signal.SIGTERM)
        assert sweep.wait(600) != 0
    wait(lambda: not any(map(is_locked, jobs.glob("*.lock"))))
    begun = {state.parents[1].name[-10:] for state in here.glob(saved)}  # the other may not have come so far
    assert main(["sweep", "status", str(path), "--seeds=1"]) == 0
    assert "2 runs: 2 interrupted" in capsys.readouterr().out
    assert main(["sweep", str(path), "--jobs=2", "--seeds=1"]) == 0
    assert "2 runs: 2 finished" in capsys.readouterr().out
    assert begun
    for attempts in jobs.glob("*.jsonl"):
        commands = [row["command"] for row in map(json.loads, attempts.open()) if "command" in row]
        assert len(commands) == 2 and ("--resume=" in commands[1]) == (attempts.stem in begun)
    assert main(["results", "out/sweeps/four/runs"]) == 0
    assert capsys.readouterr().out.count("| smoke") == 2


def wait(holds, seconds=600):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def test_a_failure_stops_what_has_not_started(here, capsys):
    path = here / "bad.toml"
    path.write_text('preset = "smoke"\n[options]\nmodel = "/no/such/place"\n[grid]\nseed = "1-4"\n')
    assert main(["sweep", str(path), "--jobs=1", "--max-failures=1", "--retries=0"]) == 1
    out = capsys.readouterr().out
    assert "4 runs: 1 failed, 3 to do" in out and "3 runs were not started" in out
    assert "no such folder" in next((here / "out/sweeps/bad/jobs").glob("*.txt")).read_text()


FAKE_PUEUE = f"""#!{sys.executable}
import json, os, sys
words, log = sys.argv[1:], os.environ["FAKE_PUEUE"]
queue = {{"calls": [], "tasks": {{}}, "groups": {{"default": {{}}}}}}
if os.path.exists(log):
    queue = json.load(open(log))
queue["calls"].append(words)
if words == ["status", "--json"]:
    print(json.dumps({{k: queue[k] for k in ("tasks", "groups")}}))
elif words[:2] == ["group", "add"]:
    queue["groups"][words[2]] = {{}}
elif words[0] == "add":
    number = str(len(queue["tasks"]))
    label = words[words.index("--label") + 1]
    queue["tasks"][number] = {{"id": int(number), "label": label, "status": {{"Queued": {{}}}}}}
    print(number)
elif words[0] != "parallel":
    sys.exit("unrecognized subcommand")
json.dump(queue, open(log, "w"))
"""


@pytest.fixture
def pueue(here, monkeypatch):
    """A pueue that records how it was called, and answers as the real one is documented to."""
    (here / "bin").mkdir()
    (here / "bin" / "pueue").write_text(FAKE_PUEUE)
    (here / "bin" / "pueue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{here / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_PUEUE", str(here / "pueue.json"))
    return lambda: json.loads((here / "pueue.json").read_text())


def added(queue):
    """Label, dependencies and command of every task, as pueue's own parser would read them."""
    for words in queue["calls"]:
        if words[0] == "add":
            split = words.index("--")
            after = words.index("--after") if "--after" in words else split
            ids = words[after + 1 : split]
            assert all(i.isdigit() for i in ids) and len(words) == split + 2
            assert words[1:3] == ["--print-task-id", "--label"]
            yield words[3], [int(i) for i in ids], words[-1]


def test_pueue_gets_the_chain_with_its_gates(here, pueue, capsys):
    path = spec_file(here, more='[pueue]\ngroup = "gpu"\n')
    assert main(["sweep", str(path), "--engine=pueue", "--gates", "--jobs=1"]) == 0
    tasks = list(added(pueue()))
    calls = pueue()["calls"]
    assert calls[:3] == [["status", "--json"], ["group", "add", "gpu"], ["parallel", "1", "--group", "gpu"]]
    assert all(words[words.index("--group") + 1] == "gpu" for words in calls if words[0] == "add")
    names = [label.split(" [")[0] for label, _, _ in tasks]
    assert [n.split(" tiny")[0] for n in names[:3]] == ["extract", "gate A", "gate B: verify"]
    order = {name: i for i, name in enumerate(names)}
    after = {name: {names[i] for i in ids} for name, (_, ids, _) in zip(names, tasks, strict=True)}
    verify = names[2]
    for seed in ("seed=1", "seed=2"):
        assert after[f"smoke none {seed}"] == {verify}
        assert after[f"gate C none {seed}"] == {f"smoke none {seed}"}
        assert after[f"smoke erase {seed}"] == {verify, f"gate C none {seed}"}
        assert after[f"gate D erase {seed}"] == {f"smoke erase {seed}"}
    assert len(tasks) == 3 + 2 * 4 and all(order[b] < order[a] for a in after for b in after[a])
    (vanilla,) = (label for label, _, _ in tasks if label.startswith("smoke none seed=1"))
    assert vanilla.endswith("| why: H4: does vanilla hack | resolve: if not, stop")

    assert main(["sweep", str(path), "--engine=pueue", "--gates", "--jobs=1"]) == 0  # all of it is queued
    assert "0 tasks queued, 11 were" in capsys.readouterr().out and len(list(added(pueue()))) == 11


def test_pueues_tasks_do_what_they_say(here, pueue, capsys):
    """Each command through a shell, in the order of its dependencies, as pueue would."""
    path = spec_file(here, steps=2)
    assert main(["sweep", str(path), "--engine=pueue", "--gates", "--seeds=1"]) == 0
    results = {}
    for number, (label, after, command) in enumerate(added(pueue())):
        if any(results[i] for i in after):
            results[number] = "a dependency failed"
            continue
        results[number] = subprocess.run(command, shell=True).returncode
        if label.startswith("gate C"):
            assert results[number] == 1  # a random model does not hack
    assert list(results.values()) == [0, 0, 0, 0, 1, "a dependency failed", "a dependency failed"]
    main(["sweep", "status", str(path), "--seeds=1"])
    assert "2 runs: 1 finished, 1 to do" in capsys.readouterr().out


def test_gates_need_a_vanilla_to_stand_behind(here, pueue, capsys):
    (here / "s.toml").write_text('preset = "smoke"\n[[arms]]\nname="erase"\n[grid]\nseed = [1]\n')
    assert main(["sweep", "s.toml", "--engine=pueue", "--gates"]) == 2
    assert "intervention=none" in capsys.readouterr().err


def test_a_dry_run_of_pueue_is_a_script_that_queues_the_same(here, pueue, capsys):
    path = spec_file(here)
    assert main(["sweep", str(path), "--engine=pueue", "--gates", "--dry-run"]) == 0
    script = capsys.readouterr().out
    assert not (here / "pueue.json").exists()
    subprocess.run(["bash", "-euc", script], check=True)
    by_script = list(added(pueue()))
    (here / "pueue.json").unlink()
    assert main(["sweep", str(path), "--engine=pueue", "--gates"]) == 0
    assert list(added(pueue())) == by_script


def test_without_pueue_or_its_daemon_one_line_says_so(here, monkeypatch, pueue, capsys):
    path = spec_file(here)
    (here / "bin" / "pueue").write_text("#!/bin/sh\necho 'Failed to connect to daemon' >&2\nexit 1\n")
    assert main(["sweep", str(path), "--engine=pueue"]) == 2
    assert "Failed to connect to daemon; does pueued run?" in capsys.readouterr().err
    (here / "bin" / "pueue").unlink()
    assert main(["sweep", str(path), "--engine=pueue"]) == 2
    assert "pueue is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(("engine", "package"), [("slurm", "submitit"), ("ray", "ray")])
def test_a_missing_extra_is_named(here, monkeypatch, capsys, engine, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"projected_grpo.sweep.{engine}", raising=False)
    assert main(["sweep", str(spec_file(here)), f"--engine={engine}"]) == 2
    assert f"pip install 'projected_grpo[{engine}]'" in capsys.readouterr().err


@pytest.mark.skipif(not importlib.util.find_spec("submitit"), reason="needs the extra slurm")
def test_slurms_jobs_through_submitit_on_this_machine(here, capsys):
    path = spec_file(here, steps=2, more='[slurm]\ncluster = "local"\ntimeout_min = 20\n')
    assert main(["sweep", str(path), "--engine=slurm", "--seeds=1", "--dry-run"]) == 0
    assert "local array of 2" in capsys.readouterr().out
    assert main(["sweep", str(path), "--engine=slurm", "--seeds=1"]) == 0
    assert "2 runs: 2 finished" in capsys.readouterr().out


@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="needs the extra ray")
def test_a_local_ray_cluster_outlives_a_killed_worker(here, capsys):
    path = here / "four.toml"
    small = "steps = 24\nfinal-n-prompts = 8\nworkers = 1\nsave-every = 1\n"
    path.write_text(TINY.format(small=small).replace('"smoke"', '"nano"'))
    command = [sys.executable, "-m", "projected_grpo.cli", "sweep", str(path), "--engine=ray", "--jobs=2"]
    jobs = here / "out/sweeps/four/jobs"
    with ExitStack() as stack:
        sweep = subprocess.Popen(command)
        stack.callback(sweep.kill)
        wait(lambda: list(here.glob("out/sweeps/four/runs/*/state/*.safetensors")))
        saved = next(here.glob("out/sweeps/four/runs/*/state/*.safetensors")).parents[1].name[-10:]
        worker = json.loads((jobs / f"{saved}.jsonl").read_text().splitlines()[0])["pid"]
        os.kill(worker, signal.SIGKILL)
        assert sweep.wait(600) == 0
    assert main(["sweep", "status", str(path)]) == 0
    assert "4 runs: 4 finished" in capsys.readouterr().out
    commands = [r["command"] for r in map(json.loads, (jobs / f"{saved}.jsonl").open()) if "command" in r]
    assert len(commands) == 2 and "--resume=" in commands[1]


def test_every_engine_that_is_offered_has_a_module():
    for engine in ("local", "pueue"):
        module = verbs_sweep.engine_module(engine)
        assert callable(module.plan) and callable(module.start)
