"""Pictures of finished runs: what is drawn, what is left out and why."""

import itertools
import json
import math
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from fake_runs import config, summary
from projected_grpo import cli
from projected_grpo.config import to_json
from projected_grpo.results.pictures import series
from projected_grpo.results.plots import COLOURS, FIXED, Point, frontier, look, looks
from projected_grpo.results.runs import BASELINE, EndedRun, grouped, names
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
    run = folder / "runs" / f"{arm}_{seed}_{len(list(folder.glob('runs/*')))}"
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


def drawn_as(one):
    """All that tells an arm apart in a picture of lines."""
    return one.colour, str(one.dash), one.marker, one.full


def test_every_arm_of_many_looks_different():
    made = looks([*FIXED, *(f"erase k={k}" for k in range(30))]).values()
    assert len({drawn_as(one) for one in made}) == len(made)
    assert len({(one.colour, one.marker, one.full) for one in made}) == len(made)
    for part in ("colour", "dash", "marker"):  # also in grey, where colours are alike
        assert len({str(getattr(look(i), part)) for i in range(len(COLOURS))}) == len(COLOURS), part


def test_the_colour_of_an_arm_follows_from_its_name():
    others = [f"erase k={k}" for k in range(12)]
    alone = {name: looks([name])[name] for name in (*FIXED, *others)}
    together = looks([*reversed(others), *FIXED])
    for name, one in alone.items():
        assert one.colour == together[name].colour
        assert (one.colour == COLOURS[0]) == (name == BASELINE)
    assert all(together[name] == look(place) for name, place in FIXED.items())


def seen(colour, kind):
    """A colour as an eye without the cones for red or green, or none, has it: linear RGB.

    Matrices of Machado, Oliveira and Fernandes (2009), severity 1.
    """
    matrix = {
        "usual": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
        "protan": (
            (0.152286, 1.052583, -0.204868),
            (0.114503, 0.786281, 0.099216),
            (-0.003882, -0.048116, 1.051998),
        ),
        "deutan": (
            (0.367322, 0.860646, -0.227968),
            (0.280085, 0.672501, 0.047413),
            (-0.011820, 0.042940, 0.968881),
        ),
    }[kind]
    rgb = [
        v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4
        for v in (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    ]
    return [sum(a * b for a, b in zip(row, rgb, strict=True)) for row in matrix]


@pytest.mark.parametrize("kind", ["usual", "protan", "deutan"])
def test_colours_are_told_apart_by_every_eye(kind):
    shown = [seen(colour, kind) for colour in COLOURS]
    assert min(math.dist(a, b) for a, b in itertools.combinations(shown, 2)) > 0.1


def a_run(**columns):
    return EndedRun("a", Path("a"), {}, {}, None, columns)


def test_columns_become_figures_by_step():
    run = a_run(hack_s=[[1, 4], None, [0, 0], [3, 3]], refr=[None, 0.5, None, 0.7], tau=[None, None])
    first, missing, empty, last = shares(run.values("hack_s"))
    assert (first, last) == (0.25, 1.0) and math.isnan(missing) and math.isnan(empty)
    assert (
        where_measured(run.values("refr")) == {1: 0.5, 3: 0.7} and where_measured(run.values("q_egy")) == {}
    )
    assert series("a", [run], "tau") is None and series("a", [run], "kl") is None
    assert len(series("a", [run, a_run(refr=[None])], "refr").seeds) == 1


FORMS = ("png", "svg", "pdf")


def test_every_picture_is_made_in_three_forms(tmp_path, capsys):
    for seed in (41, 42):
        made(tmp_path, "none", seed)
        made(tmp_path, "route", seed)
    cosines = {"cosines": [0.1, 0.5, -0.2], "fraction_positive": 2 / 3, "mean": 0.133, "passed": True}
    write_json(tmp_path / "vhack" / "Model-1.7B_core_12.heldout.json", cosines)
    assert plot(tmp_path) == 0
    names = [*KINDS, "heldout-Model-1.7B_core_12"]
    assert files(tmp_path) == {f"{name}.{form}" for name in names for form in FORMS}
    told = capsys.readouterr()
    assert [Path(line).stem for line in told.out.splitlines()] == names and told.err == ""
    for name in names:
        assert imread(tmp_path / "pictures" / f"{name}.png").std() > 0.03
        assert (tmp_path / "pictures" / f"{name}.svg").read_text().startswith("<?xml")
        assert (tmp_path / "pictures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")


@pytest.fixture
def figures(monkeypatch):
    """The figures in place of their files, by name."""
    kept = {}
    monkeypatch.setattr(
        "projected_grpo.results.plots._save", lambda figure, path: kept.update({path.name: figure})
    )
    return kept


def arms_of(figure):
    """Names of the legend, without seeds."""
    return [text.get_text().rpartition(" (")[0] for text in figure.legends[0].get_texts()]


ARMS = {"none": {}, "erase": {}, "erase+haar": {}, "erase k=3": {"basis": {"v_hack_k": 3}}}


def a_study(folder, **values):
    for name, options in ARMS.items():
        arm, _, control = name.split()[0].partition("+")
        chosen = options | {"arm": {"control": control}} if control else options
        for seed in (41, 42, 43):
            made(folder, arm, seed, chosen, **{"hack_deploy": 0.1 * (seed - 40), **values})


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (("none", "erase"), ["none", "erase"]),
        (("erase k=3",), ["erase k=3"]),
        (("none", "erase*"), list(ARMS)),
        ((), list(ARMS)),
    ],
)
def test_arms_are_chosen_and_keep_their_looks(tmp_path, figures, words, kept):
    a_study(tmp_path)
    assert plot(tmp_path, "--kind=dynamics", *(["--arms", *words] if words else [])) == 0
    figure = figures["dynamics"]
    assert sorted(arms_of(figure)) == sorted(kept)
    colours = {line.get_label().rpartition(" (")[0]: line.get_color() for line in figure.axes[0].lines}
    assert all(colours[name] == looks(ARMS)[name].colour for name in kept)


