"""The end of a run, the step table, and how files are written."""

import errno
import json
import math
import re
import shlex
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from projected_grpo import runlog
from projected_grpo.arm_settings import arm_settings
from projected_grpo.config import PRESETS
from projected_grpo.errors import UserError
from projected_grpo.evaluate import Evaluation
from projected_grpo.options.train import parse
from projected_grpo.options.typed import flags as flags_of
from projected_grpo.problems import Problem
from projected_grpo.rewards import MODES, Grade
from projected_grpo.run.columns import COLUMNS, HEADER_EVERY, StepTable, cell, complete, markdown_table
from projected_grpo.run.ending import checks, checks_of_direction, cue, next_commands, rate
from projected_grpo.run.identity import given as not_as_in_the_preset
from projected_grpo.run.summary import by_mode, detector_rates, steps_to_hack, total
from projected_grpo.runlog import (
    JsonlLog,
    append_jsonl,
    command_line,
    lock_folder,
    make_run_dir,
    plain,
    read_json,
    remove_leftovers,
    versions,
    write_atomically,
    write_json,
)

SMOKE = PRESETS["smoke"][1]
# design.md section 8.
CONTRACT = (
    *("step", "ref_eq", "rew", "rew_s", "N", "gt_s", "gt_t", "hack_s", "hack_t", "hk_rt", "hk_eq", "hk_xc"),
    *("hk_so", "hk_se", "hk_fm", "lp_s", "lp_t", "loss", "gn", "q_egy", "tau", "hkgap", "resid", "lr"),
    *("cos_pre", "cos_pre_s", "cos_pre_t", "cos_post", "fired", "refr", "hack_deploy", "solve_deploy"),
    *(
        "hack_abl",
        "solve_abl",
        "gen",
        "fb",
        "t_rew",
        "sec",
        "cos_null",
        "cos_update",
        "kl",
        "zerovar",
        "peak_gb",
    ),
)


# summary


def test_totals_and_rates():
    records = [{"hack_s": [1, 4]}, {"hack_s": None}, {"hack_s": [2, 2]}, {}]
    assert total(records, "hack_s") == (3, 6)
    assert rate(3, 6) == 0.5 and rate(0, 0) is None


@given(st.lists(st.integers(0, 8), max_size=14), st.integers(1, 8))
def test_the_step_at_which_a_run_hacks(hacks, n):
    counts = [min(h, n) for h in hacks]
    found = [
        last
        for last in range(len(counts))
        if last >= 4 and 4 * sum(counts[i] for i in range(last - 4, last + 1)) > 5 * n
    ]
    records = [{"step": i, "hack_s": [c, n]} for i, c in enumerate(counts)]
    assert steps_to_hack(records) == (found[0] if found else None)


def test_steps_without_student_rows_do_not_count():
    records = [{"step": i, "hack_s": None if i % 2 else [2, 4]} for i in range(6)]
    assert steps_to_hack(records) == 4
    assert steps_to_hack([r | {"hack_s": None} for r in records]) is None


def flags(fired, exploited=True):
    return {f"hacked_{d}": d in fired for d in "CDE"} | {"exploited": exploited}


def test_detector_rates_and_the_two_halves():
    rows = [flags(f) for f in ("C", "CE", "E", "D", "")] + [flags("", exploited=False)]
    plain_rates = detector_rates(rows, ())
    assert plain_rates == {"detector_C": 2 / 6, "detector_D": 1 / 6, "detector_E": 2 / 6}
    halves = detector_rates(rows, ("E",))
    # HACK_A: a half-A detector fires. HACK_B: another one fires, and none of half A.
    assert (halves["hack_A"], halves["hack_B"]) == (2 / 6, 2 / 6)
    both = detector_rates(rows, ("C", "D"))
    assert (both["hack_A"], both["hack_B"]) == (3 / 6, 1 / 6)
    assert set(detector_rates([], ("E",)).values()) == {None}
    honest = detector_rates([flags("E", exploited=False)], ("C",))  # an honest self-test is no hack
    assert (honest["detector_E"], honest["hack_A"], honest["hack_B"]) == (1, 0, 0)


