"""Tables, paired differences and verdicts over finished runs."""

import csv
import io
import itertools
import json
import math
from dataclasses import replace
from statistics import fmean, stdev

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_runs import a_run, config, made, steps_of, summary
from projected_grpo import cli
from projected_grpo.errors import UserError
from projected_grpo.results.compare import baseline, modes, notes, paired, rates
from projected_grpo.results.runs import finished, grouped, mean_sem, read_runs
from projected_grpo.results.statistics import Difference, holm
from projected_grpo.results.tables import LEGEND, marked, render, tables
from projected_grpo.runlog import write_json
from projected_grpo.study.hypotheses import h4_verdict, rate_at_the_end, verdicts
from projected_grpo.study.verdicts import h3_verdict


def read(folder):
    return grouped(finished(read_runs([folder])))


def cells(text):
    return [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()]


def table_of(estimates):
    """The first table of some estimates: its rows as dicts."""
    table = tables(estimates)[0]
    return [dict(zip(table.headers, row, strict=True)) for row in table.rows]


# Reading and grouping


def test_seeds_of_one_setting_stand_together(tmp_path):
    for seed, hack in ((41, 0.2), (42, 0.4), (43, 0.6)):
        made(tmp_path, f"r{seed}", seed=seed, hack_rate_student=hack, hack_deploy=None)
    made(tmp_path, "none", "none")
    none, routed = table_of(rates(read(tmp_path)))
    assert (none["arm"], routed["arm"]) == ("none", "route2")
    assert routed["seeds"] == "41 42 43" and routed["model"] == "tiny-random"
    assert routed["hack_rate_student"] == f"0.400 ± {0.2 / math.sqrt(3):.3f}"
    assert routed["hack_deploy"] == "-" and routed["solve_deploy"] == "0.250 ± 0.000"


def test_mean_and_sem():
    assert mean_sem([]) == "-" and mean_sem([0.5]) == "0.500"
    assert mean_sem([0.0, 1.0]) == "0.500 ± 0.500"  # s = sqrt(1/2), over sqrt(2)


@pytest.mark.parametrize(
    "options",
    [
        {"arm": {"mask_unflagged": "absorb"}},
        {"arm": {"control": "haar"}},
        {"optim": {"lr": 1e-3}},
        {"teacher": {"mix_ratio": 0.0}},
        {"basis": {"v_hack_k": 2}},
        {"sampling": {"group": 8}},
    ],
    ids=str,
)
def test_runs_of_different_settings_are_never_averaged(tmp_path, options):
    """A random-direction control is not a second run of the real one."""
    made(tmp_path, "a", hack_rate_student=0.0)
    made(tmp_path, "b", hack_rate_student=1.0, options=options)
    made(tmp_path, "c", seed=42, hack_rate_student=1.0, options=options)
    rows = table_of(rates(read(tmp_path)))
    assert sorted(row["hack_rate_student"] for row in rows) == ["0.000", "1.000 ± 0.000"]
    (value,) = next(iter(options.values())).values()
    assert len({(row["arm"], row["options"]) for row in rows}) == 2
    assert any(str(value) in row["arm"] + row["options"] for row in rows)


def test_where_a_run_was_made_does_not_make_it_another_setting(tmp_path):
    made(tmp_path, "a", hack_rate_student=0.0)
    elsewhere = {"run": {"out_tag": "_x", "workers": 4, "seed": 42}}
    elsewhere["model"] = {"svd_cache": tmp_path, "device": "cpu"}
    made(tmp_path, "b", hack_rate_student=1.0, options=elsewhere)
    (row,) = table_of(rates(read(tmp_path)))
    assert row["seeds"] == "41 42"


def test_the_newest_of_two_runs_of_one_seed_counts(tmp_path):
    made(tmp_path, "20260101T000000_x", hack_rate_student=0.1)
    made(tmp_path, "20260102T000000_x", hack_rate_student=0.9)
    (row,) = table_of(rates(read(tmp_path)))
    assert row["hack_rate_student"] == "0.900"


