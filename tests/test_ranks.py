"""One run in several processes: the same as in one, whoever is killed, stopped or sees other files."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from fake_runs import few_pairs
from processes import HANGS, TORCHRUN, in_processes
from projected_grpo import ranks as ranks_module
from projected_grpo import step as step_module
from projected_grpo import train
from projected_grpo.antipasto import wrap
from projected_grpo.cli import main
from projected_grpo.config import LossConfig
from projected_grpo.errors import LOST, SIGNALLED, UserError
from projected_grpo.grpo import per_rollout_grads
from projected_grpo.ranks import ALONE, Ranks, by_source, join_ranks, own_share
from projected_grpo.rollout import Rollout
from projected_grpo.run import resume
from projected_grpo.run.checkpoint import state_paths

TIMINGS = {"gen", "fb", "t_rew", "sec"}
STEPS = 4
OPTIONS = (
    *("--n-problems=6", "--eval-n-prompts=2", "--max-new=8", "--workers=1", "--device=cpu", "--group=3"),
    *("--prompts-per-step=3", "--vhack-pairs-path=pairs.json", "--vhack-refresh-every=3"),
    *("--eval-ablate-every=3", "--save-every=2", f"--steps={STEPS}"),
)


# Shares


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(1, 6))
def test_shares_are_consecutive_whole_and_even(costs, size):
    shares = [Ranks(rank, size).share(costs) for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(len(costs)))
    for share in shares:
        own = sum(costs[i] for i in share)
        assert abs(own - sum(costs) / size) <= max(costs, default=0) or sum(costs) == 0


def test_gradients_of_the_shares_add_up_to_the_whole(small_model):
    """Per rollout and per source, in float64, for more processes than there are groups."""
    policy = wrap(small_model("qwen3"), None)
    generator = torch.Generator().manual_seed(3)

    def tokens(n):
        return tuple(torch.randint(48, (n,), generator=generator).tolist())

    prompts = [tokens(4), tokens(6)]
    rollouts = [Rollout(prompts[i // 4], tokens(3 + i % 3), "") for i in range(8)]
    is_teacher = torch.tensor([i % 4 == 3 for i in range(8)])
    advantage = torch.tensor([1.0, -0.5, 0.0, -0.5, 0.3, 0.2, -0.9, 0.4])
    parts = [2 * (i // 4) + int(teacher) for i, teacher in enumerate(is_teacher.tolist())]

    def grads(own, parts):
        return per_rollout_grads(policy, rollouts, own, LossConfig(), 8, with_reference=True, parts=parts)

    rows, whole = grads(advantage, None), grads(advantage, parts)
    for size in (2, 3, 5):
        owns = [own_share(Ranks(rank, size), rollouts, advantage) for rank in range(size)]
        assert torch.equal(torch.stack(owns).sum(0), advantage)
        each = [grads(own, None) for own in owns]
        summed = [by_source(grads(own, parts), is_teacher) for own in owns]
        for m in rows.rows:
            torch.testing.assert_close(sum(g.rows[m] for g in each), rows.rows[m])
            by_hand = torch.stack([rows.rows[m][~is_teacher].sum(0), rows.rows[m][is_teacher].sum(0)])
            torch.testing.assert_close(sum(g.rows[m] for g in summed), by_hand)
        assert is_teacher[summed[0].first].tolist() == [False, True]
        assert sum(g.loss for g in each) == pytest.approx(whole.loss)
        seen = torch.stack([~g.kl.isnan() for g in each]).sum(0)
        assert seen.tolist() == (advantage != 0).long().tolist()  # measured by exactly one


def test_alone_nothing_is_sent():
    value = torch.randn(3)
    assert ALONE.total(value) is value and ALONE.gather(1) == [1] and ALONE.from_first("x") == "x"
    assert ALONE.first and list(ALONE.share([1, 1])) == [0, 1]


class Told(Ranks):
    """A process that hears these messages from the others."""

    def gather(self, value):
        return [value, "no room"]


def test_an_error_of_one_is_an_error_of_all():
    with ALONE.together():
        pass
    with pytest.raises(UserError, match="^process 1: no room$"), Told(0, 2).together():
        pass
    with pytest.raises(UserError, match="^mine$"), Told(0, 2).together():
        raise UserError("mine")
    with pytest.raises(UserError, match="^mine$"), ALONE.together():
        raise UserError("mine")


# Joining


def test_only_torchrun_makes_a_process_one_of_several(monkeypatch):
    """Other launchers leave WORLD_SIZE behind as well, around runs that know nothing of each other."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "1")
    assert join_ranks("auto") == ALONE


