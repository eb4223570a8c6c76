"""Studies: which runs are planned, when one counts as done, what is kept, and the tables made of it."""

import fcntl
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from projected_grpo import cli
from projected_grpo.config import PRESETS
from projected_grpo.errors import GATE_FAILED, UserError
from projected_grpo.pairs import load_pairs, packaged_pairs
from projected_grpo.results.statistics import Difference, by_arm, deployed, paired
from projected_grpo.study import verdicts as study_verdicts
from projected_grpo.study.plan import NANO_STUDY, PLACEBOS, SAMPLED, SERIES, plan, read_records, rounded
from projected_grpo.study.report import (
    arms_table,
    cell,
    controls_table,
    emergence_table,
    filled,
    leave_out_table,
    sections,
    shown,
    write_report,
)
from projected_grpo.study.verdicts import (
    emergence_verdict,
    h1_verdict,
    leave_out_verdict,
    placebo_verdict,
    solving_verdict,
    verdicts,
)

pytestmark = pytest.mark.usefixtures("unchecked_children")
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


def test_the_study_has_the_arms_and_seeds_that_were_preregistered():
    assert len({arm.name for arm in NANO_STUDY}) == len(NANO_STUDY)
    seeds = {arm.name: arm.seeds for arm in NANO_STUDY if not arm.explored}
    for arm in ("none", "erase", "route", "route2", "erase+haar", "route+haar", "route2+haar"):
        assert seeds.pop(arm) == 10
    folds = {name: n for name, n in seeds.items() if "without" in name}
    assert set(folds) == {f"erase+{own}without_{m}" for m in MODES for own in ("", "sampled_")}
    assert set(folds.values()) == {3}
    assert all(n == 5 for name, n in seeds.items() if name not in folds)


def test_the_arms_of_the_later_amendments_are_there_as_written():
    further = {arm.name: arm for arm in NANO_STUDY if arm.later and not arm.explored}
    assert set(further) == {
        *("advmod", "advmod+additive", "advmod+haar", "gt_penalty", "gt_screening", "inoculation", "posthoc"),
        *("posthoc+haar", "erase+placebo-style", "erase+placebo-iteration", "erase+placebo-naming"),
        *("route2+block", "absorb", "erase+solving_pairs"),
        *("erase+sampled_pairs", "erase+sampled_shuffled", "erase+sampled_haar_matched"),
        *(f"erase+sampled_without_{mode}" for mode in MODES),
    }
    for run in plan("nano", Path("kept"), list(further), max_seeds=1):
        arm = run.config["arm"]
        if arm["intervention"] == "advmod":
            form = "additive" if run.arm.name == "advmod+additive" else "multiplicative"
            assert (arm["advmod_alpha"], arm["advmod_form"]) == (2.0, form)
        pairs = run.config["basis"]["vhack_pairs_path"]
        of_its_own = run.arm.name.partition("erase+")[2].removesuffix("_pairs")
        sampled = of_its_own.startswith("sampled")
        assert pairs.partition("nano-")[2] == ("sampled" if sampled else of_its_own)


def test_a_fold_has_no_pair_of_the_mode_it_leaves_out(tmp_path):
    for run in plan("nano", tmp_path, [f"erase+without_{m}" for m in MODES]):
        left_out = run.arm.name.removeprefix("erase+without_")
        assert set(run.config["basis"]["vhack_pairs_modes"]) == set(MODES) - {left_out}


def test_a_plan_goes_through_first_seeds_first_and_each_run_has_a_file_of_its_own(tmp_path):
    runs = plan("nano", tmp_path)
    for later in (False, True):
        seeds = [r.seed for r in runs if r.arm.later == later]
        assert seeds == sorted(seeds)
    assert [r.arm.later for r in runs] == sorted(r.arm.later for r in runs)  # A1's runs before A2's
    assert len({r.record for r in runs}) == len(runs) == sum(arm.seeds for arm in NANO_STUDY)
    settings = [json.dumps(r.config, sort_keys=True) for r in runs]
    assert len(set(settings)) == len(runs)


def test_arms_differ_from_the_preset_only_by_their_options(tmp_path):
    (run,) = plan("nano", tmp_path, ["erase+flipped"], max_seeds=1)
    preset = PRESETS["nano"][1]
    assert run.config["arm"] == {**vars(preset.arm), "control": "flipped"} | {"half_a": []}
    assert run.config["optim"] == vars(preset.optim)


def test_an_unknown_arm_is_refused_with_those_there_are(tmp_path):
    with pytest.raises(UserError, match="--arms erase\\+hair.*erase\\+haar"):
        plan("nano", tmp_path, ["erase+hair"])