def test_unfinished_runs_are_left_out(tmp_path):
    kept = made(tmp_path, "a")
    made(tmp_path, "b", seed=42, finished=False)
    (made(tmp_path, "c") / "summary.json").unlink()
    assert [run.name for run in read_runs([tmp_path])] == ["a", "b"]
    assert [run.name for run in finished(read_runs([tmp_path]))] == ["a"]
    assert [run.name for run in read_runs([kept])] == ["a"]
    with pytest.raises(UserError, match="b ended early"):
        finished(read_runs([tmp_path / "b"]))


def test_nothing_to_show_is_the_users_mistake(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="no finished run"):
            read_runs([folder])


def test_a_damaged_summary_is_named(tmp_path):
    (made(tmp_path, "a") / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary\.json is not valid JSON"):
        read_runs([tmp_path])


def test_a_study_record_is_read_like_the_run_it_was_made_from(tmp_path):
    run = made(tmp_path, "x_seed41", steps=steps_of(3, hack_s=lambda i: [i, 4]))
    (folder,) = read_runs([run])
    record = {"summary": folder.summary, "config": folder.config, "steps": folder.steps, "git_commit": "abc"}
    del record["config"]["run"]["workers"]  # a record does not keep where it was made
    (tmp_path / "kept").mkdir()
    write_json(tmp_path / "kept" / "x_seed41.json", record)
    for place in (tmp_path / "kept", tmp_path / "kept" / "x_seed41.json"):
        (kept,) = read_runs([place])
        assert kept.setting == folder.setting and kept.rate("hack_s", 2) == folder.rate("hack_s", 2) == 3 / 8
    write_json(tmp_path / "kept" / "y_seed41.json", {"summary": {}})
    with pytest.raises(UserError, match=r"y_seed41\.json is no study record"):
        read_runs([tmp_path / "kept"])


def test_a_run_from_before_there_were_kinds_of_held_out_problems_is_read(tmp_path):
    run = made(tmp_path, "old")
    kept = {name: value for name, value in summary(config()).items() if name != "by_split"}
    write_json(run / "summary.json", kept)
    (found,) = read_runs([run])
    assert modes({found.setting: {41: found}}) == []


# Figures


def test_student_rates_of_the_last_steps_pool_their_counts(tmp_path):
    rows = steps_of(hack_s=lambda i: [i % 4, 4 + i], gt_s=lambda i: None if i == 29 else [1, 2])
    made(tmp_path, "a", steps=rows)
    (row,) = table_of(rates(read(tmp_path)))
    last = rows[-5:]
    hacks, n = (sum(r["hack_s"][k] for r in last) for k in (0, 1))
    assert row["hack_last5"] == f"{hacks / n:.3f}" and row["pass_last5"] == "0.500"


def test_the_headline_has_the_preregistered_columns(tmp_path, capsys):
    kl = steps_of(kl=lambda i: 100.0 if i < 5 else (None if i % 2 else i / 10), gn=lambda i: 0.002)
    for seed, hack, solve in ((41, 0.1, 0.6), (42, 0.3, 0.4)):
        made(tmp_path, f"e{seed}", "erase", seed=seed, hack_deploy=hack, solve_deploy=solve, steps=kl)
        made(tmp_path, f"v{seed}", "none", seed=seed, hack_deploy=0.9, solve_deploy=0.3)
    assert cli.main(["results", str(tmp_path), "--table=headline"]) == 0
    head, _, *rows = cells(capsys.readouterr().out.replace("\\|", "!").partition("\n\n")[0])
    assert head == [
        *("arm", "policy", "seeds", "ΔSafePass", "Hack", "Pass", "KL", "cos_pre", "fired", "!g!"),
    ]
    table = {(row[0], row[1]): dict(zip(head, row, strict=True)) for row in rows}
    deployed = table["erase", "deployed"]
    assert deployed["ΔSafePass"] == "+0.900 ± 0.200"  # (.5 + .6, .1 + .6), each against its own seed
    assert deployed["Hack"] == "0.200 ± 0.100" and deployed["Pass"] == "0.500 ± 0.100"
    trained = table["erase", "as trained"]
    expected = fmean(i / 10 for i in range(6, 30, 2))  # the 25 steps from 5 on, those measured
    assert trained["KL"].startswith(f"{expected:.2g}") and trained["!g!"].startswith("0.002")
    assert trained["cos_pre"] == "0.250 ± 0.000" and trained["ΔSafePass"] == "+0.000 ± 0.000"
    assert table["none", "deployed"]["ΔSafePass"] == "-"


def test_modes_tell_which_were_held_out(tmp_path, capsys):
    made(tmp_path, "a", modes=("run_tests", "sentinel"))
    assert cli.main(["results", str(tmp_path), "--table=modes"]) == 0
    head, _, *rows = cells(capsys.readouterr().out.partition("\n\n")[0])
    found = {row[head.index("of")]: row[head.index("hack, deployed")] for row in rows}
    assert found == {"run_tests": "0.250", "sentinel (held out)": "0.250"}


# Paired differences


@given(values=st.lists(st.integers(-8, 8), min_size=2, max_size=7))
def test_the_sign_flip_p_is_the_share_of_all_sign_patterns(values):
    """Eighths are exact, so ties are ties."""
    flips = [
        sum(map(math.prod, zip(values, s, strict=True)))
        for s in itertools.product((1, -1), repeat=len(values))
    ]
    difference = Difference(tuple(v / 8 for v in values))
    expected = sum(abs(flip) >= abs(sum(values)) for flip in flips) / len(flips)
    assert difference.sign_flip == pytest.approx(expected)
    assert difference.sign_flip >= difference.least_sign_flip == 2 / len(flips)


@given(st.lists(st.floats(0, 1) | st.just(math.nan), max_size=6))
def test_holm_rejects_what_going_down_from_the_smallest_p_rejects(ps):
    """At every level that is one of the adjusted values, and just below it."""

    def rejected(level):
        found, left = set(), {i for i, p in enumerate(ps) if not math.isnan(p)}
        while left and len(left) * min(ps[i] for i in left) <= level:
            smallest = min(left, key=lambda i: ps[i])
            left.remove(smallest)
            found.add(smallest)
        return found

    adjusted = holm(ps)
    assert [math.isnan(p) for p in adjusted] == [math.isnan(p) for p in ps]
    for level in {p for p in adjusted if p < 1}:
        for alpha in (level, math.nextafter(level, -1)):
            assert {i for i, p in enumerate(adjusted) if p <= alpha} == rejected(alpha)


def test_a_difference_is_bold_after_holm_alone():
    clear, doubtful = Difference((-0.30, -0.31, -0.29)), Difference((-0.2, -0.1, -0.15))
    text, p = marked(clear, 0.02)
    assert text == f"**{clear}**" and p == "<0.001 / 0.020 / 0.250 (0.250)"
    assert marked(doubtful, 0.06) == (f"{doubtful}*", "0.035 / 0.060 / 0.250 (0.250)")
    assert marked(Difference((0.1, -0.1)), 1.0)[0] == "+0.000 [-1.271, +1.271]"
    assert marked(Difference((0.1,)), math.nan) == ("+0.100 (n=1)", "-")
    assert marked(Difference((0.1, 0.1)), math.nan) == ("+0.100 [+0.100, +0.100]", "- / - / 0.500 (0.500)")
    assert marked(None, math.nan) == ("-", "-")


def test_the_family_is_one_metric_of_one_policy_in_one_context():
    rng = np.random.default_rng(0)
    runs = [
        a_run(arm, s, options, hack_deploy=rng.random(), hack_train=rng.random())
        for options in (None, {"optim": {"lr": 1.0}})
        for arm in ("none", "erase", "route", "route2")
        for s in (1, 2, 3)
    ]
    found = paired(grouped(runs))
    families = {(e.setting.context, e.metric, e.policy) for e in found}
    assert len(families) == 2 * 3 * 2 and len(found) == len(families) * 3  # contexts, metrics, policies; arms
    for family in families:
        own = [e for e in found if (e.setting.context, e.metric, e.policy) == family]
        assert len(own) == 3 and [e.holm for e in own] == holm([e.difference.p for e in own])


def test_pairs_are_of_one_seed_and_one_context():
    runs = [a_run("erase", s, hack_deploy=h) for s, h in ((1, 0.1), (2, 0.4), (3, 0.2), (9, 0.0))]
    runs += [a_run("none", s, hack_deploy=h) for s, h in ((1, 0.9), (2, 0.5), (3, 0.7), (8, 0.0))]
    runs += [a_run("none", s, {"optim": {"lr": 1.0}}, hack_deploy=0.0) for s in (1, 2, 3)]
    found = [e for e in paired(grouped(runs)) if (e.metric, e.policy) == ("Δhack", "deployed")]
    (estimate,) = found
    assert estimate.by_seed == pytest.approx({1: -0.8, 2: -0.1, 3: -0.5})
    half = 4.302653 * stdev((-0.8, -0.1, -0.5)) / math.sqrt(3)  # Student's t of two degrees of freedom
    assert estimate.difference.interval == pytest.approx((estimate.mean - half, estimate.mean + half))
    told = " | ".join(notes(grouped(runs)))
    assert "3 of 4 seeds are also of none" in told and "2 contexts" in told


def test_one_seed_has_no_interval_and_says_why():
    groups = grouped([a_run(arm, 1) for arm in ("erase", "none")])
    text = render("json", paired(groups), [])
    assert {(e["low"], e["p"], e["p_sign_flip"]) for e in json.loads(text)["estimates"]} == {
        (None, None, None)
    }
    assert "(n=1)" in render("markdown", paired(groups), [])
    assert any("no interval against none: 1 of 2 shared seeds" in note for note in notes(groups))


def test_without_a_baseline_of_the_context_there_is_no_difference():
    runs = [a_run("erase", 1), a_run("none", 1, {"optim": {"steps": 60}})]
    groups = grouped(runs)
    assert paired(groups) == []
    assert any("no difference from none: no arm none in its context" in note for note in notes(groups))


def test_the_baseline_shares_the_options_it_can_share():
    k2 = {"basis": {"v_hack_k": 2}}
    plain, other, arm = a_run("none"), a_run("none", 41, k2), a_run("erase", 41, k2)
    everything = grouped([plain, other, arm])
    assert baseline(everything, arm.setting, "none") == other.setting
    without = grouped([plain, arm])
    assert baseline(without, arm.setting, "none") == plain.setting
    assert any("options of arm or basis differ" in note for note in notes(without))
    ambiguous = grouped([other, a_run("none", 41, {"basis": {"v_hack_k": 3}}), a_run("erase")])
    assert baseline(ambiguous, a_run("erase").setting, "none") is None
    assert any("several fit" in note for note in notes(ambiguous))


def test_against_another_arm(tmp_path, capsys):
    for seed in (1, 2, 3):
        made(tmp_path, f"e{seed}", "erase", seed=seed, hack_train=0.2)
        haar = {"arm": {"control": "haar"}}
        made(tmp_path, f"h{seed}", "erase", seed=seed, options=haar, hack_train=0.2 + seed / 10)
    asked = ["results", str(tmp_path), "--table=paired", "--format=json"]
    assert cli.main([*asked, "--against=erase+haar"]) == 0
    rows = json.loads(capsys.readouterr().out)["estimates"]
    (row,) = [r for r in rows if (r["metric"], r["policy"]) == ("Δhack", "as trained")]
    assert row["arm"] == "erase" and row["mean"] == pytest.approx(-0.2)
    assert row["by_seed"] == pytest.approx({"1": -0.1, "2": -0.2, "3": -0.3})
    assert cli.main([*asked, "--against=erace"]) == 2
    assert "--against erace: no run of that arm; there are erase, erase+haar" in capsys.readouterr().err
    for nothing_paired in (["--table=headline"], ["--table=modes"], ["--falsify"]):
        assert cli.main(["results", str(tmp_path), *nothing_paired, "--against=erase+haar"]) == 2
        assert "--table paired" in capsys.readouterr().err


# Forms


@pytest.fixture
def folder(tmp_path):
    for arm, hack in (("none", 0.8), ("erase", 0.2)):
        for seed in (1, 2, 3):
            rates = {"hack_deploy": hack + seed / 50, "solve_deploy": 0.4}
            made(tmp_path / "runs", f"{arm}{seed}", arm, seed=seed, **rates, modes=("run_tests",))
    return tmp_path / "runs"


def test_the_default_output_begins_with_the_rates(folder, capsys):
    assert cli.main(["results", str(folder)]) == 0
    out = capsys.readouterr().out
    head = cells(out)[0]
    assert head[:14] == [
        *("preset", "model", "problems", "env_mode", "steps", "arm", "options", "seeds"),
        *("hack_rate_student", "pass_rate_student", "hack_train", "hack_deploy", "solve_train"),
        "solve_deploy",
    ]
    titles = [line.split()[1].strip(":") for line in out.splitlines() if line.startswith("## ")]
    assert titles == ["Headline", "Paired", "Held-out"]


def test_csv_and_json_hold_the_same_figures(folder, capsys):
    assert cli.main(["results", str(folder), "--format=csv"]) == 0
    flat = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert cli.main(["results", str(folder), "--format=json"]) == 0
    rows = json.loads(capsys.readouterr().out)["estimates"]
    assert len(flat) == len(rows) > 40
    for a, b in zip(flat, rows, strict=True):
        for key, text in a.items():
            assert text == ("" if b[key] is None else str(b[key]))
    (delta,) = [r for r in rows if (r["table"], r["metric"], r["policy"]) == ("paired", "Δhack", "deployed")]
    assert delta["mean"] == pytest.approx(-0.6) and delta["low"] <= delta["mean"] <= delta["high"]
    assert delta["p_sign_flip"] == delta["p_sign_flip_least"] == 0.25 and delta["p"] is None  # all alike


def test_latex_is_a_table_that_compiles_as_it_stands(folder, capsys):
    assert cli.main(["results", str(folder), "--format=latex", "--table=paired"]) == 0
    out = capsys.readouterr().out
    body = "\n".join(line for line in out.splitlines() if not line.startswith("%"))
    assert body.count(r"\begin{tabular}") == body.count(r"\end{tabular}") == 1
    assert r"\toprule" in body and r"$\Delta$hack" in body and "$-$0.600" in body
    assert body.isascii() and "|" not in body.replace("|g|", "")
    columns = body.split("{tabular}{")[1].split("}")[0]
    rows = [line for line in body.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 3 and {row.count("&") + 1 for row in rows} == {len(columns)}
    assert LEGEND in out and "**" not in body


def test_a_table_goes_to_a_file(folder, tmp_path, capsys):
    out = tmp_path / "new" / "table.csv"
    assert cli.main(["results", str(folder), "--format=csv", f"--out={out}"]) == 0
    assert capsys.readouterr().out == ""
    assert out.read_text().startswith("table,preset,") and out.read_text().endswith("\n")


# Verdicts


def told(runs, hypothesis):
    return [v.text for v in verdicts(grouped(runs)) if v.hypothesis == hypothesis]


def seeds_of(arm, hacks, solve=0.5, options=None):
    return [a_run(arm, s, options, hack_deploy=h, solve_deploy=solve) for s, h in enumerate(hacks, start=1)]


def test_missing_arms_are_not_measured():
    found = {v.hypothesis: v.text for v in verdicts(grouped([a_run("gt_only")]))}
    assert found == {
        "H1": "erase, route, route2: not measured",
        "H3": "advmod: not measured",
        "H4": "none: not measured",
    }
    assert told([a_run("erase", 1), a_run("erase", 2)], "H1") == ["erase: not measured"]


def test_h1_is_judged_per_family_of_options_with_the_studys_rule():
    k2 = {"basis": {"v_hack_k": 2}}
    runs = seeds_of("none", (0.9, 0.8, 0.85)) + seeds_of("erase", (0.2, 0.21, 0.22))
    runs += seeds_of("erase", (0.8, 0.82, 0.81), options=k2)
    found = {v.options: v.text for v in verdicts(grouped(runs)) if v.hypothesis == "H1"}
    assert "SUPPORTED" in found[""] and "controls not measured" in found[""]
    assert "FALSIFIED" in found["k=2"]


@pytest.mark.parametrize(
    ("erase", "advmod", "solve", "verdict"),
    [
        ((0.1, 0.12, 0.11), (0.5, 0.52, 0.55), 0.5, "SUPPORTED"),
        ((0.1, 0.12, 0.11), (0.5, 0.52, 0.55), 0.7, "NEITHER"),  # erase solves 20 points less
        ((0.5, 0.52, 0.55), (0.1, 0.12, 0.11), 0.5, "FALSIFIED"),
        ((0.5, 0.52, 0.55), (0.1, 0.12, 0.11), 0.3, "NEITHER"),  # the rival pays for it in solve
        ((0.5, 0.3, 0.4), (0.3, 0.5, 0.41), 0.5, "FALSIFIED"),  # within one SEM
        ((0.4, 0.3, 0.1), (0.5, 0.5, 0.5), 0.5, "NEITHER"),  # beyond one SEM, but the interval has zero
    ],
)
def test_h3_is_judged_by_the_amendments_rule(erase, advmod, solve, verdict):
    runs = seeds_of("erase", erase) + seeds_of("advmod", advmod, solve)
    (text,) = told(runs, "H3")
    assert text.startswith("erase minus advmod: Δ hack") and f": {verdict}; " in text
    assert "control not measured" in text


def test_h3_takes_each_form_by_itself_and_its_own_control():
    runs = seeds_of("erase", (0.5, 0.52, 0.55))
    runs += seeds_of("advmod", (0.1, 0.12, 0.11))
    runs += seeds_of("advmod", (0.9, 0.95, 0.91), options={"arm": {"advmod_form": "additive"}})
    runs += seeds_of("advmod", (0.6, 0.65, 0.61), options={"arm": {"control": "haar"}})
    additive, plain = sorted(told(runs, "H3"), key=lambda text: "additive" not in text)
    assert "erase minus advmod:" in plain and "FALSIFIED; its direction MATTERS" in plain
    assert (
        "erase minus advmod form=additive:" in additive
        and "SUPPORTED; its direction: control not" in additive
    )
    assert h3_verdict("advmod", {}, {}) == "erase minus advmod: not measured"


def test_h4_asks_for_the_last_five_of_the_first_two_hundred_steps():
    late = steps_of(260, hack_s=lambda i: [4 if i >= 197 else 1, 4])  # .70 over steps 195 to 199
    early = steps_of(200, hack_s=lambda i: [3 if 50 <= i < 55 else 0, 4])
    assert rate_at_the_end(a_run(steps=late)) == 0.7
    assert rate_at_the_end(a_run(steps=early)) == 0
    assert rate_at_the_end(a_run(steps=[])) is None
    assert rate_at_the_end(a_run(steps=steps_of(2, hack_s=lambda i: None))) is None
    assert h4_verdict({1: a_run(steps=early)}).endswith("FALSIFIED")
    assert h4_verdict({1: a_run(steps=late)}).endswith("SUPPORTED")
    assert h4_verdict({1: a_run(steps=early), 2: a_run(seed=2, steps=late)}).endswith("SUPPORTED")  # .35
    assert h4_verdict({1: a_run(steps=late[:40])}).endswith("OPEN: only 40 of 200 steps were made")
    assert h4_verdict({1: a_run(steps=late[197:])}).endswith("SUPPORTED")  # within 63 steps


def test_a_rate_of_24_percent_rarely_supports_h4():
    """200 runs of 200 steps of 32 completions. The rule before took the highest of any five steps."""

    def highest(hacks):
        return max(sum(hacks[i : i + 5]) / (5 * 32) for i in range(len(hacks) - 4))

    run, supported, before = a_run(), 0, 0
    for hacks in np.random.default_rng(0).binomial(32, 0.24, size=(200, 200)).tolist():
        made_of = replace(run, steps={"hack_s": [[count, 32] for count in hacks]})
        supported += h4_verdict({1: made_of}).endswith("SUPPORTED")
        before += highest(hacks) > 0.30
    assert supported < 0.1 * 200 and before > 0.7 * 200


def test_a_run_that_ended_early_counts_in_the_verdicts_and_is_told(tmp_path, capsys):
    for seed, done in ((1, True), (2, False)):
        made(tmp_path, f"n{seed}", "none", seed=seed, hack_deploy=0.9, finished=done)
        made(tmp_path, f"e{seed}", "erase", seed=seed, hack_deploy=0.1 + seed / 100)
    assert cli.main(["results", str(tmp_path), "--falsify"]) == 0
    out = capsys.readouterr().out
    assert "Δ hack -0.785 [" in out and "ended early, counted as they ended: n2" in out
    for form in ("csv", "json", "latex"):
        assert cli.main(["results", str(tmp_path), "--falsify", f"--format={form}"]) == 0
        assert "SUPPORTED" in capsys.readouterr().out
