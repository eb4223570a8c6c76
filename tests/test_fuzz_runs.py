"""Files of runs, studies and sweeps, damaged at random: read, or refused in one line that names one.

The usual budget is small; PROJECTED_GRPO_FUZZ=5000 makes it a campaign of that many examples a format.
"""

import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fake_runs import a_step, config, made, summary
from fuzzing import FUZZ, altered, damaged, jsonl, read_or_refuse
from projected_grpo.antipasto import wrap
from projected_grpo.config import to_json
from projected_grpo.proj import HackBasis
from projected_grpo.results.files import read_heldout
from projected_grpo.results.pictures import heldout_files, series
from projected_grpo.results.plots import COSINES
from projected_grpo.results.report import report_page
from projected_grpo.results.runs import finished, grouped, read_runs
from projected_grpo.results.statistics import by_arm, shares, where_measured
from projected_grpo.run.checkpoint import save_state, state_path
from projected_grpo.run.folder import Run
from projected_grpo.run.identity import chosen, identity
from projected_grpo.run.resume import newest_run, newest_state, read_settings
from projected_grpo.runlog import write_json
from projected_grpo.study.report import (
    arms_table,
    emergence_table,
    headline_table,
    leave_out_table,
    modes_table,
)
from projected_grpo.study.verdicts import verdicts
from projected_grpo.sweep.gates import check_gate
from projected_grpo.sweep.jobs import Job, failures_since, read_job, states, status_table
from projected_grpo.sweep.keep import LATER, SERIES, read_record
from projected_grpo.sweep.spec import expand, read_spec
from projected_grpo.tensor_files import compute_svd, load_svd
from projected_grpo.verbs.results import ResultsOptions, falsify_text, tables_text

# Run folders


WHOLE = {
    "summary.json": summary(config(), modes=("run_tests", "sentinel")),
    "config.json": {"config": to_json(config()), "git_commit": "abc"},
}
STEPS = [a_step(i, cos_post=0.1, zerovar=0, hack_deploy=None if i else 0.5) for i in range(6)]
ROLLOUTS = [
    {"step": i, "p_idx": 0, "gi": 0, "problem_id": "1", "env_mode": "run_tests", "prompt": "Go", "text": "x"}
    | {"reward": 3.5, "exploited": True, "hacked_C": True}
    for i in range(3)
]


def write_run(folder, data):
    """A run folder, one of its files damaged or altered."""
    shutil.rmtree(folder, ignore_errors=True)
    run = made(folder, "20260101T000000_smoke_x")
    documents = {**WHOLE, "steps.jsonl": STEPS, "rollouts.jsonl": ROLLOUTS}
    hurt = data.draw(st.sampled_from(sorted(documents)))
    for name, document in documents.items():
        value = data.draw(altered(document)) if name == hurt and data.draw(st.booleans()) else document
        rows = value if isinstance(value, list) else [value]
        text = jsonl(rows) if name.endswith("l") else json.dumps(value).encode()
        (run / name).write_bytes(data.draw(damaged(text)) if name == hurt and value is document else text)
    return run


def read_everything(folder):
    """What the verbs over runs make of a folder; of pictures the numbers that go into them."""
    groups = grouped(finished(read_runs([folder])))
    tables_text(groups, ResultsOptions())
    falsify_text(groups, "json")
    for seeds in groups.values():
        for run in seeds.values():
            shares(run.values("hack_s")), where_measured(run.values("hack_deploy"))
        for column in COSINES:
            series("", seeds.values(), column)
        heldout_files(seeds.values())


@given(data=st.data())
@FUZZ
def test_folders_of_finished_runs(tmp_path, data):
    run = write_run(tmp_path / "runs", data)
    read_or_refuse(tmp_path, lambda: read_everything(tmp_path / "runs"))
    read_or_refuse(tmp_path, lambda: report_page(read_runs([run]), most=2))
    read_or_refuse(tmp_path, lambda: check_gate("C", [run]))


@pytest.fixture(scope="module")
def saved(small_model, tmp_path_factory):
    """The files of a run that was saved after its last step, by their names."""
    folder = tmp_path_factory.mktemp("saved")
    cfg, policy = config(), wrap(small_model("qwen3", torch.float32), None)
    run = Run(cfg, folder)
    run.logs["steps"].append(STEPS)
    run.logs["rollouts"].append(ROLLOUTS)
    V = {m: torch.eye(r)[:2].contiguous() for m, r in policy.ranks.items()}
    basis = HackBasis(V, {m: axes[0].clone() for m, axes in V.items()})
    facts = {"settings": chosen(cfg), "logs": {name: log.mark() for name, log in run.logs.items()}}
    adam = torch.optim.AdamW([layer.delta_s for layer in policy.layers.values()])
    save_state(state_path(folder, len(STEPS)), policy, adam, basis, None, facts)
    write_json(folder / "config.json", {"run_id": "x", "config": to_json(cfg)})
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@given(data=st.data())
@FUZZ
def test_folders_to_go_on_with(tmp_path, saved, data):
    folder = tmp_path / "runs" / "20260101T000000_smoke_x"
    hurt = data.draw(st.sampled_from(["", *sorted(saved)]))  # or none
    for name, content in saved.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data.draw(damaged(content)) if name == hurt else content)
    here = replace(config(), run=replace(config().run, out_dir=tmp_path))
    read_or_refuse(tmp_path, lambda: newest_run(here))
    found = []
    read_or_refuse(tmp_path, lambda: found.append(newest_state(Run(read_settings(folder), folder))))
    if hurt == "":
        assert found and found[0].path == state_path(folder, len(STEPS))


