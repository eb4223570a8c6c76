"""Short runs that something happens to, and the run that nothing happened to."""

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from projected_grpo import train as train_module
from projected_grpo.cli import main
from projected_grpo.run.checkpoint import state_path

TIMINGS = {"gen", "fb", "t_rew", "sec"}
STEPS = 6
OPTIONS = (
    *("--n-problems=6", "--eval-n-prompts=1", "--max-new=8", "--workers=1", "--device=cpu", "--group=3"),
    *("--vhack-pairs-path=pairs.json", "--vhack-refresh-every=5", "--eval-ablate-every=2", "--save-every=2"),
    *("--intervention=route2", f"--steps={STEPS}"),
)


def command(tag, *options):
    return ["train", "smoke", *OPTIONS, f"--out-tag=_{tag}", *options]


def folder_of(tag):
    (folder,) = Path("out/runs").glob(f"*_{tag}")
    return folder


def go_on(folder):
    return main(["train", "smoke", f"--resume={folder}"])


def cut_short(tag, steps, *options):
    """A run that is gone after this many steps, without a word; its folder."""

    class Gone(Exception):
        pass

    real = train_module.Run.write_step

    def write_step(self, record, rows, tokens):
        real(self, record, rows, tokens)
        if record["step"] == steps - 1:
            raise Gone

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Gone):
        patch.setattr(train_module.Run, "write_step", write_step)
        main(command(tag, *options))
    return folder_of(tag)


@contextmanager
def copied_after(into, *steps):
    """Copy a run's folder to into/STEPS each time so many steps are written: what a kill then would leave."""
    real = train_module.Run.write_step

    def write_step(self, record, rows, tokens):
        real(self, record, rows, tokens)
        if record["step"] + 1 in steps:
            shutil.copytree(self.folder, into / str(record["step"] + 1))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module.Run, "write_step", write_step)
        yield


def lines(folder, name="steps.jsonl"):
    """The objects of a run's file, without what a clock measured."""
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


def same_bytes(one, two):
    """Two runs wrote the same, timings aside."""
    assert json.dumps(lines(one)) == json.dumps(lines(two))
    assert (one / "rollouts.jsonl").read_bytes() == (two / "rollouts.jsonl").read_bytes()
    for name in ("train.safetensors", "best.safetensors", "deploy.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    a, b = (load_file(state_path(folder, STEPS)) for folder in (one, two))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    a, b = (json.loads((f / "summary.json").read_text()) | {"seconds": 0} for f in (one, two))
    assert a == b and a["finished"]
    assert not list(two.rglob(".*.tmp"))


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
