"""Runs whose process, or whose grader's, is killed or stopped in the middle."""

import os
import signal
import subprocess
from functools import partial
from pathlib import Path

import pytest

from projected_grpo import runlog
from projected_grpo import train as train_module
from projected_grpo.cli import main
from projected_grpo.run.checkpoint import state_paths
from short_runs import command, folder_of, in_a_fork, lines, same_bytes

pytestmark = pytest.mark.usefixtures("unchecked")


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
    with monkeypatch.context() as patch:
        patch.setattr("projected_grpo.sandbox.host.GRACE_S", 0.5)
        met = meanwhile(patch, 1, signal.SIGSTOP)
        assert main(command("graderhung", "--steps=3", "--cpu-seconds=2", "--wall-seconds=2")) == 0
    assert len(met) == 1 and len(lines(folder_of("graderhung"))) == 3
    assert not Path(f"/proc/{met[0]}").exists()
