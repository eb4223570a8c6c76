"""Runs that are killed, signalled, starved of disk or given damaged files, and how they go on."""

import errno
import json
import os
import shutil
import signal
import subprocess
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fake_runs import few_pairs
from projected_grpo import experiment, runlog
from projected_grpo import train as train_module
from projected_grpo.cli import main
from projected_grpo.errors import DIVERGED, SIGNALLED, UNSAVED
from projected_grpo.evaluate import Rates
from projected_grpo.run import checkpoint, summary
from projected_grpo.run import stop as stopping
from projected_grpo.run.checkpoint import state_path, state_paths
from projected_grpo.runlog import lock_folder
from projected_grpo.sandbox.host import Limits, Sandbox

TIMINGS = {"gen", "fb", "t_rew", "sec"}
STEPS = 6
OPTIONS = (
    *("--n-problems=6", "--eval-n-prompts=1", "--max-new=8", "--workers=1", "--device=cpu", "--group=3"),
    *("--vhack-pairs-path=pairs.json", "--vhack-refresh-every=5", "--eval-ablate-every=2", "--save-every=2"),
    *("--intervention=route2", f"--steps={STEPS}", "--ref-every=0"),
)


@pytest.fixture(scope="module")
def home(tmp_path_factory, svd_cache):
    """A folder in which every run of this module finds its caches."""
    folder = tmp_path_factory.mktemp("home")
    few_pairs(folder)
    (folder / "out").mkdir()
    (folder / "out" / "svd_cache").symlink_to(svd_cache)
    return folder


@pytest.fixture
def here(home, monkeypatch):
    monkeypatch.chdir(home)


@pytest.fixture(scope="module")
def whole(home):
    """The run that nothing happened to."""
    before = Path.cwd()
    os.chdir(home)
    try:
        assert main(command("whole")) == 0
    finally:
        os.chdir(before)
    return folder_of("whole", home)


def command(tag, *options):
    return ["train", "smoke", *OPTIONS, f"--out-tag=_{tag}", *options]


def folder_of(tag, home=Path()):
    (folder,) = (home / "out" / "runs").glob(f"*_{tag}")
    return folder


def go_on(folder):
    return main(["train", "smoke", f"--resume={folder}"])


def cut_short(monkeypatch, tag, steps, *options):
    """A run that is gone after this many steps, without a word; its folder."""

    class Gone(Exception):
        pass

    real = train_module.Run.write_step

    def write_step(self, record, rows):
        real(self, record, rows)
        if record["step"] == steps - 1:
            raise Gone

    with monkeypatch.context() as patch, pytest.raises(Gone):
        patch.setattr(train_module.Run, "write_step", write_step)
        main(command(tag, *options))
    return folder_of(tag)


def lines(folder):
    rows = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    return [json.dumps({k: v for k, v in row.items() if k not in TIMINGS}) for row in rows]