def test_pairs_that_lie_elsewhere_count_as_data_of_the_run(tmp_path, monkeypatch):
    def hashes() -> dict[str, str]:
        return {run.arm.name: run.data for run in plan("nano", tmp_path, max_seeds=1)}

    before = hashes()
    sampled = {name for name in before if name.startswith("erase+sampled")}
    of_their_own = {*PLACEBOS, "erase+solving_pairs", "erase+corpus_tasks", "erase+corpus_wordings", *sampled}
    assert len({before[name] for name in of_their_own}) == len(of_their_own) - len(sampled) + 1
    assert {data for name, data in before.items() if name not in of_their_own} == {before["none"]}
    monkeypatch.setattr("projected_grpo.study.plan.packaged_pairs", lambda name: packaged_pairs(name) + b" ")
    assert {name for name, data in hashes().items() if data != before[name]} == of_their_own


def test_a_run_is_done_only_under_the_settings_and_data_asked_for(tmp_path):
    (run,) = plan("nano", tmp_path, ["none"], max_seeds=1)
    assert not run.done
    with pytest.raises(UserError, match="no finished run"):
        read_records([run])
    run.record.write_text(json.dumps({"config": run.config, "data": run.data}))
    assert run.done
    (longer,) = plan("nano", tmp_path, ["none"], max_seeds=1, steps=99)
    assert longer.record == run.record
    for other, what in ((longer, "settings"), (replace(run, data="x"), "packaged data")):
        with pytest.raises(UserError, match=f"other {what}; move it away"):
            assert other.done


