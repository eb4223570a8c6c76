"""The GPU check on a CPU: it makes every part, goes on where it was, sets figures beside predictions."""

import runpy
import sys
from pathlib import Path

import pytest

from projected_grpo.runlog import read_json

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu_check.py"


@pytest.fixture(scope="module")
def script():
    """Its names; `run(*options)` is its command."""
    names = runpy.run_path(str(SCRIPT))

    def run(*options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["gpu_check.py", *options])
            return names["main"]()

    return {**names, "run": run}


def test_every_part_runs_on_a_cpu_and_is_made_once(script, tmp_path, capsys):
    dry = ("--dry-run", "--out", str(tmp_path))
    assert script["run"](*dry, "--part", "ceilings") == 1, "parts are left"
    first = read_json(tmp_path / "check.json", "")["parts"]["ceilings"]
    assert script["run"](*dry, "--minutes", "99") == 0, (tmp_path / "check.md").read_text()
    found = read_json(tmp_path / "check.json", "")
    assert list(found["parts"]) == list(script["PARTS"]) and found["parts"]["ceilings"] == first
    page = (tmp_path / "check.md").read_text()
    assert "dry run on a CPU: no figure counts" in page.splitlines()[0]
    for one in script["PREDICTIONS"]:
        assert f"{one.part}: {one.figure}" in page
        if (
            one.figure != "rows_96_graph_ms" and one.figure != "rows_258_eager_ms"
        ):  # tiny ones have 2 and 3 rows
            assert one.figure in found["parts"][one.part]["figures"], one.figure
    assert "left: []" in capsys.readouterr().out


def test_a_page_says_which_predictions_hold(script):
    parts = {"svd": {"figures": {"minutes_of_the_model": 1.5, "largest_error": 1e-3}, "seconds": 1.0}}
    who = {"gpu": "a GPU", "gpu_gb": 96.0, "dry_run": False, "versions": {"torch": "2"}, "git_commit": "c"}
    lines = script["page"]({"about": who, "parts": parts}).splitlines()
    verdicts = {line.split("|")[1].strip(): line.split("|")[4].strip() for line in lines if "svd: " in line}
    assert verdicts == {"svd: minutes_of_the_model": "yes", "svd: largest_error": "NO"}
    assert any("arms: failed" in line and "not measured" in line for line in lines)


def test_a_part_that_fails_is_written_and_the_others_are_made(script, tmp_path, monkeypatch):
    def broken(size):
        raise RuntimeError("no such kernel")

    parts = script["check"].__globals__["PARTS"]
    monkeypatch.setitem(parts, "ceilings", (broken, 0.5))
    script["check"](tmp_path, script["TINY"], ("ceilings", "svd"), 99)
    found = read_json(tmp_path / "check.json", "")["parts"]
    assert "no such kernel" in found["ceilings"]["error"] and "figures" in found["svd"]
    assert "no such kernel" in (tmp_path / "check.md").read_text()


def test_without_a_gpu_it_says_so(script, capsys):
    with pytest.raises(SystemExit) as stopped:
        script["run"]("--out", "nowhere")
    assert stopped.value.code == 2 and "no CUDA device here" in capsys.readouterr().err