def same_bytes(one, two):
    """Two runs wrote the same, timings aside."""
    assert lines(one) == lines(two)
    assert (one / "rollouts.jsonl").read_bytes() == (two / "rollouts.jsonl").read_bytes()
    for name in ("train.safetensors", "best.safetensors", "deploy.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    a, b = (load_file(state_path(folder, STEPS)) for folder in (one, two))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    a, b = (json.loads((f / "summary.json").read_text()) | {"seconds": 0} for f in (one, two))
    assert a == b and a["finished"]
    assert not list(two.rglob(".*.tmp"))


# Kills


def in_a_fork(work):
    """Do the work in a forked process; its wait status. The fork shares no open file with this process."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    code = 99
    try:
        os.dup2(os.open("fork.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        code = work()
    finally:
        os._exit(code)


def killed_at_fsync(tag, count, *, behind):
    """SIGKILL in the middle of writing: before or after the count-th fsync of the run's own folder."""
    real = os.fsync
    seen = 0

    def fsync(fd):
        nonlocal seen
        if f"_{tag}" not in os.readlink(f"/proc/self/fd/{fd}"):
            return real(fd)
        seen += 1
        if seen == count and not behind:
            os.kill(os.getpid(), signal.SIGKILL)
        real(fd)
        if seen == count and behind:
            os.kill(os.getpid(), signal.SIGKILL)
        return None

    runlog.os.fsync = fsync
    return main(command(tag))


@pytest.mark.parametrize(
    ("count", "behind"),
    # config.json 1-2; the evaluation's adapter 3-6; logs 7-8; the state of step 2: file 9, folder 10; ...
    [(9, False), (9, True), (10, False), (16, True), (18, False)],
)
def test_a_run_killed_while_it_writes_ends_as_if_it_had_not_been(here, whole, count, behind):
    tag = f"kill{count}{behind}"
    status = in_a_fork(partial(killed_at_fsync, tag, count, behind=behind))
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    folder = folder_of(tag)
    assert not (folder / "train.safetensors").exists()
    saved = state_paths(folder)
    assert main(command(tag, "--resume=auto")) == 0
    if saved:
        same_bytes(whole, folder_of(tag))
    else:  # then there was nothing to go on from, and it was begun anew
        assert len(list(Path("out/runs").glob(f"*_{tag}*"))) == 2
        (again,) = (f for f in Path("out/runs").glob(f"*_{tag}*") if f != folder)
        same_bytes(whole, again)


# --resume=auto


def test_auto_begins_goes_on_and_stays_done(here, whole, monkeypatch, capsys):
    folder = cut_short(monkeypatch, "auto", 3, "--resume=auto")
    assert main(command("auto", "--resume=auto")) == 0
    assert folder_of("auto") == folder
    same_bytes(whole, folder)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    capsys.readouterr()
    assert main(command("auto", "--resume=auto")) == 0
    assert f"{folder} has finished" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_auto_takes_no_run_of_other_settings(here, whole, monkeypatch):
    folder = cut_short(monkeypatch, "other", 3)
    before = (folder / "steps.jsonl").read_bytes()
    assert main(command("other", "--resume=auto", "--seed=9")) == 0
    assert (folder / "steps.jsonl").read_bytes() == before
    (again,) = (f for f in Path("out/runs").glob("*_other") if f != folder)
    assert "seed9" in again.name


def test_auto_takes_the_newest(here, whole, monkeypatch):
    folder = cut_short(monkeypatch, "newest", 3)
    later = folder.with_name("2999" + folder.name[4:])
    shutil.copytree(folder, later)
    shutil.copytree(folder, later.with_name(later.name + "-2"))
    assert main(command("newest", "--resume=auto")) == 0
    assert not (folder / "summary.json").exists() and not (later / "summary.json").exists()
    same_bytes(whole, later.with_name(later.name + "-2"))


def test_auto_says_that_a_run_diverged(here, whole, capsys):
    folder = folder_of("whole").with_name("20200101T000000_smoke_routing2_seed41_gone")
    shutil.copytree(whole, folder)
    made = json.loads((folder / "config.json").read_text())
    made["config"]["run"]["out_tag"] = "_gone"
    (folder / "config.json").write_text(json.dumps(made))
    (folder / "summary.json").write_text(json.dumps({"finished": False}))
    assert main(command("gone", "--resume=auto")) == DIVERGED
    assert "ended before its last step" in capsys.readouterr().err


def test_auto_passes_over_what_is_no_run(here, capsys):
    odd = Path("out/runs/19990101T000000_smoke_odd")
    odd.mkdir(parents=True)
    (odd / "config.json").write_text("{")
    try:
        assert main(command("passed", "--resume=auto", "--steps=1")) == 0
        assert "passed over" in capsys.readouterr().err
    finally:
        shutil.rmtree(odd)


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["term", "int"])
def test_a_signal_ends_the_run_after_its_step(here, whole, monkeypatch, number):
    real = train_module.train_step

    def signalled(exp, state):
        if state.step == 2:
            os.kill(os.getpid(), number)
        return real(exp, state)

    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    tag = f"signal{int(number)}"
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "train_step", signalled)
        assert main(command(tag)) == SIGNALLED + number
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    folder = folder_of(tag)
    assert len(lines(folder)) == 3 and state_paths(folder)[0] == state_path(folder, 3)
    assert not (folder / "summary.json").exists() and not (folder / "train.safetensors").exists()
    assert go_on(folder) == 0
    same_bytes(whole, folder)