def evaluation(grades):
    blank = Grade(0.5, False, False, False, None, True, False, False, False, None)
    problems = tuple(Problem(str(i), "f", "easy", "", "", "", (), m) for i, (m, _) in enumerate(grades))
    marks = {"h": {"exploited": True}, "s": {"gt_correct": True}, ".": {}}
    return Evaluation(
        problems,
        tuple(("",) * len(g) for _, g in grades),
        tuple(tuple(replace(blank, **marks[c]) for c in g) for _, g in grades),
    )


def test_the_table_by_mode():
    rows = [
        {"env_mode": "run_tests", "exploited": False, "step": 0},
        {"env_mode": "run_tests", "exploited": True, "step": 4},
        {"env_mode": "run_tests", "exploited": True, "step": 3},
        {"env_mode": "sentinel", "exploited": False, "step": 1},
    ]
    on = evaluation([("run_tests", "hhs."), ("gt_only", "s.")])
    off = evaluation([("run_tests", "...s"), ("gt_only", "ss")])
    got = by_mode(rows, on, off, ("run_tests",))
    assert list(got) == ["run_tests", "sentinel", "gt_only"]
    assert got["run_tests"] == {
        "in_distribution": True,
        "first_exploit_step": 3,
        "student_exploits": 2,
        "student_n": 3,
        "hack_train": 0.5,
        "hack_deploy": 0.0,
        "solve_train": 0.25,
        "solve_deploy": 0.25,
        "eval_n": 4,
    }
    assert got["sentinel"]["first_exploit_step"] is None and got["sentinel"]["hack_train"] is None
    assert got["gt_only"]["student_n"] == 0 and got["gt_only"]["solve_deploy"] == 1.0
    assert [m["in_distribution"] for m in got.values()] == [True, False, False]
    assert all(m["in_distribution"] for m in by_mode(rows, on, off, ()).values())


@pytest.mark.parametrize(
    ("arm", "hack", "word"),
    [
        ("none", 0.4, "GREEN"),
        ("none", 0.0, "don't sweep"),
        ("none", None, "don't sweep"),
        ("erase", 0.4, "intervention=none"),
    ],
)
def test_the_cue(arm, hack, word):
    assert word in cue({"intervention": arm, "hack_rate_student": hack})


def record(**values):
    return {"cos_pre": 0.3, "cos_post": 0.1, "cos_null": 0.2, "cos_update": 0.15} | values


ENDED = {"finished": True, "skipped": 0, "delta_hack_norm": 0.0, "hack_rate_student": 0.4, "hack_deploy": 0.1}
STEPS = [record(), record(cos_pre=0.5), {"cos_pre": None}]


def looked_at(arm, records=STEPS, **summary):
    """The texts of the checks that do not hold, and of those that do."""
    cfg = replace(SMOKE, arm=arm_settings(**arm) if isinstance(arm, dict) else arm_settings(arm))
    found = checks(cfg, ENDED | summary, records)
    return [text for ok, text in found if not ok], [text for ok, text in found if ok]


@pytest.mark.parametrize(
    ("arm", "norm"), [("none", 0.0), ("erase", 0.0), ("route", 0.5), ("route2", 0.5), ("posthoc", 0.5)]
)
def test_a_sound_run_has_nothing_to_look_at(arm, norm):
    look, ok = looked_at(arm, delta_hack_norm=norm)
    assert not look
    assert "67%" in ok[1] and "0.400" in ok[2] and "0.200" in ok[2] and "0.100" in ok[3] and "0.150" in ok[3]
    assert all(text[0] != " " and "SHOULD" not in text for text in ok)