@given(
    st.recursive(
        st.floats() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_rounding_keeps_four_digits_and_makes_plain_json(value):
    text = json.dumps(rounded(value), allow_nan=False)
    again = rounded(json.loads(text))
    assert again == json.loads(text)
    if isinstance(value, float) and math.isfinite(value) and 1e-300 < abs(value) < 1e300:
        assert math.isclose(rounded(value), value, rel_tol=1e-3)


def test_a_record_made_before_an_option_existed_counts_as_made_with_its_default(tmp_path):
    run = plan("nano", tmp_path, ("none",), max_seeds=1)[0]
    older = json.loads(json.dumps(run.config))
    del older["loss"]["clip"], older["arm"]  # none's arm settings are the defaults but for the intervention
    run.record.write_text(json.dumps({"config": older, "data": run.data}))
    with pytest.raises(UserError, match="other settings"):
        assert run.done  # the default intervention is another
    older["arm"] = {"intervention": "none"}
    run.record.write_text(json.dumps({"config": older, "data": run.data}))
    assert run.done
    del older["optim"]["lr"]  # the preset's is not the default
    run.record.write_text(json.dumps({"config": older, "data": run.data}))
    with pytest.raises(UserError, match="other settings"):
        assert run.done
    older["optim"]["lr"] = run.config["optim"]["lr"]
    older["optim"]["abolished"] = 1
    run.record.write_text(json.dumps({"config": older, "data": run.data}))
    with pytest.raises(UserError, match="other settings"):
        assert run.done


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
    assert math.isclose(found.low, fmean(differences) - half, rel_tol=1e-4, abs_tol=1e-7)
    assert math.isclose(found.high, fmean(differences) + half, rel_tol=1e-4, abs_tol=1e-7)


def test_only_seeds_that_both_arms_have_are_paired():
    arms = study_of(a=[(1, 0.9, 0), (2, 0.5, 0)], b=[(2, 0.1, 0), (3, 0.7, 0)])
    assert paired(arms["a"], arms["b"], deployed("hack")) == Difference(0.4, 0.4, 0.4, 1)
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

    assert "direction MATTERS" in h1_verdict(arms((0.5, 0.6, 0.55)), "erase")
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


def test_the_page_tells_what_the_records_of_other_samplings_tell(monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "results.md").read_text()
    kept = Path(__file__).parents[2] / "docs" / "results" / "samplings"
    arms = by_arm([json.loads(path.read_text()) for path in kept.glob("*_seed*.json")])
    assert len(arms) == 8 and all(set(runs) == set(range(41, 46)) for runs in arms.values())
    verdicts = {}
    for own in ("sampled-98", "sampled-99"):
        rivals = ("erase+haar", f"{own}+haar_matched", f"{own}+shuffled")
        hack, solve = deployed("hack"), deployed("solve")
        differences = [paired(arms[own], arms["none"], key) for key in (hack, solve)]
        differences += [paired(arms[own], arms[rival], hack) for rival in rivals]
        pairs = len(load_pairs(kept / f"{own.removeprefix('sampled-')}.json").pairs)
        cells = [own, pairs, *(cell(arms[own], key) for key in (hack, solve)), *map(shown, differences)]
        assert f"| {' | '.join(map(str, cells))} |" in page.splitlines()
        monkeypatch.setitem(study_verdicts.MUST_BEAT, own, rivals)
        verdicts[own] = h1_verdict(arms, own)
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

    assert "in 3 of 4 folds: GENERALISES" in leave_out_verdict(runs(3), name)
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


@pytest.mark.parametrize(
    ("own", "erase", "said"),
    [
        ((0.2, 0.12), (0.2, 0.1), "direction that WORKS: hacks less than none, erase+haar; minus"),
        ((0.2, 0.12), (0.9, 0.8), "direction that WORKS: hacks less than none, erase+haar; minus"),
        ((0.9, 0.1), (0.2, 0.1), "does not beat none, erase+haar; erase does, so its effect may rest on"),
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


def test_the_results_page_and_its_tables_are_those_of_the_records(tmp_path):
    docs = Path(__file__).parents[2] / "docs"
    records = read_records(plan("nano", docs / "results" / "nano"))
    page = (docs / "results.md").read_text()
    assert filled(page, records) == page, "just study-nano-report"
    assert set(re.findall("<!-- ([a-z-]+) -->", page)) == set(sections(records))
    tables = write_report(records, tmp_path)
    assert tables.read_bytes() == (docs / "results" / "nano" / "tables.md").read_bytes()


def study_command(folder: Path, *more: str, steps: int = 1) -> list[str]:
    return [
        *("study", "nano", f"--steps={steps}", "--final-n-prompts", "8", "--max-seeds", "1"),
        *(f"--out={folder / 'kept'}", f"--work={folder / 'work'}", *more),
    ]


def test_a_study_runs_tells_what_failed_goes_on_and_reports(tmp_path, monkeypatch, capsys):
    broken = ("--intervention=none", "--model=/no/such/place")
    arms = tuple(replace(a, options=broken) if a.name == "erase" else a for a in NANO_STUDY)
    monkeypatch.setattr("projected_grpo.study.plan.STUDIES", {"nano": arms})
    assert cli.main(study_command(tmp_path, "--arms", "erase", "none", "erase+update")) == GATE_FAILED
    assert not (tmp_path / "kept" / "erase_seed41.json").exists()
    assert "no such folder" in (tmp_path / "work" / "erase_seed41" / "output.txt").read_text()
    kept = sorted(p.name for p in (tmp_path / "kept").iterdir())
    assert {"none_seed41.json", "erase+update_seed41.json", "tables.md", "pareto.png"} <= set(kept)
    data = json.loads((tmp_path / "kept" / "none_seed41.json").read_text())
    assert len(data["steps"]["hack_s"]) == 1 and data["summary"]["finished"] is True
    assert data["command"].endswith("--intervention=none --steps=1 --final-n-prompts=8 --seed=41")
    stamp = (tmp_path / "kept" / "none_seed41.json").stat().st_mtime_ns
    assert cli.main(study_command(tmp_path, "--arms", "none", "--report-only")) == 0
    assert "## Emergence" in capsys.readouterr().out
    assert cli.main(study_command(tmp_path, "--arms", "none")) == 0  # nothing left to do
    assert (tmp_path / "kept" / "none_seed41.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_killed_study_leaves_no_process_and_no_record(tmp_path, how):
    command = [
        sys.executable,
        "-m",
        "projected_grpo.cli",
        *study_command(tmp_path, "--arms", "none", "--jobs=1", steps=1000),  # not done before it is killed
    ]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
    study = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    signal.signal(signal.SIGINT, before)
    output = tmp_path / "work" / "none_seed41" / "output.txt"
    try:
        deadline = time.monotonic() + 120
        while not output.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(study.pid, how)
        assert study.wait(120) != 0
    finally:
        with suppress(ProcessLookupError):
            os.killpg(study.pid, signal.SIGKILL)
    assert not (tmp_path / "kept" / "none_seed41.json").exists()
    running = [
        p for p in Path("/proc").glob("[0-9]*/cmdline")
        if str(tmp_path).encode() in _read(p) and b"projected_grpo.train" in _read(p)
    ]  # fmt: skip
    deadline = time.monotonic() + 30
    while any(_read(p) for p in running) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(str(tmp_path).encode() in _read(p) for p in running)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_two_studies_do_not_share_a_folder(tmp_path, capsys):
    (tmp_path / "work").mkdir()
    with open(tmp_path / "work" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert cli.main(study_command(tmp_path, "--arms", "none")) == 2
    assert "another study" in capsys.readouterr().err


def test_trying_a_study_out_does_not_touch_the_real_ones_records(capsys):
    assert cli.main(["study", "nano", "--steps=1"]) == 2
    assert "--out of its own" in capsys.readouterr().err


def test_a_negative_count_is_refused(tmp_path, capsys):
    assert cli.main(study_command(tmp_path, "--jobs=-1")) == 2
    assert "--jobs" in capsys.readouterr().err
