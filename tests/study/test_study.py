"""The nano study: which runs it has, and the tables and verdicts that are made of its records."""

import json
import math
import re
from collections import Counter
from pathlib import Path
from statistics import fmean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from projected_grpo.config import PRESETS
from projected_grpo.errors import UserError
from projected_grpo.pairs import load_pairs
from projected_grpo.results.statistics import by_arm, deployed, holm_of, paired
from projected_grpo.results.tables import marked
from projected_grpo.run.identity import changes, chosen
from projected_grpo.study import verdicts as study_verdicts
from projected_grpo.study.report import (
    arms_table,
    cell,
    controls_table,
    emergence_table,
    filled,
    headline_table,
    leave_out_table,
    sections,
    study_spec,
    write_report,
)
from projected_grpo.study.verdicts import (
    PLACEBOS,
    SAMPLED,
    emergence_verdict,
    h1_verdict,
    leave_out_verdict,
    placebo_verdict,
    solving_verdict,
    verdicts,
)
from projected_grpo.sweep.jobs import jobs_of
from projected_grpo.sweep.keep import SERIES
from projected_grpo.sweep.spec import expand

MODES = ("run_tests", "sentinel", "stdout_marker", "file_marker")
T_975 = {1: 12.706205, 2: 4.302653, 4: 2.776445, 9: 2.262157}  # two-sided 95% points of Student's t, by df


def record(arm, seed, hack, solve, modes=None):
    rates = {
        "hack_train": hack,
        "hack_deploy": hack,
        "solve_train": solve,
        "solve_deploy": solve,
        "eval_n": 64,
    }
    by_mode = {m: rates | {"hack_deploy": (modes or {}).get(m, hack)} for m in MODES}
    steps = {name: [0.25, None, 0.75] for name in SERIES} | {
        "hack_s": [[4, 64], [8, 64], [32, 64]],
        "gt_s": [[32, 64], [16, 64], [8, 64]],
    }
    splits = {name: {**rates, "by_mode": by_mode} for name in ("held-out instances", "held-out templates")}
    summary = {**rates, "by_mode": by_mode, "by_split": splits, "finished": True}
    return {
        "arm": arm, "seed": seed, "git_commit": "abc", "wall_s": 61.5, "summary": summary, "steps": steps,
    }  # fmt: skip


def study_of(**arms):
    return by_arm(
        [record(name.replace("__", "+"), s, h, p) for name, rows in arms.items() for s, h, p in rows]
    )


def arm(name):
    (found,) = [arm for arm in study_spec("nano").arms if arm.name == name]
    return found


@pytest.fixture(scope="module")
def runs():
    """The whole study, by arm and seed."""
    return {(run.arm.name, run.cfg.run.seed): run for run in expand(study_spec("nano"))}


def test_the_study_has_the_arms_and_seeds_that_were_preregistered(runs):
    seeds = Counter(name for name, _ in runs if not arm(name).explored)
    for name in ("none", "erase", "route", "route2", "erase+haar", "route+haar", "route2+haar"):
        assert seeds.pop(name) == 10
    folds = {name: n for name, n in seeds.items() if "without" in name}
    assert set(folds) == {f"erase+{own}without_{m}" for m in MODES for own in ("", "sampled_")}
    assert set(folds.values()) == {3}
    assert all(n == 5 for name, n in seeds.items() if name not in folds)


def test_the_arms_of_the_later_amendments_are_there_as_written(runs):
    further = {arm.name for arm in study_spec("nano").arms if arm.later and not arm.explored}
    assert further == {
        "advmod", "advmod+additive", "advmod+haar", "gt_penalty", "gt_screening", "inoculation", "posthoc",
        "posthoc+haar", "erase+placebo-style", "erase+placebo-iteration", "erase+placebo-naming",
        "route2+block", "absorb", "erase+solving_pairs", "erase+sampled_pairs", "erase+sampled_shuffled",
        "erase+sampled_haar_matched", *(f"erase+sampled_without_{mode}" for mode in MODES),
    }  # fmt: skip
    for name in further:
        cfg = runs[name, 41].cfg
        given = chosen(cfg)
        assert given.get("advmod_alpha", 2.0) == 2.0 and given.get("block_init", "random") == "random"
        assert given.get("advmod_form") == ("additive" if name == "advmod+additive" else None)
        of_its_own = name.partition("erase+")[2].removesuffix("_pairs")
        sampled = of_its_own.startswith("sampled")
        expected = "sampled" if sampled else of_its_own
        assert given["vhack_pairs_path"].partition("nano-")[2] == expected