def test_a_gpu_for_each_process_or_a_clear_line(monkeypatch):
    for name, value in zip(TORCHRUN, ("3", "3", "4", "4", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    with pytest.raises(UserError, match="--device cuda:1"):
        join_ranks("cuda:1")
    with pytest.raises(UserError, match="--device cuda:0,cuda:1: one model over several devices"):
        join_ranks("cuda:0,cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="4 processes but 2 GPUs"):
        join_ranks("auto")
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(ranks_module.dist, "is_initialized", lambda: True)
    assert join_ranks("auto") == Ranks(3, 4, 4) and chosen == [3]
    assert join_ranks("cpu") == Ranks(3, 4, 4) and chosen == [3]


# Whole runs


def command(tag, *options):
    return ["train", "smoke", *OPTIONS, f"--out-tag=_{tag}", *options]


def go_on(folder):
    return ["train", "smoke", f"--resume={folder}"]


def folder_of(tag):
    (folder,) = Path("out/runs").glob(f"*_{tag}")
    return folder.absolute()


@pytest.fixture(scope="module")
def home(tmp_path_factory, svd_cache):
    """The folder in which all runs of this module are made, and the current one."""
    folder = tmp_path_factory.mktemp("ranks")
    few_pairs(folder)
    (folder / "out").mkdir()
    (folder / "out" / "svd_cache").symlink_to(svd_cache)
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.fixture(scope="module")
def alone(home):
    """Each arm's run in one process."""
    for arm in ("none", "erase", "route2"):
        assert main(command(f"{arm}1", f"--intervention={arm}")) == 0
    return {arm: folder_of(f"{arm}1") for arm in ("none", "erase", "route2")}


def same_up_to_rounding(one, several):
    """The same rollouts, grades, counts and held-out rates; figures and adapter parameters alike.

    Tolerances: 1e-5 of a figure or 1e-7, whichever is more (1e-6 nats of `gap`, which is rounding itself on a
    CPU), and 1e-5 of the adapter parameters' norm.
    """
    rows = [[json.loads(line) for line in (f / "steps.jsonl").open()] for f in (one, several)]
    for a, b in zip(*rows, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - TIMINGS:
            figure = isinstance(a[name], float)
            least = 1e-6 if name == "gap" else 1e-7
            expected = pytest.approx(a[name], rel=1e-5, abs=least) if figure else a[name]
            assert b[name] == expected, (a["step"], name)
    for name in ("rollouts.jsonl", "deploy.json"):
        assert (one / name).read_bytes() == (several / name).read_bytes()
    adapter = [load_file(f / "train.safetensors") for f in (one, several)]
    assert adapter[0].keys() == adapter[1].keys()
    a, b = (torch.cat([found[name] for name in sorted(found)]) for found in adapter)
    assert a.norm() > 0 and (a - b).norm() < 1e-5 * a.norm()
    figures = [json.loads((f / "summary.json").read_text()) for f in (one, several)]
    assert figures[1]["finished"] and figures[1]["hack_rate"] == figures[0]["hack_rate"]
    assert not list(several.rglob(".*.tmp"))


def test_two_processes_make_the_run_that_one_makes(alone, home, monkeypatch):
    """They end with a line when one of them begins elsewhere, comes to hold another, or meets an error.

    An error in any of them is met by all, and the first one saves.
    """
    codes = {}

    def too_large(*_, **__):
        raise UserError("one rollout alone does not fit")

    def work(rank):
        def elsewhere(*_):
            return f"of {rank}"

        codes["none"] = main(command("none2", "--intervention=none"))
        codes["erase"] = main(command("erase2", "--intervention=erase"))
        real, resume.start_digest = resume.start_digest, elsewhere
        codes["begins elsewhere"] = main(command("elsewhere", "--intervention=none"))
        resume.start_digest = real
        with monkeypatch.context() as patched:
            patched.setattr(train, "adapter_digest", elsewhere)
            codes["other adapter parameters"] = main(command("parted", "--intervention=none"))
        at_step(2, lambda: rank == 1 and monkeypatch.setattr(step_module, "per_rollout_grads", too_large))
        codes["too large"] = main(command("large", "--intervention=none", "--save-every=0"))
        (home / f"codes{rank}.json").write_text(json.dumps(codes))
        return 0

    assert in_processes(2, work, "two.txt") == [0, 0], Path("two.txt").read_text()
    expected = {
        "none": 0,
        "erase": 0,
        "begins elsewhere": 2,
        "other adapter parameters": LOST,
        "too large": 2,
    }
    assert [json.loads(Path(f"codes{rank}.json").read_text()) for rank in (0, 1)] == [expected] * 2
    same_up_to_rounding(alone["none"], folder_of("none2"))
    same_up_to_rounding(alone["erase"], folder_of("erase2"))
    made = json.loads((folder_of("erase2") / "config.json").read_text())
    assert made["processes"] == 2
    said = Path("two.txt").read_text()
    assert "ended at step 1: process 1 no longer holds" in said
    assert "train smoke --resume" not in said  # nothing was saved by then
    assert "error: process 1: one rollout alone does not fit" in said  # by process 0
    assert [path.name for path in state_paths(folder_of("large"))] == ["state_step0002.safetensors"]
    assert said.count("HACK_RATE") == 2  # one process logs


def test_four_processes_make_the_run_that_one_makes(alone, unchecked):
    """More than there are prompts or held-out problems, so groups are split and some have nothing to ask."""
    assert (
        in_processes(4, lambda rank: main(command("route4", "--intervention=route2")), "four.txt") == [0] * 4
    )
    same_up_to_rounding(alone["route2"], folder_of("route4"))


def at_step(step, act):
    """From now on, `act` before this step."""
    real = train.train_step

    def train_step(exp, state):
        if state.step == step:
            act()
        return real(exp, state)

    train.train_step = train_step


def test_a_killed_process_ends_the_run_and_any_number_goes_on(alone, unchecked):
    """Two of which one dies in step 3; two that are told to stop in their first step; then one to the end."""

    def killed(rank):
        if rank == 1:
            at_step(3, lambda: os.kill(os.getpid(), signal.SIGKILL))
        return main(command("killed", "--intervention=route2"))

    assert in_processes(2, killed, "killed.txt") == [LOST, -signal.SIGKILL]
    folder = folder_of("killed")
    assert [path.name for path in state_paths(folder)] == ["state_step0002.safetensors"]
    assert f"train smoke --resume={folder.relative_to(Path.cwd())}" in Path("killed.txt").read_text()

    def stopped(rank):
        if rank == 1:
            at_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        return main(go_on(folder))

    assert in_processes(2, stopped, "stopped.txt") == [SIGNALLED + signal.SIGTERM] * 2
    assert state_paths(folder)[0].name == "state_step0003.safetensors"
    assert main(go_on(folder)) == 0
    same_up_to_rounding(alone["route2"], folder)
    made = json.loads((folder / "config.json").read_text())
    assert [each["processes"] for each in made["resumed"]] == [2, 1]


def test_torchrun_itself(alone):
    """The command of docs/sweeps.md, in two fresh processes."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run += ["-m", "projected_grpo.train", *command("torchrun", "--intervention=none")[1:]]
    unchecked = {**os.environ, "PROJECTED_GRPO_CHECK_SHAPES": ""}  # half of the time to import
    done = subprocess.run(run, capture_output=True, text=True, timeout=HANGS, env=unchecked, check=False)
    assert done.returncode == 0, done.stderr
    same_up_to_rounding(alone["none"], folder_of("torchrun"))