def test_an_arm_that_no_run_is_of_is_named_with_those_there_are(tmp_path, capsys):
    a_study(tmp_path)
    assert plot(tmp_path, "--arms", "none", "eraze") == 2
    assert "--arms eraze: no run of that arm; there are none, erase, erase+haar" in capsys.readouterr().err


def test_options_that_all_arms_share_stand_in_no_name(tmp_path, figures):
    for arm in ("none", "erase"):
        made(tmp_path, arm, options={"basis": {"v_hack_k": 3}})
    assert plot(tmp_path, "--kind=pareto") == 0
    assert {"none", "erase"} <= set(arms_of(figures["pareto"]))


def test_the_final_rates_end_the_lines_with_their_interval_of_t(tmp_path, figures):
    """Mean .2 and SEM .0577 over three seeds; t of two degrees of freedom at .975 is 4.303."""
    a_study(tmp_path)
    assert plot(tmp_path, "--kind=dynamics", "--arms", "none") == 0
    axes = figures["dynamics"].axes[0]
    final = axes.containers[-1]
    x, y = (values[0] for values in final.lines[0].get_data())
    ((low, high),) = (segment[:, 1] for segment in final.lines[2][0].get_segments())
    assert x > 11 and y == pytest.approx(0.2)  # behind the last of 12 steps
    assert (low, high) == pytest.approx((0, 0.2 + 4.3027 * 0.1 / 3**0.5), abs=1e-4)  # a rate is not below 0