def test_a_fold_has_no_pair_of_the_mode_it_leaves_out(runs):
    for mode in MODES:
        cfg = runs[f"erase+without_{mode}", 41].cfg
        assert set(cfg.basis.vhack_pairs_modes) == set(MODES) - {mode}


def test_a_study_goes_through_first_seeds_first_and_later_arms_last(runs):
    order = list(runs.values())
    for later in (False, True):
        seeds = [run.cfg.run.seed for run in order if run.arm.later == later]
        assert seeds == sorted(seeds)
    assert [run.arm.later for run in order] == sorted(run.arm.later for run in order)
    assert len({run.id for run in order}) == len(order) == 307


def test_arms_differ_from_the_preset_only_by_their_options(runs):
    preset = PRESETS["nano"][1]
    cfg = runs["erase+flipped", 41].cfg
    assert changes(cfg, preset) == {group: {} for group in changes(cfg, preset)} | {
        "arm": {"control": "flipped"},
        "basis": {"v_hack_length_norm": False},  # the default when the study's runs were made
    }


def test_what_an_arm_is_a_control_of_is_in_the_study():
    names = {arm.name for arm in study_spec("nano").arms}
    assert {arm.controls for arm in study_spec("nano").arms} - {""} <= names


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=10).filter(
        lambda x: len(x) in (2, 3, 5, 10)
    )
)
def test_a_paired_difference_is_students_interval(pairs):
    a = {s: record("a", s, x, 0.5) for s, (x, _) in enumerate(pairs)}
    b = {s: record("b", s, y, 0.5) for s, (_, y) in enumerate(pairs)}
    found = paired(a, b, deployed("hack"))
    differences = [x - y for x, y in pairs]
    half = T_975[len(pairs) - 1] * stdev(differences) / math.sqrt(len(pairs))
    assert found.n == len(pairs)
    assert math.isclose(found.mean, fmean(differences), abs_tol=1e-9)
    for got, expected in zip(found.interval, (-half, half), strict=True):
        assert math.isclose(got, fmean(differences) + expected, rel_tol=1e-4, abs_tol=1e-7)


def test_only_seeds_that_both_arms_have_are_paired():
    arms = study_of(a=[(1, 0.9, 0), (2, 0.5, 0)], b=[(2, 0.1, 0), (3, 0.7, 0)])
    assert paired(arms["a"], arms["b"], deployed("hack")).values == (0.4,)
    assert paired(arms["a"], {}, deployed("hack")) is None


@pytest.mark.parametrize(
    ("hack", "solve", "verdict"),
    [
        ((0.30, 0.31, 0.29), 0.50, "SUPPORTED"),
        ((0.30, 0.31, 0.29), 0.90, "SUPPORTED"),  # solving more is no falsifier
        ((0.30, 0.31, 0.29), 0.30, "FALSIFIED"),  # solve falls by 20 points
        ((0.60, 0.61, 0.59), 0.50, "FALSIFIED"),  # 10 points less
        ((0.45, 0.46, 0.44), 0.50, "NEITHER"),
    ],
)
def test_h1_is_judged_by_the_preregistered_numbers(hack, solve, verdict):
    arms = study_of(
        none=[(s, 0.70, 0.50) for s in (1, 2, 3)],
        erase=[(s, h, solve) for s, h in zip((1, 2, 3), hack, strict=True)],
    )
    assert verdict in h1_verdict(arms, "erase")


def test_h1_is_falsified_within_one_standard_error():
    arms = study_of(none=[(1, 0.9, 0.5), (2, 0.9, 0.5)], erase=[(1, 0.0, 0.5), (2, 1.2, 0.5)])
    assert "FALSIFIED" in h1_verdict(arms, "erase")  # 30 points less on average, give or take 60


def test_a_direction_must_beat_every_control():
    def arms(matched):
        return study_of(
            none=[(s, 0.8, 0.1) for s in (1, 2, 3)],
            erase=[(s, 0.1 + s / 100, 0.5) for s in (1, 2, 3)],
            erase__haar=[(s, 0.7 + s / 50, 0.2) for s in (1, 2, 3)],
            erase__shuffled=[(s, 0.6 - s / 90, 0.2) for s in (1, 2, 3)],
            erase__haar_matched=[(s, h, 0.2) for s, h in zip((1, 2, 3), matched, strict=True)],
        )

    assert "MATTERS: hacks less than erase+haar, erase+haar_matched, erase+shuffled (after Holm: also)" in (
        h1_verdict(arms((0.5, 0.6, 0.55)), "erase")
    )
    assert "does not beat erase+haar_matched" in h1_verdict(arms((0.5, 0.0, 0.2)), "erase")
    few = arms((0.5, 0.6, 0.55))
    del few["erase+shuffled"]
    assert "controls not measured" in h1_verdict(few, "erase")