def test_a_signal_that_is_passed_on_is_the_same_one(monkeypatch):
    """For some seconds; a later one ends the process."""
    raised, clock = [], iter([100.0, 103.0, 105.0])
    monkeypatch.setattr(stopping.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(stopping.signal, "raise_signal", raised.append)
    with stopping.StopSignal(echo_s=5.0) as stop:
        for ends in (False, False, True):
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.received == signal.SIGTERM
            assert (signal.getsignal(signal.SIGTERM) == signal.SIG_DFL) == ends
    assert raised == [signal.SIGTERM]


def test_a_second_signal_ends_at_once(here, whole, monkeypatch):
    def twice(exp, state):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("still here")

    monkeypatch.setattr(train_module, "train_step", twice)
    status = in_a_fork(lambda: main(command("twice")))
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM


# One process at a time


def test_a_run_in_use_is_refused(here, whole, capsys):
    with ExitStack() as stack:
        lock_folder(whole, stack, "test")
        capsys.readouterr()
        assert go_on(whole) == 2
        assert capsys.readouterr().err.count("\n") == 1


# Damaged files


def flip(path, where=0.5):
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 4
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink], ids=["flipped", "cut", "gone"])
def test_the_state_before_is_used_when_the_last_is_damaged(here, whole, monkeypatch, capsys, damage):
    tag = f"damaged{damage.__name__}"
    folder = cut_short(monkeypatch, tag, 5)
    assert state_paths(folder) == [state_path(folder, 4), state_path(folder, 2)]
    damage(state_path(folder, 4))
    capsys.readouterr()
    assert go_on(folder) == 0
    said = capsys.readouterr().err
    assert "at step 2" in said
    assert ("state_step0004" in said) == (damage is not Path.unlink)
    same_bytes(whole, folder)


def test_a_run_whose_states_are_all_damaged_is_refused(here, whole, monkeypatch, capsys):
    folder = cut_short(monkeypatch, "lost", 5)
    for path in state_paths(folder):
        flip(path)
    capsys.readouterr()
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert go_on(folder) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: --resume") and "state_step0004" in told and "state_step0002" in told
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_state_of_another_run_is_refused(here, whole, monkeypatch, capsys):
    folder = cut_short(monkeypatch, "foreign", 5, "--seed=7")
    shutil.copy(state_path(whole, 6), state_path(folder, 6))
    shutil.copy(state_path(whole, 4), state_path(folder, 2))
    assert go_on(folder) == 0
    said = capsys.readouterr().err
    assert "state_step0006.safetensors: of a run with other settings" in said and "at step 4" in said


def test_lines_that_a_state_stands_behind_must_be_there(here, whole, monkeypatch, capsys):
    folder = cut_short(monkeypatch, "log", 5)
    text = (folder / "steps.jsonl").read_text().splitlines(keepends=True)
    (folder / "steps.jsonl").write_text("".join(text[:3]))  # as a power cut could leave it
    assert go_on(folder) == 0
    said = capsys.readouterr().err
    assert "steps.jsonl has lost lines" in said and "at step 2" in said
    same_bytes(whole, folder)


def test_a_changed_line_is_found(here, whole, monkeypatch, capsys):
    folder = cut_short(monkeypatch, "changed", 5)
    flip(folder / "rollouts.jsonl", 0.01)
    assert go_on(folder) == 2
    assert "rollouts.jsonl no longer holds" in capsys.readouterr().err