def test_a_rate_goes_from_zero_to_one_and_thirty_arms_fit_the_page(tmp_path, figures):
    for k in range(30):
        pairs = Path(f"docs/results/score/a-set-of-pairs-with-a-name-{k}.json")
        made(tmp_path, "route", options={"basis": {"vhack_pairs_path": pairs}}, steps=rows(2))
    for kind in ("dynamics", "modes"):
        assert plot(tmp_path, f"--kind={kind}") == 0
        figure = figures[kind]
        figure.draw_without_rendering()
        for axes in figure.axes:
            assert (axes.get_xlim() if kind == "modes" else axes.get_ylim()) == pytest.approx(
                (0, 1), abs=0.05
            )
            assert axes.bbox.height > 50 and axes.bbox.width > 100
        page = figure.bbox.padded(1)
        for box in (figure.legends[0].get_window_extent(), *(axes.get_tightbbox() for axes in figure.axes)):
            assert page.containsx(box.x0) and page.containsx(box.x1), kind
            assert page.containsy(box.y0) and page.containsy(box.y1), kind


@pytest.mark.parametrize(
    ("settings", "values", "drawn"),
    [
        ({}, {}, True),
        ({"sampling": {"temperature": 0.5}}, {}, False),
        ({}, {"problems": "embedded"}, False),
        ({}, {"env_mode": "eq_override"}, False),
    ],
)
def test_the_base_model_is_a_point_where_its_rates_are_known(tmp_path, figures, settings, values, drawn):
    """As in data/nano/base.json, over the runs' own modes, weighted by their completions."""
    base = json.loads((resources.files("projected_grpo") / "data/nano/base.json").read_text())["by_mode"]
    options = {"sampling": {"temperature": 1.0, "top_k": 0}} | settings
    own = {"model": "nano", "problems": "nano", "env_mode": "run_tests,sentinel"} | values
    made(tmp_path, "none", options=options, **own)
    assert plot(tmp_path, "--kind=pareto") == 0
    points = [line for line in figures["pareto"].axes[0].lines if line.get_label() == "base model"]
    assert len(points) == drawn
    if drawn:
        n = {mode: base[mode]["n"] for mode in ("run_tests", "sentinel")}
        hack, solve = (sum(base[m][k] * n[m] for m in n) / sum(n.values()) for k in ("hack", "solve"))
        (x,), (y,) = points[0].get_data()
        assert (x, y) == pytest.approx((solve, hack))


def test_one_kind_alone(tmp_path):
    made(tmp_path, "none")
    assert plot(tmp_path, "--kind=pareto") == 0
    assert files(tmp_path) == {f"pareto.{form}" for form in FORMS}


def test_what_was_not_measured_is_left_out_with_a_line(tmp_path, capsys):
    bare = [{"step": 0, "hack_s": [0, 4], "gt_s": None}]
    made(tmp_path, "none", steps=bare, by_mode={}, hack_deploy=None)
    assert plot(tmp_path) == 0
    told = capsys.readouterr().err.splitlines()
    assert files(tmp_path) == {f"dynamics.{form}" for form in FORMS}
    assert [line.split()[0] for line in told] == ["pareto", "modes", "cosines", "routed", "heldout"]
    assert all(" left out: " in line for line in told)
    assert plot(tmp_path, "--kind=routed") == 2
    assert "nothing to draw; routed left out: no run routed anything" in capsys.readouterr().err


def test_contexts_are_drawn_apart(tmp_path, capsys):
    made(tmp_path, "none")
    made(tmp_path, "erase", options={"optim": {"steps": 60}})
    assert plot(tmp_path, "--kind=pareto") == 0
    assert files(tmp_path) == {f"smoke-{i}/pareto.{form}" for i in (1, 2) for form in FORMS}
    out = capsys.readouterr().out
    assert "30 steps)" in out and "60 steps)" in out


def test_the_baseline_comes_first():
    runs = [
        EndedRun(arm, Path(arm), summary(config(arm)), json.loads(json.dumps(to_json(config(arm)))), None, {})
        for arm in ("erase", "none", "gt_only")
    ]
    groups = grouped(runs)
    assert list(names(groups, next(iter(groups)).context).values()) == [BASELINE, "erase", "gt_only"]


def test_a_refusal_names_the_option(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["plot", str(tmp_path)])
    assert "--out" in capsys.readouterr().err
    assert plot(tmp_path) == 2
    assert "no finished run" in capsys.readouterr().err