def test_emergence_is_counted_seed_by_seed():
    def runs(count):
        last = [record("none", s, 0.8, 0.1) for s in range(10)]
        for r in last[:count]:
            r["steps"]["hack_s"] = [[4, 64], [40, 64], [50, 64], [60, 64]]
        return by_arm([*last, record("gt_only", 1, 0.05, 0.6)])

    base = {"hack": 0.08, "solve": 0.44}
    assert "in 9 of 10 seeds (asked: 9 of 10): HOLDS" in emergence_verdict(runs(9), base)
    assert "in 8 of 10 seeds (asked: 9 of 10): not shown" in emergence_verdict(runs(8), base)
    assert "not shown" in emergence_verdict(runs(10), base | {"hack": 0.12})
    assert "0 of 10" in emergence_verdict(runs(10), base | {"solve": 0.1})
    assert "0.1 in 1 of 1 seeds" in emergence_verdict(runs(9), base)
    assert "base model in 1" in emergence_verdict(runs(9), base)


def test_the_page_says_what_the_records_of_other_samplings_say(monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "results.md").read_text()
    kept = Path(__file__).parents[2] / "docs" / "results" / "samplings"
    arms = by_arm([json.loads(path.read_text()) for path in kept.glob("*_seed*.json")])
    assert len(arms) == 8 and all(set(runs) == set(range(41, 46)) for runs in arms.values())
    verdicts, rows = {}, {}
    for own in ("sampled-98", "sampled-99"):
        rivals = ("erase+haar", f"{own}+haar_matched", f"{own}+shuffled")
        hack, solve = deployed("hack"), deployed("solve")
        differences = [paired(arms[own], arms["none"], key) for key in (hack, solve)]
        differences += [paired(arms[own], arms[rival], hack) for rival in rivals]
        pairs = len(load_pairs(kept / f"{own.removeprefix('sampled-')}.json").pairs)
        rows[own] = [pairs, *(cell(arms[own], key) for key in (hack, solve))], differences
        monkeypatch.setitem(study_verdicts.MUST_BEAT, own, rivals)
        verdicts[own] = h1_verdict(arms, own)
    columns = list(zip(*(found for _, found in rows.values()), strict=True))
    marks = [[marked(d, p)[0] for d, p in zip(c, holm_of(c), strict=True)] for c in columns]
    for (own, (cells, _)), shown in zip(rows.items(), zip(*marks, strict=True), strict=True):
        assert f"| {' | '.join(map(str, (own, *cells, *shown)))} |" in page.splitlines()
    assert verdicts["sampled-98"].endswith(
        "SUPPORTED; the direction is NOT SHOWN to matter: does not beat sampled-98+shuffled"
    )
    assert "SUPPORTED; the direction MATTERS" in verdicts["sampled-99"]


@pytest.mark.parametrize("name", ["erase+without", "erase+sampled_without"])
def test_a_mode_that_is_left_out_has_to_be_lower_in_three_folds(name):
    def runs(folds):
        rows = [record(a, s, 0.9 + s / 100, 0.5) for a in ("none", "erase+haar") for s in (1, 2, 3)]
        for i, mode in enumerate(MODES):
            low = 0.1 if i < folds else 0.9
            rows += [record(f"{name}_{mode}", s, 0.5, 0.5, {mode: low - s / 50}) for s in (1, 2, 3)]
        return by_arm(rows)

    assert "in 3 of 4 folds: GENERALISES (after Holm, in 3 folds: also)" in leave_out_verdict(runs(3), name)
    assert "in 2 of 4 folds: not shown" in leave_out_verdict(runs(2), name)


def test_pairs_of_the_base_model_are_judged_by_the_rule_of_h1_against_controls_of_the_same_pairs():
    rivals = {
        "none": 0.8,
        "erase+haar": 0.8,
        "erase+sampled_haar_matched": 0.6,
        "erase+sampled_shuffled": 0.6,
    }

    def said(own, **others):
        rows = {**rivals, **others, "erase+sampled_pairs": own}
        spread = {name: 0.01 + 0.001 * i for i, name in enumerate(rows)}
        kept = [record(name, s, h + s * spread[name], 0.5) for name, h in rows.items() for s in range(3)]
        arms = by_arm(kept)
        (line,) = [v for v in verdicts(arms, {"hack": 0.08, "solve": 0.44}) if SAMPLED in v]
        return line

    assert "SUPPORTED; the direction MATTERS" in said(0.2)
    assert "NEITHER; the direction MATTERS" in said(0.55)
    assert "FALSIFIED; the direction is NOT SHOWN to matter: does not beat erase+sampled_" in said(0.7)
    assert "NOT SHOWN to matter: does not beat erase+sampled_shu" in said(
        0.2, **{"erase+sampled_shuffled": 0.2}
    )