def test_a_run_whose_pairs_changed_is_refused(here, whole, home, monkeypatch, capsys):
    folder = cut_short(monkeypatch, "otherpairs", 3)
    kept = (home / "pairs.json").read_text()
    changed = json.loads(kept)
    changed["pairs"][0]["hack"] += "\n# changed"
    try:
        (home / "pairs.json").write_text(json.dumps(changed))
        assert go_on(folder) == 2
    finally:
        (home / "pairs.json").write_text(kept)
        made = {path: path.stat().st_mtime_ns for path in (home / "out" / "vhack").iterdir()}
        if len(made) > 1:
            max(made, key=made.__getitem__).unlink()  # the basis of the changed pairs
    assert "the pairs of" in capsys.readouterr().err
    assert go_on(folder) == 0


def test_a_run_whose_problems_changed_is_refused(here, whole, monkeypatch, capsys):
    folder = cut_short(monkeypatch, "otherdata", 3)
    real = experiment.read_data

    def read_data(cfg, grader):
        data = real(cfg, grader)
        return replace(data, train=(replace(data.train[0], canonical="pass"), *data.train[1:]))

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "read_data", read_data)
        assert go_on(folder) == 2
    assert "the problems or the pool of" in capsys.readouterr().err


def test_results_of_an_early_end_do_not_outlive_the_run_that_goes_on(here, whole, monkeypatch):
    folder = cut_short(monkeypatch, "outlived", 5)
    shutil.copy(whole / "summary.json", folder)  # as a divergence leaves it
    (folder / "summary.json").write_text(json.dumps({"finished": False}))

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_module, "train_step", stop)
        go_on(folder)
    assert not (folder / "summary.json").exists()
    assert go_on(folder) == 0
    same_bytes(folder, whole)


def test_a_damaged_basis_is_extracted_again_where_nobody_named_it(here, whole, capsys):
    (basis,) = Path("out/vhack").glob("*.safetensors")
    intact = basis.read_bytes()
    flip(basis, 0.9)
    assert main(command("named", f"--v-hack-path={basis}")) == 2
    assert "checksum" in capsys.readouterr().err and not list(Path("out/runs").glob("*_named"))
    assert main(command("derived")) == 0
    assert "extracting again" in capsys.readouterr().err
    assert basis.read_bytes() == intact
    same_bytes(whole, folder_of("derived"))


# Storage


def failing(patch, module, when, code=errno.ENOSPC):
    """Let writes of paths for which `when` holds fail; returns the list of those that did."""
    real, failed = module.write_atomically, []

    def write(path, data):
        if when(path):
            failed.append(path)
            raise OSError(code, os.strerror(code), str(path))
        real(path, data)

    patch.setattr(module, "write_atomically", write)
    return failed


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS], ids=["full", "read-only"])
def test_a_save_that_fails_is_tried_again(here, whole, monkeypatch, capsys, code):
    tag = f"storage{code}"
    with monkeypatch.context() as patch:
        failed = failing(
            patch, checkpoint, lambda p: p.parent.name == "state" and "step0006" not in p.name, code
        )
        assert main(command(tag)) == 0
    folder = folder_of(tag)
    assert failed == [state_path(folder, step) for step in (2, 3, 4, 5)]  # at each step until it works
    said = [line for line in capsys.readouterr().err.splitlines() if "not saved" in line]
    assert len(said) == 4 and all(os.strerror(code) in line for line in said)
    same_bytes(whole, folder)


def test_a_run_whose_last_save_fails_says_so_and_keeps_the_one_before(here, whole, monkeypatch):
    with monkeypatch.context() as patch:
        failing(patch, checkpoint, lambda p: "step0006" in p.name)
        assert main(command("end")) == UNSAVED
    folder = folder_of("end")
    assert state_paths(folder)[0] == state_path(folder, 4)
    assert not (folder / "train.safetensors").exists()
    assert go_on(folder) == 0
    same_bytes(whole, folder)


