"""The HTML page: what it embeds, that nothing in it can become markup or load anything, what is marked."""

import json
import re
from html.parser import HTMLParser
from importlib.resources import files

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_runs import a_run, made
from hacks import CANONICAL, HACKS, WRONG
from projected_grpo import cli
from projected_grpo.results.report import FLAGS, PLAIN, embedded, labels, report_data, thinned, triggers
from projected_grpo.results.runs import read_runs
from projected_grpo.rewards import MODES
from projected_grpo.run.columns import COLUMNS
from projected_grpo.runlog import append_jsonl

EVIL = "</script><img src=x onerror=alert(1)><!-- \u2028 \ud800 ```python\nprint('<b>')"


class Page(HTMLParser):
    """Tags and the text of every script of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script":
            self.scripts[-1] += data

    @property
    def data(self):
        return json.loads(self.scripts[0])


def rollout(step, gi=0, **values):
    row = {"step": step, "p_idx": 0, "gi": gi, "problem_id": "p1", "env_mode": "sentinel", "prompt": "Solve"}
    row |= dict.fromkeys(FLAGS, False) | {"text": "", "reward": 0.5, "mechanism": None, "error": None}
    return row | values


@pytest.fixture
def run(tmp_path):
    folder = made(tmp_path / "runs", "none_41", "none")
    rows = [rollout(0), rollout(0, 1, text=EVIL, problem_id=EVIL, env_mode=EVIL, error=EVIL)]
    rows += [rollout(7, 0, exploited=True, ablated=True, mechanism="sentinel", reward=3.0)]
    append_jsonl(folder / "rollouts.jsonl", [{**row, "text": row["text"]} for row in rows])
    return folder


def page_of(run, tmp_path, *more):
    out = tmp_path / "page.html"
    assert cli.main(["report", str(run), f"--out={out}", *more]) == 0
    return out.read_text()


def test_the_page_holds_every_rollout_as_it_was_written(run, tmp_path):
    data = Page(page_of(run, tmp_path)).data
    (shown,) = data["runs"]
    columns, strings = shown["rollouts"], data["strings"]
    written = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    assert columns["total"] == len(written) == len(columns["step"])
    for i, row in enumerate(written):
        assert {name: columns[name][i] for name in ("step", "p_idx", "gi", "reward", "text")} == {
            name: row[name] for name in ("step", "p_idx", "gi", "reward", "text")
        }
        for name in ("problem_id", "env_mode", "prompt", "mechanism", "error"):
            assert strings[columns[name][i]] == (row[name] or "")
        fired = {flag for bit, flag in enumerate(data["flags"]) if columns["flags"][i] >> bit & 1}
        assert fired == {flag for flag in FLAGS if row[flag]}
    assert shown["summary"]["name"] == "none" and len(shown["steps"]["hack_s"]) == 30
    assert shown["config"]["optim.lr"] == 7e-5 and "tau" not in shown["steps"]


def test_scores_of_tokens_are_embedded_where_they_are_of_the_text(run, tmp_path, capsys):
    def line(step, gi, chars, **figures):
        figures = {"logp": [-0.5] * len(chars), "hackward": [None] * len(chars)} | figures
        return {"step": step, "p_idx": 0, "gi": gi, "chars": chars} | figures

    def shown(*lines):
        (run / "tokens.jsonl").unlink(missing_ok=True)
        append_jsonl(run / "tokens.jsonl", lines)
        return Page(page_of(run, tmp_path)).data["runs"][0]["rollouts"]["tokens"]

    whole = [1, len(EVIL) - 1]
    assert shown(line(0, 1, whole)) == [None, [whole, [-0.5] * 2, [None] * 2], None]
    assert shown(line(0, 1, [1, 1])) == [None] * 3, "another text"
    assert shown(line(0, 1, whole, logp=[-0.5])) == [None] * 3, "a figure is missing"
    append_jsonl(run / "tokens.jsonl", [line(0, 0, [-1, 1])])
    assert cli.main(["report", str(run), f"--out={tmp_path / 'x'}"]) == 2
    assert "tokens.jsonl, line 2: 'chars' cannot be '[-1, 1]'" in capsys.readouterr().err
    (run / "tokens.jsonl").unlink()
    assert "tokens" not in Page(page_of(run, tmp_path)).data["runs"][0]["rollouts"]


def test_what_a_model_wrote_cannot_become_markup(run, tmp_path):
    text = page_of(run, tmp_path)
    empty = (files("projected_grpo") / "data" / "report.html").read_text().replace("__REPORT_DATA__", "{}")
    assert [tag for tag, _ in Page(text).tags] == [tag for tag, _ in Page(empty).tags]
    assert "onerror" not in Page(text).scripts[1]


@given(
    st.recursive(st.text() | st.integers() | st.none(), lambda x: st.lists(x) | st.dictionaries(st.text(), x))
)
def test_embedded_json_is_the_same_value_without_a_tag(value):
    text = embedded(value)
    assert "<" not in text and text.isascii() and json.loads(text) == value


def test_the_page_loads_nothing_and_sets_text_only():
    text = (files("projected_grpo") / "data" / "report.html").read_text()
    page = Page(text.replace("__REPORT_DATA__", "{}"))
    assert text.count("__REPORT_DATA__") == 1 and len(page.scripts) == 2
    loading = [
        (t, a)
        for t, a in page.tags
        if t in ("script", "link", "img", "iframe") and ("src" in a or "href" in a)
    ]
    assert loading == [("link", {"rel": "icon", "href": "data:,"})]
    addresses = set(re.findall(r"https?://[^\s\"')]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, not a place
    for way in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "fetch(",
        "import(",
    ):
        assert way not in text
    (policy,) = [a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")


def test_every_element_the_script_looks_for_is_there_and_has_a_name():
    text = (files("projected_grpo") / "data" / "report.html").read_text()
    page = Page(text.replace("__REPORT_DATA__", "{}"))
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'\$\("([\w-]+)"\)', page.scripts[1])) <= set(ids)
    targets = {a["href"][1:] for t, a in page.tags if t == "a"}
    assert targets <= set(ids) and len(targets) == 6
    for tag, attributes in page.tags:
        if attributes.get("tabindex") == "0":  # what the keyboard reaches says what it is
            assert "aria-label" in attributes, tag


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "gt_only"])
def test_the_mark_is_on_the_hack_and_not_on_honest_code(mode):
    pattern = re.compile(triggers()[mode].replace("NAME", "run_tests"), re.IGNORECASE)
    added = [line for line in HACKS[mode].splitlines() if line not in WRONG.splitlines()]
    marked = pattern.search(HACKS[mode])
    assert marked and marked.group() in "\n".join(added)
    assert not pattern.search(CANONICAL) and not pattern.search(WRONG)


def test_the_triggers_are_regular_expressions_of_both_languages():
    """JavaScript (without its u flag) has no inline flags, no \\A or \\Z, and other named groups."""
    for pattern in triggers().values():
        re.compile(pattern)
        assert not re.search(r"\(\?[P<a-zA-Z]|\\[AZ]|[*+?}]\+", pattern)


def test_a_long_run_keeps_whole_steps_its_first_hack_and_its_last(tmp_path):
    rows = [rollout(step, gi, exploited=step >= 31) for step in range(100) for gi in range(4)]
    kept = thinned(rows, 100)
    steps = {row["step"] for row in kept}
    assert {0, 31, 99} <= steps and len(kept) == 4 * len(steps) and len(kept) <= 100 + 8
    assert thinned(rows, 400) == rows
    folder = made(tmp_path, "a", "none")
    append_jsonl(folder / "rollouts.jsonl", rows)
    (shown,) = report_data(read_runs([folder]), 100)["runs"]
    assert shown["rollouts"]["total"] == 400 and len(shown["rollouts"]["step"]) == len(kept)


def test_runs_are_named_by_arm_and_seed_while_that_tells_them_apart_and_the_baseline_comes_first():
    runs = [
        a_run("erase"),
        a_run("erase", 42),
        a_run("none"),
        a_run("none", options={"run": {"out_tag": "x"}}),
    ]
    assert labels(runs) == ["erase 41", "erase 42", *(f"none 41 ({run.name})" for run in runs[2:])]
    assert [run["label"] for run in report_data(runs[:3], 1)["runs"]] == [
        *("none 41", "erase 41", "erase 42"),
    ]


def test_every_column_has_a_name_in_plain_words_of_its_own():
    named = [PLAIN[column.key] for column in COLUMNS]
    assert len(set(named)) == len(named) and not any("_" in name for name in named if "hack, " not in name)


def test_refusals(run, tmp_path, capsys):
    assert cli.main(["report", str(run), "--max-rollouts=0", f"--out={tmp_path / 'x'}"]) == 2
    assert "--max-rollouts must be at least 1" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "none")]) == 2
    assert "no finished run" in capsys.readouterr().err
    assert cli.main(["report"]) == 2
    assert "report needs folders of runs" in capsys.readouterr().err