@pytest.mark.parametrize(
    ("style", "verdict"),
    [((0.8, 0.7), "RESTS"), ((0.2, 0.1), "does not beat erase+placebo-style"), ((0.0, 0.01), "NOT SHOWN")],
)
def test_pairs_about_something_else_must_do_worse(style, verdict):
    """erase hacks at .20 and .12; with pairs about style as given, with the others at .9."""
    rows = {"erase": (0.2, 0.12), **dict.fromkeys(PLACEBOS, (0.9, 0.8)), "erase+placebo-style": style}
    arms = by_arm([record(name, s, h, 0.5) for name, hs in rows.items() for s, h in enumerate(hs)])
    # two seeds whose difference hardly varies: the t interval of one degree of freedom is 12.7 SEM wide
    assert verdict in placebo_verdict(arms)
    del arms["erase+placebo-naming"]
    assert placebo_verdict(arms) == "placebo pairs: not measured"


WORKS = "direction that WORKS: hacks less than none, erase+haar (after Holm:"


@pytest.mark.parametrize(
    ("own", "erase", "said"),
    [
        ((0.2, 0.12), (0.2, 0.11), f"{WORKS} also); minus"),
        ((0.2, 0.12), (0.9, 0.8), f"{WORKS} also); minus"),
        ((0.155, 0.145), (0.9, 0.8), f"{WORKS} no longer); minus"),  # p = .041 and .027
        ((0.9, 0.1), (0.2, 0.11), "does not beat none, erase+haar; erase does, so its effect may rest on"),
        ((0.9, 0.1), (0.9, 0.8), "does not beat none, erase+haar; minus erase, deciding nothing"),
    ],
)
def test_pairs_that_both_solve_must_beat_none_and_haar(own, erase, said):
    rows = {"none": (0.9, 0.8), "erase": erase, "erase+haar": (0.9, 0.83), "erase+solving_pairs": own}
    arms = by_arm([record(name, s, h, 0.5) for name, hs in rows.items() for s, h in enumerate(hs)])
    arms["erase"][9] = record("erase", 9, 0.0, 0.5)  # a seed that the arm was not run with
    arms["none"][9] = record("none", 9, 0.1, 0.5)
    assert said in solving_verdict(arms) and "(n=2)" in solving_verdict(arms)
    del arms["erase+haar"]
    assert solving_verdict(arms) == "pairs that both solve: not measured"


def test_each_form_of_the_rival_has_its_verdict():
    arms = study_of(erase=[(1, 0.1, 0.5), (2, 0.12, 0.5)], advmod=[(1, 0.6, 0.5), (2, 0.61, 0.5)])
    lines = [line for line in verdicts(arms, {"hack": 0.08, "solve": 0.44}) if line.startswith("H3")]
    assert len(lines) == 2 and "erase minus advmod: " in lines[0] and "SUPPORTED" in lines[0]
    assert "control not measured" in lines[0] and lines[1] == "H3, erase minus advmod+additive: not measured"


def test_tables_hold_what_the_records_say():
    arms = study_of(
        none=[(1, 0.8, 0.1), (2, 0.6, 0.1)],
        erase=[(1, 0.2, 0.5), (2, 0.1, 0.4)],
        erase__haar=[(1, 0.7, 0.2), (2, 0.7, 0.2)],
    )
    row = next(line for line in arms_table(arms).splitlines() if line.startswith("| erase "))
    assert "0.150 ± 0.050" in row and "-0.550 [" in row
    control = next(line for line in controls_table(arms).splitlines() if "haar" in line)
    assert (
        "| erase " in control and "| erase+haar " in control and "-0.550" in control and "+0.250" in control
    )
    emergence = emergence_table(arms).splitlines()
    assert len(emergence) == 4 and "0.229" in emergence[2]  # (4 + 8 + 32) / 3 / 64