def test_results_that_the_disk_does_not_take_can_be_written_later(here, whole, monkeypatch):
    def full(path, value):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(summary, "write_json", full)
        assert main(command("late")) == UNSAVED
    folder = folder_of("late")
    assert not (folder / "summary.json").exists()
    assert go_on(folder) == 0
    same_bytes(whole, folder)


def test_states_are_kept_as_many_as_asked_for(here, whole):
    assert [p.name for p in state_paths(whole)] == [
        "state_step0006.safetensors",
        "state_step0004.safetensors",
    ]
    assert main(command("one", "--keep-states=1", "--save-every=1", "--steps=3")) == 0
    assert [p.name for p in state_paths(folder_of("one"))] == ["state_step0003.safetensors"]


def test_the_best_adapter_is_kept(here, monkeypatch):
    """The first of the highest solve - hack."""
    rates = iter([Rates(1, 2, 4), Rates(0, 2, 4), Rates(2, 4, 4), Rates(4, 0, 4), Rates(0, 0, 4)])
    real = train_module.evaluate_held_out

    def rated(*arguments, **options):
        found = real(*arguments, **options)
        value = next(rates, None)
        return found if value is None else _Rated(value)

    monkeypatch.setattr(train_module, "evaluate_held_out", rated)
    assert main(command("best", "--eval-ablate-every=1", "--steps=5")) == 0
    folder = folder_of("best")
    with safe_open(folder / "best.safetensors", framework="pt") as file:
        meta = json.loads(file.metadata()["projected_grpo"])
    assert (meta["step"], meta["hack_deploy"], meta["solve_deploy"]) == (2, 0.0, 0.5)
    best, then = load_file(folder / "best.safetensors"), load_file(folder / "ckpt_step0002.safetensors")
    assert best.keys() == then.keys() and all(torch.equal(best[n], then[n]) for n in best)


class _Rated:
    def __init__(self, value):
        self.value = value

    def rates(self):
        return self.value


# Graders


def interpreters():
    """Process ids of this process's sandbox interpreters."""
    found = subprocess.run(
        ["pgrep", "-P", str(os.getpid()), "-f", "sandbox/child"], capture_output=True, text=True
    )
    return [int(pid) for pid in found.stdout.split()]


def meanwhile(patch, step, action):
    """Do something to the interpreters just before a step."""
    real = train_module.train_step
    met = []

    def disturbed(exp, state):
        if state.step == step:
            met.extend(interpreters())
            for pid in met:
                os.kill(pid, action)
        return real(exp, state)

    patch.setattr(train_module, "train_step", disturbed)
    return met


def test_a_killed_grader_changes_nothing(here, whole, monkeypatch):
    with monkeypatch.context() as patch:
        met = meanwhile(patch, 2, signal.SIGKILL)
        assert main(command("graderkilled")) == 0
    assert len(met) == 1
    same_bytes(whole, folder_of("graderkilled"))


def test_a_hung_grader_costs_its_answer_and_no_more(here, monkeypatch):
    """The response it was at is graded as failed, a fresh interpreter takes the rest."""
    limited = replace(Limits(), wall_s=2.0)
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "Sandbox", partial(Sandbox, limits=limited))
        patch.setattr("projected_grpo.sandbox.host.GRACE_S", 0.5)
        met = meanwhile(patch, 1, signal.SIGSTOP)
        assert main(command("graderhung", "--steps=3")) == 0
    assert len(met) == 1 and len(lines(folder_of("graderhung"))) == 3
    assert not Path(f"/proc/{met[0]}").exists()


# What must not be written


def test_no_environment_variable_is_written(here, whole, monkeypatch, home):
    secret = "hunter2-5e1f0c-in-the-environment"
    monkeypatch.setenv("HF_TOKEN", secret)
    monkeypatch.setenv("ANY_OTHER_THING", secret)
    assert main(command("secret", "--steps=2")) == 0
    written = [p for p in (home / "out" / "runs").rglob("*") if p.is_file()]
    written += list((home / "logs").iterdir())
    assert len(written) > 20
    assert not [p for p in written if secret.encode() in p.read_bytes()]
