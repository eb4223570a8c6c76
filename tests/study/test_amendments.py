"""A9 to A12: docs/results.md says what their records say, and the records are those that were planned."""

import json
import runpy
from pathlib import Path

import pytest

from projected_grpo.config import from_json
from projected_grpo.sweep.keep import kept_data
from projected_grpo.sweep.spec import expand, read_spec

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
SWEEPS = {"A9": ["fair"], "A10": ["signal_place"], "A11": ["horizon", "relearning"], "A12": ["anew"]}


@pytest.fixture(scope="module")
def report():
    return runpy.run_path(str(RESULTS / "amendments.py"))


@pytest.mark.parametrize("amendment", SWEEPS)
def test_the_page_has_the_tables_and_the_verdicts_of_the_records(report, amendment):
    assert report["text"](amendment) in (ROOT / "docs" / "results.md").read_text()


@pytest.mark.parametrize("sweep", [sweep for sweeps in SWEEPS.values() for sweep in sweeps])
def test_every_run_of_the_plan_is_there_of_the_preregistered_commit_and_data(sweep, monkeypatch):
    monkeypatch.chdir(ROOT)
    kept = [json.loads(path.read_text()) for path in sorted((RESULTS / sweep).glob("*_seed*.json"))]
    planned = [
        (run.arm.name, run.cfg.run.seed) for run in expand(read_spec(Path(f"docs/sweeps/{sweep}.toml")))
    ]
    assert sorted((record["arm"], record["seed"]) for record in kept) == sorted(planned)
    assert {record["git_commit"][:7] for record in kept} == {"82dcb68"}
    for record in kept:
        assert record["data"] == kept_data(from_json(record["config"], older=True)), record["arm"]


def test_a_model_that_solves_nothing_is_ruined_whatever_it_hacks(report):
    fate = report["fate"]
    assert fate(0.0, 0.0, 0.05, 0.0, 0.6) == "RUIN"
    assert fate(0.1, 0.1, 0.40, 0.5, 0.6) == "PREVENTION"
    assert fate(0.1, 0.1, 0.40, 0.7, 0.6) == fate(0.1, 0.3, 0.40, 0.5, 0.6) == "DELAY"
    assert "NEITHER" in fate(0.5, 0.5, 0.40, 0.5, 0.6) and "NEITHER" in fate(0.1, 0.1, 0.2, 0.5, 0.6)