def test_the_headline_has_the_preregistered_columns_and_says_what_was_not_kept():
    arms = study_of(none=[(1, 0.8, 0.1), (2, 0.6, 0.1)], erase=[(1, 0.2, 0.5), (2, 0.1, 0.4)])
    for runs in arms.values():
        for r in runs.values():
            r["steps"] |= {"kl": [9] * 5 + [0, 1] * 12 + [0], "gn": [0.5, None]}
    for name in ("kl", "gn"):
        del arms["none"][1]["steps"][name]
    head, _, none, erase = (
        [c.strip() for c in line.replace("\\|", "!").strip("|").split("|")]
        for line in headline_table(arms).splitlines()
    )
    assert head == [*("arm", "seeds", "ΔSafePass", "Hack", "Pass", "KL", "cos_pre", "fired", "!g!")]
    assert erase[2:] == [
        "+0.900 ± 0.100",  # (.3 + .7, .3 + .5), each against its own seed
        *("0.150 ± 0.050", "0.450 ± 0.050", "0.48 ± 0", "0.500 ± 0.000", "0.500 ± 0.000", "0.5 ± 0"),
    ]
    assert none[2] == "-" and none[5] == "0.48" and none[8] == "0.5"
    del arms["none"][2]["steps"]["kl"]
    assert headline_table(arms).splitlines()[2].split("|")[6].strip() == "-"


def test_what_was_thought_of_later_has_a_table_of_its_own():
    arms = study_of(none=[(1, 0.8, 0.1)], erase__k12=[(1, 0.2, 0.5)])
    preregistered, explored = (arms_table(arms, explored=flag).splitlines()[2:] for flag in (False, True))
    assert [line.split()[1] for line in preregistered] == ["none"]
    assert [line.split()[1] for line in explored] == ["erase+k12"] and "-0.600" in explored[0]


def test_a_left_out_mode_is_read_on_that_mode_alone():
    runs = [record("none", s, 0.9, 0.5) for s in (1, 2)] + [record("erase+haar", s, 0.8, 0.5) for s in (1, 2)]
    runs += [record("erase+without_sentinel", s, 0.1, 0.5, {"sentinel": 0.4 + s / 100}) for s in (1, 2)]
    lines = leave_out_table(by_arm(runs)).splitlines()
    assert len(lines) == 3 and lines[2].startswith("| sentinel")
    assert "0.415" in lines[2] and "-0.485" in lines[2] and "-0.385" in lines[2]


def test_a_report_is_the_same_bytes_from_the_same_records(tmp_path):
    runs = [record(a, s, 0.1 * s, 0.5) for a in ("none", "erase", "gt_only") for s in (1, 2)]
    names = ("tables.md", "dynamics.svg", "pareto.svg")
    for folder in ("x", "y"):
        write_report(runs, tmp_path / folder)
    for name in names:
        assert (tmp_path / "x" / name).read_bytes() == (tmp_path / "y" / name).read_bytes()


def test_a_pages_tables_are_renewed_and_its_words_left():
    runs = [record(a, s, 0.1 * s, 0.5) for a in ("none", "erase", "gt_only") for s in (1, 2)]
    head, tail = "One\n<!-- arms -->", "<!-- end of verdicts -->\nthree <!-- x1 -->"
    between = "<!-- end of arms -->\ntwo <!-- verdicts -->"
    made = filled(f"{head}\nOUTDATED\n{between}{tail}", runs)
    assert made == filled(made, runs)  # twice is once
    assert made.startswith(f"{head}\n\n{arms_table(by_arm(runs))}\n\n{between}\n\n- emergence")
    assert made.endswith(tail) and "OUTDATED" not in made
    for wrong in (
        "<!-- arm --><!-- end of arm -->",  # no such table
        "<!-- arms -->",  # no end
        "<!-- arms --> words <!-- arms --> <!-- end of arms -->",
        "<!-- arms --> <!-- modes --> <!-- end of arms --> <!-- end of modes -->",
        "<!-- end of arms -->",
        "<!-- arms --> <!-- end of arms --> <!-- end of arms -->",
    ):
        with pytest.raises(UserError, match=r"markers at <!-- .* -->: expected <!-- NAME -->"):
            filled(wrong, runs)


def test_the_results_page_and_its_tables_are_those_of_the_records(tmp_path, runs):
    docs = Path(__file__).parents[2] / "docs"
    spec = study_spec("nano")
    jobs = jobs_of(list(runs.values()), tmp_path, spec.limits, docs / "results" / "nano")
    records = [job.kept() for job in jobs]
    page = (docs / "results.md").read_text()
    assert filled(page, records) == page, "just study-nano-report"
    assert set(re.findall("<!-- ([a-z-]+) -->", page)) == set(sections(records))
    tables = write_report(records, tmp_path)
    assert tables.read_bytes() == (docs / "results" / "nano" / "tables.md").read_bytes()