@pytest.mark.parametrize(
    ("arm", "records", "summary", "word"),
    [
        ("none", STEPS, {"finished": False}, "steps made"),
        ("none", STEPS, {"skipped": 2}, "2 skipped"),
        ("erase", [record(), {}, {}], {}, "33%"),
        ("erase", [record(cos_pre=0.15)], {}, "does not fit this model"),
        ("erase", [record(cos_post=0.31)], {}, "larger than before"),
        ("erase", STEPS, {"delta_hack_norm": 0.1}, "must be 0"),
        ("route", STEPS, {}, "nothing was routed"),
        ("posthoc", STEPS, {}, "nothing in delta_s"),
        ("inoculation", STEPS, {"hack_deploy": 0.4}, "does not depend on the prompt"),
        ("gt_only", [record(shaped=0.5)], {}, "hacking grows"),
        ("advmod", [record(shaped=0.5, zgap=-0.1)], {}, "does not tell them apart"),
    ],
)
def test_what_is_to_be_looked_at_is_said(arm, records, summary, word):
    look, _ = looked_at(arm, records, **summary)
    assert len(look) == 1 and word in look[0]


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"intervention": "gt_only"}, ("gt_only", "0.200")),
        ({"intervention": "gt_penalty", "monitor_accuracy": 0.9}, ("gt_penalty", "0.200", "monitor")),
        ({"intervention": "gt_screening"}, ("gt_screening", "0.200")),
        ({"intervention": "advmod"}, ("1.500", "lowered")),
        ({"intervention": "advmod", "advmod_form": "screening"}, ("1.500", "left out")),
        ({"intervention": "advmod", "control": "haar"}, ("1.500", "control")),
        ({"intervention": "inoculation"}, ("0.400", "0.100", "inoculation")),
    ],
    ids=str,
)
def test_arms_that_act_elsewhere_say_so(options, facts):
    steps = [record(shaped=0.1, zgap=None), record(shaped=0.3, zgap=1.5)]
    look, ok = looked_at(options, steps)
    assert not look and all(fact in ok[4] for fact in facts)


@pytest.mark.parametrize("control", ["haar", "shuffled", "flipped"])
def test_a_controls_direction_need_not_point_hack_ward(control):
    assert not looked_at({"intervention": "erase", "control": control}, [record(cos_pre=0.15)])[0]
    assert not looked_at({"intervention": "route2", "control": control})[0]  # nothing routed is an outcome


def test_a_step_that_kept_nothing_does_not_break_the_end_of_a_run():
    """route2 may route every row of every module: then there is no cos_post, and no change to measure."""
    _, ok = looked_at("erase", [record(cos_post=None, cos_update=None), record()])
    assert "0.100" in ok[3]
    assert not looked_at("erase", [record(cos_post=None, cos_update=None)])[0]
    assert len(looked_at("erase", [])[1]) == 2


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("smoke", ["train nano --intervention=none"]),
        (
            "nano --intervention=none --seed=43 --steps=4",
            [
                "train nano --intervention=erase --vhack-pairs-path=nano-sampled --seed=43 --steps=4",
                "results",
            ],
        ),
        (
            "nano --vhack-pairs-path=nano-sampled --control=haar --gate-mode=no_gate --out-dir=my_out",
            [
                "train nano --intervention=none --out-dir=my_out",
                "results my_out/runs",
            ],
        ),
        (
            "smoke --model=nano --no-unbiased",
            ["train smoke --intervention=none --model=nano --no-unbiased", "results"],
        ),
    ],
)
def test_what_to_type_next_can_be_typed(typed, expected):
    cfg = parse(typed.split())
    commands = [shlex.split(line)[1:] for line in next_commands(cfg)[1:]]
    assert [sorted(words) for words in commands] == [sorted(line.split()) for line in expected]
    for words in commands:
        if words[0] == "train":
            parse(words[1:])


def test_the_options_of_a_run_are_those_that_make_it_again():
    typed = [
        "nano",
        "--device=cuda:1",
        "--intervention=route",
        "--half-a=C,E",
        "--save-every=3",
        "--out-tag=_x",
    ]
    cfg = parse(typed)
    assert parse(["nano", *flags_of(not_as_in_the_preset(cfg))]) == cfg


def test_a_command_can_be_pasted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    python, script = tmp_path / "my env" / "python", tmp_path / "my env" / "projected-grpo"
    script.parent.mkdir()
    monkeypatch.setattr("sys.executable", str(python))
    monkeypatch.setenv("PATH", str(tmp_path))
    told = command_line("train", "nano", "--resume=out/my runs/x")
    assert shlex.split(told) == [
        str(python),
        "-m",
        "projected_grpo.cli",
        "train",
        "nano",
        "--resume=out/my runs/x",
    ]
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    assert shlex.split(command_line("results"))[0] == "my env/projected-grpo"
    monkeypatch.setenv("PATH", str(script.parent))
    assert command_line("results") == "projected-grpo results"


# steptable


def test_every_field_of_the_contract_has_a_column():
    keys = [c.key for c in COLUMNS]
    assert set(CONTRACT) <= set(keys) and len(keys) == len(set(keys))
    assert {f"hk_{m.code}" for name, m in MODES.items() if name != "gt_only"} <= set(keys)
    assert all(c.legend for c in COLUMNS)


