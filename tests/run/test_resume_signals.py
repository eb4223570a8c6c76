"""Runs that are told to stop, or are in use by another process."""

import os
import signal
from contextlib import ExitStack

import pytest

from projected_grpo import train as train_module
from projected_grpo.cli import main
from projected_grpo.errors import SIGNALLED
from projected_grpo.run import stop as stopping
from projected_grpo.run.checkpoint import state_path, state_paths
from projected_grpo.runlog import lock_folder
from short_runs import command, folder_of, go_on, in_a_fork, lines, same_bytes

pytestmark = pytest.mark.usefixtures("unchecked")


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


def test_the_sigterm_of_a_sweep_that_ctrl_c_ended_is_no_second_one(monkeypatch):
    """Ctrl-C reaches a sweep and its runs; the sweep then ends its runs, which are saved."""
    clock = iter([100.0, 101.0, 102.0])
    raised = []
    monkeypatch.setattr(stopping.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(stopping.signal, "raise_signal", raised.append)
    with stopping.StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGINT and raised == []
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL, "the second Ctrl-C ends it"


def test_a_second_signal_ends_at_once(here, whole, monkeypatch):
    def twice(exp, state):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("still here")

    monkeypatch.setattr(train_module, "train_step", twice)
    status = in_a_fork(lambda: main(command("twice")))
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM


def test_a_run_in_use_is_refused(here, whole, capsys):
    with ExitStack() as stack:
        lock_folder(whole, stack, "test")
        capsys.readouterr()
        assert go_on(whole) == 2
        assert capsys.readouterr().err.count("\n") == 1