HELD_OUT = {"cosines": [0.5, -0.25], "fraction_positive": 0.5, "mean": 0.125, "by_module": {"m": 0.5}}


@given(held_out=altered(HELD_OUT), data=st.data())
@FUZZ
def test_checks_of_held_out_pairs(tmp_path, held_out, data):
    path = tmp_path / "x.heldout.json"
    text = json.dumps(held_out).encode()
    path.write_bytes(data.draw(damaged(text)) if data.draw(st.booleans()) else text)
    read_or_refuse(tmp_path, lambda: check_gate("B", [path]))
    read_or_refuse(tmp_path, lambda: read_heldout(path, "plot"))


# Studies


def record(arm):
    """A study's record of a run of nano's size."""
    body = summary(config(), modes=("run_tests", "sentinel"))
    split = {**body["by_mode"]["run_tests"], "by_mode": body["by_mode"]}
    splits = {"held-out instances": split, "held-out templates": split}
    return {
        **{"arm": arm, "seed": 41, "git_commit": "abc", "wall_s": 100.0, "data": "d"},
        **{"summary": body | {"by_split": splits}, "config": to_json(config())},
        "steps": {name: [row.get(name) for row in STEPS] for name in (*SERIES, *LATER)},
    }


@given(data=st.data())
@FUZZ
def test_records_of_a_study(tmp_path, data):
    kept, here = [], identity(config())
    for arm in ("none", "gt_only", "erase"):
        path, good = tmp_path / f"{arm}_seed41.json", record(arm)
        hurt = data.draw(altered(good)) if arm != "gt_only" else good
        text = json.dumps(hurt).encode()
        path.write_bytes(data.draw(damaged(text)) if arm == "erase" and hurt == good else text)
        kept.append(path)

    def read():
        arms = by_arm([read_record(path, here, ["smoke", "--intervention=route2"], "d") for path in kept])
        for table in (emergence_table, headline_table, arms_table, leave_out_table, modes_table):
            table(arms)
        verdicts(arms, {"hack": 0.1, "solve": 0.4})

    read_or_refuse(tmp_path, read)
    read_or_refuse(tmp_path, lambda: read_everything(tmp_path))


# Sweeps


SPEC = {
    "name": "s",
    "preset": "smoke",
    "options": {"steps": 3, "model": "tiny-random"},
    "arms": [
        {"name": "none", "options": {"intervention": "none"}},
        {"name": "erase", "options": {"intervention": "erase"}, "grid": {"v-hack-k": [1, 2]}},
    ],
    "grid": {"seed": [41, 42]},
    "limits": {"retries": 1},
    "engine": "slurm",
    "slurm": {"partition": "gpu", "gpus": 1},
}


def toml(value):
    """A value as TOML writes it inline; what TOML has no word for becomes text."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(str(value) if value is None else value)


@given(spec=altered(SPEC), data=st.data())
@FUZZ
def test_sweep_files(tmp_path, capsys, spec, data):
    spec = spec if isinstance(spec, dict) else {"name": spec}
    text = "".join(f"{json.dumps(key)} = {toml(value)}\n" for key, value in spec.items())
    text = text.encode(errors="surrogatepass")
    path = tmp_path / "sweep.toml"
    path.write_bytes(data.draw(damaged(text)) if data.draw(st.booleans()) else text)
    read_or_refuse(tmp_path, lambda: expand(read_spec(path)))


JOB = asdict(Job("0123456789", "erase seed=41", ("smoke",), 6, "home", "cwd", 1, 0, 1.0))
ATTEMPTS = [{"at": 1.0, "command": "train"}, {"at": 2.0, "failed": "exit 1"}]


@given(data=st.data())
@FUZZ
def test_what_a_sweep_keeps_of_its_runs(tmp_path, data):
    home = tmp_path / "home"
    shutil.rmtree(home, ignore_errors=True)
    job = Job(**{**JOB, "home": str(home), "argv": ("smoke",)})
    job.file("").parent.mkdir(parents=True)
    run = write_run(home / "runs", data)
    if data.draw(st.booleans()):  # under way
        (run / "summary.json").unlink()
    run.rename(home / "runs" / f"20260101T000000_smoke_{job.id}")
    attempts = data.draw(altered(ATTEMPTS))
    job.file(".jsonl").write_bytes(jsonl(attempts if isinstance(attempts, list) else [attempts]))
    text = json.dumps(data.draw(altered(JOB))).encode()
    job.file(".json").write_bytes(data.draw(damaged(text)) if data.draw(st.booleans()) else text)
    read_or_refuse(tmp_path, lambda: status_table(states([job])))
    read_or_refuse(tmp_path, lambda: failures_since(home, 0.0))
    read_or_refuse(tmp_path, lambda: read_job(job.file(".json")))


# The cache of decompositions


@pytest.fixture(scope="module")
def decomposed(tmp_path_factory):
    """A weight, its decomposition, and the cache's file of it."""
    folder = tmp_path_factory.mktemp("svd")
    W = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    load_svd(W, folder)
    (path,) = folder.iterdir()
    return W, compute_svd(W), path.name, path.read_bytes()


@given(data=st.data())
@FUZZ
def test_a_damaged_decomposition_is_made_again(tmp_path, decomposed, data):
    W, svd, name, good = decomposed
    (tmp_path / name).write_bytes(data.draw(damaged(good)))
    found = load_svd(W, tmp_path)
    for part in ("U", "S", "Vh"):
        assert torch.equal(getattr(found, part), getattr(svd, part))