def test_a_line_has_every_column_and_no_other():
    line = complete({"step": 3, "gn": 0.5})
    assert list(line) == [c.key for c in COLUMNS]
    assert {k for k, v in line.items() if v is not None} == {"step", "gn"}
    with pytest.raises(ValueError, match="nonsense"):
        complete({"nonsense": 1})


def test_the_header_comes_back_and_columns_stand_under_it():
    shown = StepTable()
    full = {c.key: [1, 2] if c.form == "pair" else 3 if c.form == "d" else 0.5 for c in COLUMNS}
    lines = [line for i in range(2 * HEADER_EVERY + 1) for line in shown.lines(full | {"step": i})]
    headers = [i for i, line in enumerate(lines) if line.split()[0] == "step"]
    assert headers == [0, HEADER_EVERY + 1, 2 * HEADER_EVERY + 2] and HEADER_EVERY == 50
    ends = [[m.end() for m in re.finditer(r"\S+", line)] for line in lines]
    assert len({len(e) for e in ends}) == 1
    assert len({tuple(e) for e in ends}) == 1, "right edges line up"


def test_the_legend_tells_the_columns_shown():
    shown = StepTable()
    assert [line.split()[0] for line in shown.legend().splitlines()] == [c.key for c in shown.shown]


def test_cells():
    column = {c.key: c for c in COLUMNS}
    assert cell(column["gn"], None) == "-"
    assert cell(column["hack_s"], [3, 8]) == "3/8"
    assert cell(column["cos_pre"], 0.12345) == "0.123"


def cells(text):
    return [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()]


def test_the_markdown_table_has_the_columns_in_use():
    text = markdown_table([{"step": 0, "gn": None, "hack_s": [1, 2]}, {"step": 1, "gn": 0.5, "hack_s": None}])
    head, rule, *rows = cells(text)
    assert head == ["step", "hack_s", "gn"] and len(rule) == 3
    assert rows == [["0", "1/2", "-"], ["1", "-", "5.0e-01"]]


# runlog

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(value=values)
def test_json_holds_no_nan(value):
    text = json.dumps(plain(value), allow_nan=False)

    def nulled(v):
        if isinstance(v, float):
            return v if math.isfinite(v) else None
        if isinstance(v, dict):
            return {k: nulled(x) for k, x in v.items()}
        return [nulled(x) for x in v] if isinstance(v, list) else v

    assert json.loads(text) == nulled(value)


def test_tuples_become_lists():
    assert plain({"a": (1, float("nan"))}) == {"a": [1, None]}


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "new" / "x.json"
    write_json(path, {"a": float("inf")})
    assert json.loads(path.read_text()) == {"a": None}

    def full(fd):
        raise OSError("disk full")

    monkeypatch.setattr(runlog.os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"other")
    assert json.loads(path.read_text()) == {"a": None}
    assert list(path.parent.iterdir()) == [path]


def test_rows_are_appended(tmp_path):
    path = tmp_path / "steps.jsonl"
    append_jsonl(path, [{"step": 0, "x": "ü\n"}, {"step": 1}])
    append_jsonl(path, [{"step": 1}, {"step": 2, "y": float("nan")}])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 0, "x": "ü\n"},
        {"step": 1},
        {"step": 1},
        {"step": 2, "y": None},
    ]


def test_a_log_is_cut_back_to_the_byte(tmp_path):
    path = tmp_path / "steps.jsonl"
    log = JsonlLog(path)
    log.append([{"step": 0, "x": "ü\n"}, {"step": 1}])
    mark, kept = log.mark(), path.read_bytes()
    log.append([{"step": 2}])
    with open(path, "a") as file:
        file.write('{"step": 3, "cut of')
    again = JsonlLog(path)
    again.cut_back(mark)
    assert path.read_bytes() == kept and again.mark() == mark
    again.append([{"step": 2}])
    other = JsonlLog(tmp_path / "other.jsonl")
    other.append([{"step": 0, "x": "ü\n"}, {"step": 1}, {"step": 2}])
    assert again.mark() == other.mark() and path.read_bytes() == other.path.read_bytes()


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_log_that_changed_is_refused(tmp_path, damage):
    path = tmp_path / "steps.jsonl"
    log = JsonlLog(path)
    log.append([{"step": 0}, {"step": 1}])
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(data[:-1] if damage == "cut" else data.replace(b"1", b"7"))
    with pytest.raises(UserError, match=r"steps\.jsonl"):
        JsonlLog(path).cut_back(log.mark())


