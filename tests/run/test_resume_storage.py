"""Runs whose storage fails, and what a run keeps and never writes."""

import errno
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from projected_grpo import train as train_module
from projected_grpo.cli import main
from projected_grpo.errors import UNSAVED
from projected_grpo.evaluate import Rates
from projected_grpo.run import checkpoint, summary
from projected_grpo.run.checkpoint import state_path, state_paths
from short_runs import command, folder_of, go_on, same_bytes

pytestmark = pytest.mark.usefixtures("unchecked")


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


def test_the_two_newest_states_are_kept(here, whole):
    assert [p.name for p in state_paths(whole)] == [
        "state_step0006.safetensors",
        "state_step0004.safetensors",
    ]


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


def test_no_environment_variable_is_written(here, whole, monkeypatch, home):
    secret = "hunter2-5e1f0c-in-the-environment"
    monkeypatch.setenv("HF_TOKEN", secret)
    monkeypatch.setenv("ANY_OTHER_THING", secret)
    assert main(command("secret", "--steps=2")) == 0
    written = [p for p in (home / "out" / "runs").rglob("*") if p.is_file()]
    written += list((home / "logs").iterdir())
    assert len(written) > 20
    assert not [p for p in written if secret.encode() in p.read_bytes()]
