"""--live trackio: its calls, against a small stand-in, and what the real package keeps of them."""

import importlib
import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import ModuleType

import pytest

from projected_grpo.config import PRESETS
from projected_grpo.run.folder import Run
from projected_grpo.runlog import append_jsonl, write_json

SMOKE = PRESETS["smoke"][1]
NAME = "20270101-000000_smoke_erase_seed41"
SHOWN = ["problem_id", "env_mode", "reward", "gt_correct", "exploited", "text"]


def a_step(step):
    return {"step": step, "hack_s": [step, 4], "kl": None, "gn": 0.5}


def rollouts_of(step, count=40):
    return [
        {"step": step, "problem_id": f"p{i}", "env_mode": "sentinel", "text": f"<b>{step}.{i}</b>"}
        | {"reward": 0.5, "gt_correct": False, "exploited": i == 0, "prompt": "not shown"}
        for i in range(count)
    ]


def a_run(folder, before=0):
    """A run's folder as it is when the view begins, with steps made before."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", {"config": {"preset": "smoke", "optim": {"lr": 0.5}}})
    for step in range(before):
        append_jsonl(folder / "steps.jsonl", [a_step(step)])
        append_jsonl(folder / "rollouts.jsonl", rollouts_of(step))
    return folder


# The calls


@dataclass
class Kept:
    """A run as the stand-in keeps it."""

    name: str
    config: dict
    logged: list = field(default_factory=list)
    finished: bool = False
    deleted: bool = False

    def log(self, metrics, step):
        self.logged.append((step, metrics))

    def delete(self):
        self.deleted = True


@pytest.fixture
def trackio(monkeypatch):
    """A stand-in with the names that are used."""
    module = ModuleType("trackio")
    module.kept = []

    def init(project, *, name, config, embed, auto_log_gpu, auto_log_cpu):
        assert project == "projected_grpo" and not (embed or auto_log_gpu or auto_log_cpu)
        print("noise")
        module.kept.append(Kept(name, config))
        return module.kept[-1]

    def finish():
        print("noise")
        module.kept[-1].finished = True

    class Api:
        def runs(self, project):
            if not module.kept:
                raise ValueError("no such project")
            return module.kept

    module.init, module.finish, module.Api = init, finish, Api
    module.Table = lambda columns, data: [dict(zip(columns, row, strict=True)) for row in data]
    monkeypatch.setitem(sys.modules, "trackio", module)
    monkeypatch.delitem(sys.modules, "projected_grpo.run.live_trackio", raising=False)
    yield module
    sys.modules.pop("projected_grpo.run.live_trackio", None)


def viewed(folder, *steps):
    """Make these steps in a run with the view, as train does."""
    run = Run(SMOKE, folder)
    for log in run.logs.values():  # goes on after what is there
        log.size = log.path.stat().st_size if log.path.exists() else 0
    with ExitStack() as stack:
        run.show_live(importlib.import_module("projected_grpo.run.live_trackio"), stack)
        for step in steps:
            run.write_step(a_step(step), rollouts_of(step))


def test_each_step_is_logged_with_its_figures_and_some_rollouts(tmp_path, trackio, capsys):
    viewed(a_run(tmp_path / NAME), 0, 1)
    (kept,) = trackio.kept
    assert (kept.name, kept.finished) == (NAME, True)
    assert kept.config == {"folder": str(tmp_path / NAME), "preset": "smoke", "optim": {"lr": 0.5}}
    assert [step for step, _ in kept.logged] == [0, 1]
    table = kept.logged[1][1].pop("rollouts")
    assert kept.logged[1][1] == {"step/hack_s": 0.25, "step/gn": 0.5}
    assert [list(row) for row in table] == [SHOWN] * 14 and len(table) <= 16
    assert [row["problem_id"] for row in table] == [f"p{i}" for i in range(0, 40, 3)]
    assert table[0]["exploited"] and table[0]["text"] == "<b>1.0</b>"
    assert capsys.readouterr().out == "", "stdout is the summary's"


def test_a_continued_run_is_there_once_and_others_stay(tmp_path, trackio):
    ours, namesake = tmp_path / "a" / NAME, tmp_path / "b" / NAME
    viewed(a_run(namesake), 0)
    viewed(a_run(ours), 0, 1)
    viewed(ours, 2)
    assert [(kept.config["folder"], kept.deleted) for kept in trackio.kept] == [
        (str(namesake), False),
        (str(ours), True),
        (str(ours), False),
    ]
    assert [(step, len(metrics["rollouts"])) for step, metrics in trackio.kept[-1].logged] == [
        (0, 14),
        (1, 14),
        (2, 14),
    ]


# The real package

SCRIPT = """
import json, sys
from pathlib import Path
from projected_grpo.run.live_trackio import View
folder, runs = Path(sys.argv[1]), json.load(sys.stdin)
for run in runs:
    view = View(folder)
    for record, rollouts in run:
        view.add(record, rollouts)
    view.close()
"""


@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="trackio is not installed")
def test_trackio_keeps_what_was_logged_without_a_network(tmp_path, unchecked_children):
    folder = a_run(tmp_path / NAME, before=2)
    env = os.environ | {"TRACKIO_DIR": str(tmp_path / "store"), "HF_HUB_OFFLINE": "1"}
    # What was logged after the two saved steps goes when the run is continued.
    runs = [[(a_step(step), rollouts_of(step)) for step in steps] for steps in ((2, 3), (2,))]
    command = [sys.executable, "-W", "error::UserWarning", "-c", SCRIPT, folder]
    done = subprocess.run(
        command, input=json.dumps(runs), env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout == "" and "ended" not in done.stderr
    with sqlite3.connect(tmp_path / "store" / "projected_grpo.db") as store:
        rows = store.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
    assert [(name, step) for name, step, _ in rows] == [(NAME, 0), (NAME, 1), (NAME, 2)]
    last = json.loads(rows[-1][2])
    assert last["step/hack_s"] == 0.5 and last["rollouts"]["_type"] == "trackio.table"
    assert [row["text"] for row in last["rollouts"]["_value"]][:2] == ["<b>2.0</b>", "<b>2.3</b>"]
    assert list(last["rollouts"]["_value"][0]) == SHOWN