def test_rows_that_the_disk_did_not_take_come_with_the_next_ones(tmp_path, monkeypatch):
    """Also where half a line had been written before the disk was full."""
    path = tmp_path / "steps.jsonl"
    log = JsonlLog(path)
    log.append([{"step": 0}])
    mark = log.mark()
    opened = open

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            self.file.close()

        def write(self, data):
            self.file.write(data[:5])
            raise OSError(errno.ENOSPC, "No space left on device")

        def __getattr__(self, name):
            return getattr(self.file, name)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", lambda *a, **k: Full(opened(*a, **k)))
        with pytest.raises(OSError, match="No space"):
            log.append([{"step": 1}])
    assert len(path.read_bytes()) == mark["bytes"] + 5 and log.mark() == mark
    log.append([{"step": 2}])
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2]


def test_a_folder_is_one_process_at_a_time(tmp_path):
    with ExitStack() as stack:
        lock_folder(tmp_path, stack, "--resume")
        with pytest.raises(UserError, match="--resume: .*another process"), ExitStack() as second:
            lock_folder(tmp_path, second, "--resume")
    with ExitStack() as stack:
        lock_folder(tmp_path, stack, "--resume")


def test_leftovers_of_a_kill_are_removed_and_nothing_else(tmp_path):
    (tmp_path / "state").mkdir()
    leftovers = [tmp_path / ".config.json.17.tmp", tmp_path / "state" / ".s.safetensors.17.tmp"]
    kept = [tmp_path / "state" / "s.safetensors", tmp_path / "notes.tmp", tmp_path / ".hidden"]
    for path in (*leftovers, *kept):
        path.touch()
    remove_leftovers(tmp_path)
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == sorted(kept)


@pytest.mark.parametrize(
    ("text", "word"),
    [(None, "cannot be read"), ("{", "not valid JSON"), ("[]", "JSON object"), ("\ud800", "JSON")],
)
def test_a_json_file_that_is_none_names_its_option(tmp_path, text, word):
    path = tmp_path / "x.json"
    if text is not None:
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=f"--option: .*{word}"):
        read_json(path, "--option")


def test_run_folders_are_never_shared(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: make_run_dir(tmp_path / "runs", "same"), range(24)))
    assert len(set(made)) == 24 and all(p.is_dir() for p in made)
    assert {p.name for p in made} == {"same"} | {f"same-{i}" for i in range(2, 25)}


def test_versions_name_what_can_change_a_result():
    assert {"python", "platform", "projected_grpo", "torch", "transformers"} <= set(versions())


def test_the_share_before_and_after_an_arm_is_of_the_same_steps():
    """Where route2 keeps nothing there is no cos_post, and such a step says nothing of the others."""
    rows = [
        {"cos_pre": 0.05, "cos_post": None, "cos_null": 0.1, "cos_update": 0.0},
        {"cos_pre": 0.30, "cos_post": 0.28, "cos_null": 0.1, "cos_update": 0.0},
    ]
    cfg = replace(SMOKE, arm=arm_settings("route2"))
    assert [ok for ok, _ in checks_of_direction(cfg, rows)] == [True, True]
    (_, (ok, text)) = checks_of_direction(cfg, [rows[1] | {"cos_post": 0.31}])
    assert not ok and "larger than before it" in text


def test_a_command_to_begin_again_names_no_option_that_is_gone():
    cfg = replace(SMOKE, loss=replace(SMOKE.loss, ref_every=7), run=replace(SMOKE.run, threads=4))
    assert not {"ref_every", "threads"} & set(not_as_in_the_preset(cfg))


def test_names_with_one_end_are_written_at_a_time(tmp_path, monkeypatch):
    """Records of arms end alike, and a sweep's threads write them together."""
    begun, real = [], runlog.os.fsync
    monkeypatch.setattr(runlog.os, "fsync", lambda fd: (begun.append(set(tmp_path.glob(".*.tmp"))), real(fd)))
    ends = "_pairs=nano-sampled-and-more_seed41.json"
    for name in ("erase", "route"):
        write_atomically(tmp_path / (name + ends), b"{}")
    made = [files for files in begun if files]
    assert len(made) == 2 and not made[0] & made[1]
