"""Each engine of a sweep as far as it can be run here: local, Slurm's and Ray's stand-ins on this machine."""

import importlib.util
import json
import math
import os
import signal
import sys

import pytest

from projected_grpo.cli import main
from projected_grpo.sweep.jobs import is_locked
from projected_grpo.verbs import sweep as verbs_sweep
from small_sweeps import in_a_fork, spec_file, wait


@pytest.fixture
def here(tmp_path, monkeypatch, unchecked_children):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_local_sweep_runs_is_killed_and_goes_on(here, capsys):
    path = spec_file(here, steps=20, more="[limits]\njobs = 2\n")
    command = ("sweep", str(path), "--seeds=1", "--keep=kept")
    jobs, saved = here / "out/sweeps/four/jobs", "out/sweeps/four/runs/*/state/*.safetensors"
    with in_a_fork(*command) as sweep:
        wait(lambda: list(here.glob(saved)))
        assert main(["sweep", "status", *command[1:]]) == 0
        assert "2 runs: 2 running" in capsys.readouterr().out
        assert main([*command, "--dry-run"]) == 0  # nothing for a second sweep to do
        assert "2 running" in capsys.readouterr().out
        os.kill(sweep, signal.SIGTERM)
    wait(lambda: not any(map(is_locked, jobs.glob("*.lock"))))
    begun = {state.parents[1].name[-10:] for state in here.glob(saved)}  # the other may not have come so far
    assert main(["sweep", "status", *command[1:]]) == 0
    assert "2 runs: 2 interrupted" in capsys.readouterr().out
    assert begun and not (here / "kept").exists()
    assert main([*command]) == 0
    assert "2 runs: 2 finished" in capsys.readouterr().out
    for attempts in jobs.glob("*.jsonl"):
        commands = [row["command"] for row in map(json.loads, attempts.open()) if "command" in row]
        assert len(commands) == 2 and ("--resume=" in commands[1]) == (attempts.stem in begun)
    assert main(["results", "out/sweeps/four/runs", "--format=json"]) == 0
    of_folders = json.loads(capsys.readouterr().out)
    assert main(["results", "kept", "--format=json"]) == 0  # records say what the folders say
    assert same_figures(of_folders, json.loads(capsys.readouterr().out))


def same_figures(one, two):
    """Of two documents of `results`; records round to four digits and keep some columns of the steps."""
    pairs = zip(one["estimates"], two["estimates"], strict=True)
    kept = [(a, b) for a, b in pairs if a["metric"] not in ("KL", "|g|")]
    return bool(kept) and all(
        (a["arm"], a["metric"], a["seeds"]) == (b["arm"], b["metric"], b["seeds"])
        and (a["mean"] is b["mean"] is None or math.isclose(a["mean"], b["mean"], rel_tol=1e-3, abs_tol=1e-9))
        for a, b in kept
    )


def test_a_failure_stops_what_has_not_started(here, capsys):
    path = here / "bad.toml"
    path.write_text('preset = "smoke"\n[options]\nmodel = "/no/such/place"\n[grid]\nseed = "1-4"\n')
    assert main(["sweep", str(path), "--jobs=1", "--max-failures=1", "--retries=0"]) == 1
    out = capsys.readouterr().out
    assert "4 runs: 1 failed, 3 to do" in out and "3 runs were not started" in out
    assert "no such folder" in next((here / "out/sweeps/bad/jobs").glob("*.txt")).read_text()


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
    small = "steps = {steps}\nfinal-n-prompts = 8\nworkers = 1\nsave-every = 1\n"
    path = spec_file(here, steps=24, preset="nano", options=small)
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
