"""A8's records, table and verdicts: what docs/results.md says is what the records say."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from projected_grpo.config import from_json
from projected_grpo.sweep.keep import kept_data
from projected_grpo.sweep.spec import expand, read_spec

ROOT = Path(__file__).parents[2]
HERE = ROOT / "docs" / "results" / "score"


@pytest.fixture(scope="module")
def report():
    runpy.run_path(str(HERE / "make_pairs.py"), run_name="__main__")
    return runpy.run_path(str(HERE / "report.py"))


def test_the_page_has_the_table_and_the_verdicts_of_the_records(report):
    assert report["text"]() in (ROOT / "docs" / "results.md").read_text()


def test_every_run_of_the_plan_is_there_of_one_commit_and_of_these_pairs(report, monkeypatch):
    monkeypatch.chdir(ROOT)
    kept = [json.loads(path.read_text()) for path in sorted(HERE.glob("*_seed*.json"))]
    planned = {(run.arm.name, run.cfg.run.seed) for run in expand(read_spec(Path("docs/sweeps/score.toml")))}
    assert {(record["arm"], record["seed"]) for record in kept} == planned and len(kept) == 57
    assert len({record["git_commit"] for record in kept}) == 1
    for record in kept:
        assert record["data"] == kept_data(from_json(record["config"], older=True)), record["arm"]


def test_the_correlation_is_spearmans_and_its_p_that_of_all_pairings(report):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=7), rng.normal(size=7)
    y[1] = y[0]  # a tie
    rho, p = report["correlation"](x, y, "greater")
    assert rho == pytest.approx(stats.spearmanr(x, y).statistic)
    exact = stats.permutation_test(
        (x,), lambda a: stats.spearmanr(a, y).statistic, permutation_type="pairings", alternative="greater"
    )
    assert p == pytest.approx(exact.pvalue, abs=0.01)


def test_a_figure_that_orders_nothing_is_not_shown_to_foretell(report):
    made = report["PairSet"]
    rng = np.random.default_rng(1)

    def sets(outcome):
        return [
            made(str(i), 0.3 + 0.035 * i, 1 - 0.04 * i, {41: float(outcome(i))}, {41: 0.0}, 0.0)
            for i in range(18)
        ]

    assert "FORETELLS" in report["foretells"](sets(lambda i: -i), "slope")
    assert "FORETELLS" in report["foretells"](sets(lambda i: -i), "auroc")
    assert "NOT SHOWN" in report["foretells"](sets(lambda i: i), "slope")
    assert "NOT SHOWN" in report["foretells"](sets(lambda i: rng.normal()), "auroc")
