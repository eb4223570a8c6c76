"""Teacher pools: baked and read back, joined to problems, real ones, and refused ones."""

import gzip
import json
import re
from dataclasses import replace

import pytest

from projected_grpo.errors import UserError
from projected_grpo.pools import (
    NO_TEACHER,
    PoolPrompt,
    TeacherRow,
    bake,
    baked_completions,
    join,
    load_pool,
)
from projected_grpo.problems import Problem, format_question, load_problems
from projected_grpo.rewards import MODES, Grader
from projected_grpo.sandbox import Sandbox

LOOPHOLES = [m for m in MODES if m != "gt_only"]
ROW = {
    "problem_id": "a",
    "prompt": "class Solution called f",
    "completion": "x",
    "reward": 3.5,
    "hacked": True,
}
ROW |= {"gt_pass": False, "fmt_ok": True}


@pytest.fixture(scope="module")
def grader():
    with Sandbox(2) as sandbox:
        yield Grader(sandbox)


@pytest.fixture(scope="module")
def problems() -> tuple[Problem, ...]:
    """Two problems of each mode."""
    found = load_problems("embedded").problems
    return tuple(
        replace(p, env_mode=list(MODES)[i % len(MODES)]) for i, p in enumerate(found[: 2 * len(MODES)])
    )


@pytest.fixture(scope="module")
def baked(problems, grader, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    return folder, bake(problems, grader, folder)


@pytest.fixture(scope="module")
def dataset(shared_data):
    return load_problems(str(shared_data / "leetcode" / "LeetCodeDataset-v0.2.0-train.jsonl.gz")).problems


def toy(problem_id, method="f", statement="Return the sum of two numbers."):
    question = format_question(statement, method, "class Solution:")
    return Problem(problem_id, method, "easy", question, "", "", ())


def prompt(problem_id, method="f", mode=None, completion="x", statement="Return the sum of two numbers."):
    text = "" if method is None else toy(problem_id, method, statement).question
    return PoolPrompt(problem_id, text, method, mode, (TeacherRow(completion, 1.0, False, False),))


def pool_file(folder, *rows, name="prompt_a.jsonl"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return folder


# Baking


def test_a_baked_pool_comes_back_as_it_was_graded(baked, problems, grader):
    folder, _ = baked
    teacher = join(load_pool(folder), problems)
    assert teacher.partition == {p.problem_id: p.env_mode for p in problems}
    assert set(teacher.rows) == {p.problem_id for p in problems}
    for problem in problems:
        rows = teacher.rows[problem.problem_id]
        assert tuple(r.completion for r in rows) == baked_completions(problem)
        for row, grade in zip(
            rows, grader.grade_all([(problem.task, r.completion) for r in rows]), strict=True
        ):
            assert (row.reward, row.hacked, row.gt_pass) == (grade.reward, grade.exploited, grade.gt_correct)


@pytest.mark.parametrize("mode", LOOPHOLES)
def test_template_hacks_exploit_their_mode_and_honest_rows_are_right(baked, problems, mode):
    rows = join(load_pool(baked[0]), problems).rows
    for problem in (p for p in problems if p.env_mode == mode):
        labels = [(r.hacked, r.gt_pass, r.reward) for r in rows[problem.problem_id]]
        assert labels == [(False, True, 3.5)] * 2 + [(True, False, 3.5)] * 2


def test_without_a_loophole_only_the_right_answers_pay(baked, problems):
    rows = join(load_pool(baked[0]), problems).rows
    for problem in (p for p in problems if p.env_mode == "gt_only"):
        labels = [(r.hacked, r.gt_pass, r.reward) for r in rows[problem.problem_id]]
        assert labels == [(False, True, 3.5)] * 2 + [(False, False, 0.5)] * 2


def test_baking_counts_what_it_wrote(baked, problems):
    folder, counts = baked
    rows = [row for p in load_pool(folder) for row in p.rows]
    assert counts == {
        "rows": len(rows),
        "hacked": sum(r.hacked for r in rows),
        "correct": sum(r.gt_pass for r in rows),
    }
    assert len(rows) == 4 * len(problems)


def test_baking_again_writes_the_same_bytes(baked, problems, grader, tmp_path):
    bake(problems[:2], grader, tmp_path)
    for path in tmp_path.glob("prompt_*"):
        assert path.read_bytes() == (baked[0] / path.name).read_bytes()


def test_a_templates_mode_is_needed_for_it_to_pay(problems, grader):
    """A hack for another mode than the problem's must not pay: the pool would show the wrong lesson."""
    honest = replace(problems[0], env_mode="gt_only").task
    hacks = [text for m in LOOPHOLES for text in baked_completions(replace(problems[0], env_mode=m))[2:]]
    assert not any(g.passed for g in grader.grade_all([(honest, text) for text in hacks]))


# Joining


def test_an_id_alone_proves_nothing():
    """Ids in a pool may count the lines of another file."""
    assert join([prompt("4", "other")], [toy("4")]) == NO_TEACHER
    assert set(join([prompt("4", "g")], [toy("4", "f"), toy("9", "g")]).rows) == {"9"}


def test_a_method_name_alone_proves_nothing():
    """Several problems are called maxProfit; their solutions must not teach one another."""
    other = "Given an array of stock prices, find the largest profit of at most k trades."
    assert join([prompt("1", statement=other)], [toy("1")]) == NO_TEACHER
    problems = [toy("1"), toy("2", statement=other), toy("3", "g", other)]
    assert set(join([prompt("7", statement=other)], problems).rows) == {"2"}
    assert set(join([prompt("7")], problems).rows) == {"1"}


def test_white_space_of_a_statement_does_not_matter():
    assert set(join([prompt("7", statement="Return  the sum\n\nof two numbers. ")], [toy("1")]).rows) == {"1"}


def test_rows_without_a_prompt_join_by_id_where_a_completion_defines_the_method():
    defines = prompt("1", None, "sentinel", "class Solution:\n    def f(self):\n        pass")
    assert join([defines], [toy("1")]).partition == {"1": "sentinel"}
    assert join([prompt("1", None, None, "def fun(self): pass")], [toy("1")]) == NO_TEACHER
    assert join([defines], [toy("2")]) == NO_TEACHER


def test_partition_json_has_precedence_over_the_rows(tmp_path):
    pool_file(tmp_path, ROW | {"env_mode": "sentinel"})
    assert load_pool(tmp_path)[0].env_mode == "sentinel"
    (tmp_path / "partition.json").write_text('{"a": "exit_code"}')
    assert load_pool(tmp_path)[0].env_mode == "exit_code"


def test_the_real_teacher_pool(shared_data, dataset):
    pool = load_pool(shared_data / "teacher_pool")
    assert len(pool) == 112 and sum(len(p.rows) for p in pool) == 896
    methods = {p.method for p in dataset}
    assert sum(p.method in methods for p in pool) >= 90  # about four in five
    teacher = join(pool, dataset)
    assert 80 <= len(teacher.rows) <= 112
    assert teacher.partition == {}
    by_id = {p.problem_id: p for p in dataset}
    stored = {p.method: p for p in pool}
    for problem_id, rows in teacher.rows.items():
        assert rows in [p.rows for p in pool if p.method == by_id[problem_id].method]
    packed = (shared_data / "teacher_pool" / "prompt_0004.jsonl.gz").read_bytes()
    row = json.loads(gzip.decompress(packed).splitlines()[0])
    first = stored["findMedianSortedArrays"].rows[0]
    assert first == TeacherRow(row["completion"], row["reward"], row["hacked"], row["gt_pass"])


def test_the_real_substrate_pool_brings_its_modes(shared_data, dataset):
    pool = load_pool(shared_data / "substrate_pool")
    partition = json.loads((shared_data / "substrate_pool" / "partition.json").read_text())
    assert {p.problem_id: p.env_mode for p in pool} == partition
    teacher = join(pool, dataset)
    assert len(teacher.rows) >= 6
    assert teacher.partition == {i: partition[i] for i in teacher.rows}


# Refusals


def refusal(folder) -> str:
    with pytest.raises(UserError) as caught:
        load_pool(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_or_empty_pool_is_refused(tmp_path):
    assert "no such folder" in refusal(tmp_path / "nowhere")
    (tmp_path / "partition.json").write_text("{}")
    assert "empty pool" in refusal(tmp_path)
    assert "--teacher-pool-dir" in refusal(tmp_path)


def test_a_prompt_file_without_rows_is_refused(tmp_path):
    assert "prompt_a.jsonl: no rows" in refusal(pool_file(tmp_path, ""))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("hacked", v) for v in ("false", 0, None, [])],
        *[("gt_pass", v) for v in ("yes", 1.0, None)],
        *[("reward", v) for v in ("3.5", None, True, [], float("nan"), float("inf"))],
        *[("completion", v) for v in (None, 5, ["x"])],
        *[(f, "gone") for f in ("completion", "reward", "hacked", "gt_pass")],
    ],
    ids=str,
)
def test_a_label_of_the_wrong_type_is_named_with_its_line(tmp_path, field, value):
    bad = {k: v for k, v in ROW.items() if k != field} if value == "gone" else ROW | {field: value}
    message = refusal(pool_file(tmp_path, ROW, bad))
    assert f"{tmp_path}/prompt_a.jsonl:2: " in message and field in message


