"""Pictures of finished runs: what is drawn, what is left out and why."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from fake_runs import config, summary
from projected_grpo import cli
from projected_grpo.config import to_json
from projected_grpo.results.pictures import baseline_first, mean_at_steps, series
from projected_grpo.results.plots import COLOURS, Point, frontier, look, looks
from projected_grpo.results.runs import BASELINE, EndedRun, grouped
from projected_grpo.results.statistics import shares, where_measured
from projected_grpo.runlog import append_jsonl, write_json

KINDS = ("dynamics", "pareto", "modes", "cosines", "routed")
POINT = st.builds(
    Point, st.just("x"), st.sampled_from([0.0, 0.2, 0.5, 1.0]), st.sampled_from([0.1, 0.3, 0.9])
)


def rows(count=12, **columns):
    full = {
        **{"hack_s": [1, 4], "gt_s": [2, 4], "hack_deploy": 0.3, "solve_deploy": 0.4, "cos_pre": 0.3},
        **{"cos_post": 0.1, "cos_update": 0.2, "cos_null": 0.15, "refr": 0.5, "q_egy": 0.25},
    }
    return [{"step": i, **full, **columns} for i in range(count)]


def made(folder, arm, seed=41, options=None, steps=None, **values):
    cfg = config(arm, seed, options)
    run = folder / "runs" / f"{arm}_{seed}_{len(str(options))}"
    run.mkdir(parents=True)
    write_json(run / "config.json", {"config": to_json(cfg)})
    write_json(run / "summary.json", summary(cfg, modes=("run_tests", "sentinel")) | values)
    append_jsonl(run / "steps.jsonl", steps if steps is not None else rows())
    return run


def plot(folder, *more):
    return cli.main(["plot", str(folder / "runs"), f"--out={folder / 'pictures'}", *more])


def files(folder):
    return {p.relative_to(folder / "pictures").as_posix() for p in (folder / "pictures").rglob("*.*")}


@given(points=st.lists(POINT, max_size=8))
def test_the_frontier_is_what_nothing_beats(points):
    kept = frontier(points)
    for p in points:
        beaten = any(
            (q.hack < p.hack and q.solve >= p.solve) or (q.hack <= p.hack and q.solve > p.solve)
            for q in points
        )
        assert (p in kept) != beaten
    assert [p.solve for p in kept] == sorted(p.solve for p in kept)
    assert [p.hack for p in kept] == sorted(p.hack for p in kept)  # so that the line never goes back


def test_thirty_arms_have_thirty_looks():
    looks = {(str(look(i).colour), str(look(i).dash)) for i in range(4 * len(COLOURS))}
    assert len(looks) == 4 * len(COLOURS)


def test_each_way_of_drawing_tells_eight_arms_apart_without_the_others():
    """So also in grey, where colours are alike."""
    for part in ("colour", "dash", "marker", "hatch"):
        assert len({str(getattr(look(i), part)) for i in range(len(COLOURS))}) == len(COLOURS), part
    hatches = {look(i).hatch for i in range(4 * len(COLOURS))}
    assert len(hatches) == 4 * len(COLOURS)


def test_an_arm_looks_the_same_where_others_are_missing():
    arms = ("vanilla", "projected", "routing2")
    assert looks(["routing2"], arms) == {"routing2": look(2)}
    assert looks(["routing2", "vanilla", "routing2"]) == {"routing2": look(0), "vanilla": look(1)}
    assert looks(["other", "projected"], arms) == {"other": look(3), "projected": look(1)}


def a_run(**columns):
    return EndedRun("a", Path("a"), {}, {}, None, columns)


def test_columns_become_figures_by_step():
    run = a_run(hack_s=[[1, 4], None, [0, 0], [3, 3]], refr=[None, 0.5, None, 0.7], tau=[None, None])
    first, missing, empty, last = shares(run.values("hack_s"))
    assert (first, last) == (0.25, 1.0) and math.isnan(missing) and math.isnan(empty)
    assert (
        where_measured(run.values("refr")) == {1: 0.5, 3: 0.7} and where_measured(run.values("q_egy")) == {}
    )
    assert mean_at_steps([run, a_run(refr=[None, 0.7])], "refr") == pytest.approx({1: 0.6, 3: 0.7})
    assert series("a", [run], "tau") is None and series("a", [run], "kl") is None
    assert len(series("a", [run, a_run(refr=[None])], "refr").seeds) == 1


def test_every_picture_is_made_as_png_and_svg(tmp_path, capsys):
    for seed in (41, 42):
        made(tmp_path, "none", seed)
        made(tmp_path, "route", seed)
    cosines = {"cosines": [0.1, 0.5, -0.2], "fraction_positive": 2 / 3, "mean": 0.133, "passed": True}
    write_json(tmp_path / "vhack" / "Model-1.7B_core_12.heldout.json", cosines)
    assert plot(tmp_path) == 0
    names = [*KINDS, "heldout-Model-1.7B_core_12"]
    assert files(tmp_path) == {f"{name}.{form}" for name in names for form in ("png", "svg")}
    told = capsys.readouterr()
    assert [Path(line).stem for line in told.out.splitlines()] == names and told.err == ""
    for name in names:
        assert imread(tmp_path / "pictures" / f"{name}.png").std() > 0.03
        assert (tmp_path / "pictures" / f"{name}.svg").read_text().startswith("<?xml")


def test_one_kind_alone(tmp_path):
    made(tmp_path, "none")
    assert plot(tmp_path, "--kind=pareto") == 0
    assert files(tmp_path) == {"pareto.png", "pareto.svg"}


def test_what_was_not_measured_is_left_out_with_a_line(tmp_path, capsys):
    bare = [{"step": 0, "hack_s": [0, 4], "gt_s": None}]
    made(tmp_path, "none", steps=bare, by_mode={}, hack_deploy=None)
    assert plot(tmp_path) == 0
    told = capsys.readouterr().err.splitlines()
    assert files(tmp_path) == {"dynamics.png", "dynamics.svg"}
    assert [line.split()[0] for line in told] == ["pareto", "modes", "cosines", "routed", "heldout"]
    assert all(" left out: " in line for line in told)
    assert plot(tmp_path, "--kind=routed") == 2
    assert "nothing to draw; routed left out: no run routed anything" in capsys.readouterr().err


def test_contexts_are_drawn_apart(tmp_path, capsys):
    made(tmp_path, "none")
    made(tmp_path, "erase", options={"optim": {"steps": 60}})
    assert plot(tmp_path, "--kind=pareto") == 0
    assert files(tmp_path) == {f"smoke-{i}/pareto.{form}" for i in (1, 2) for form in ("png", "svg")}
    out = capsys.readouterr().out
    assert "30 steps)" in out and "60 steps)" in out


def test_the_baseline_comes_first():
    runs = [
        EndedRun(arm, Path(arm), summary(config(arm)), json.loads(json.dumps(to_json(config(arm)))), None, {})
        for arm in ("erase", "none", "gt_only")
    ]
    assert [setting.arm for setting in baseline_first(grouped(runs))] == [BASELINE, "erase", "gt_only"]


def test_a_refusal_names_the_option(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["plot", str(tmp_path)])
    assert "--out" in capsys.readouterr().err
    assert plot(tmp_path) == 2
    assert "no finished run" in capsys.readouterr().err