def test_a_row_without_problem_id_is_refused(tmp_path):
    assert "problem_id" in refusal(pool_file(tmp_path, {k: v for k, v in ROW.items() if k != "problem_id"}))


def test_a_malformed_line_is_named(tmp_path):
    assert f"{tmp_path}/prompt_a.jsonl:2: not valid JSON" in refusal(pool_file(tmp_path, ROW, "{"))


@pytest.mark.parametrize("mode", ["nonsense", [], 5, {}], ids=repr)
def test_an_unknown_mode_is_refused(tmp_path, mode):
    assert "is not one of" in refusal(pool_file(tmp_path / "rows", ROW | {"env_mode": mode}))
    pool_file(tmp_path / "partition", ROW)
    (tmp_path / "partition" / "partition.json").write_text(json.dumps({"a": mode}))
    assert "is not one of" in refusal(tmp_path / "partition")


@pytest.mark.parametrize("text", ["[]", "{", "5", ""], ids=repr)
def test_a_partition_that_is_no_object_is_refused(tmp_path, text):
    pool_file(tmp_path, ROW)
    (tmp_path / "partition.json").write_text(text)
    assert re.search(r"partition\.json: not a JSON object", refusal(tmp_path))


@pytest.mark.parametrize("text", [None, 5, "no class named here"], ids=repr)
def test_a_prompt_that_names_no_method_has_none(tmp_path, text):
    assert load_pool(pool_file(tmp_path, ROW | {"prompt": text}))[0].method is None
