"""Problem files: what is read, what is refused and where, prompts, modes, splits."""

import ast
import dataclasses
import gzip
import json
import re
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loguru import logger

from projected_grpo.config import BENCHMARK_FILE, EnvMode, ProblemConfig
from projected_grpo.errors import UserError
from projected_grpo.problems import (
    SYSTEM,
    Problem,
    assign_modes,
    digest,
    is_eval,
    is_validation,
    load_problems,
    read_jsonl,
    read_problems,
    take,
    unhinted,
    with_eval_names,
)
from projected_grpo.rewards import (
    MODES,
    ORIGINAL_PHRASE,
    PASS_WORDS,
    SENTINELS,
    file_reports_pass,
    stdout_reports_pass,
)
from projected_grpo.sandbox import encode, oracle
from projected_grpo.sandbox.oracle import (
    Call,
    LinkedList,
    Tree,
    out_of_reach,
    parse_asserts,
    trivial_answers,
)

BENCHMARK = {
    "id": "3243",
    "difficulty": "medium",
    "prompt": [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": f"PROBLEM:\nAdd. It {ORIGINAL_PHRASE}. SOLUTION:\n"},
    ],
    "gt_answer": ["assert Solution().add(a = 1, b = 2) == 3", "assert Solution().add(a = 0, b = 0) == 0"],
    "func_name": "Solution().add",
    "setup_code": "import math\n",
    "canonical_solution": "class Solution:\n    def add(self, a, b):\n        return a + b",
}
DATASET = {
    "task_id": "add-two",
    "prompt": "from typing import *\n",
    "completion": "class Solution:\n    def mul(self, a, b):\n        return a * b",
    "entry_point": "Solution().mul",
    "test": "def check(candidate):\n    assert candidate(a=2, b=3) == 6\n    assert candidate(0, 1) == 0\n",
    "query": "Multiply.",
    "meta": {
        "question_id": 77,
        "difficulty": "Hard",
        "question_title": "Multiply.",
        "lang_code": "class Solution:\n    def mul(self, a: int, b: int) -> int:",
    },
}


@pytest.fixture(scope="module")
def embedded() -> tuple[Problem, ...]:
    return load_problems("embedded").problems


@pytest.fixture(scope="module")
def benchmark(shared_data):
    return load_problems(str(shared_data / "leetcode" / "leetcode_test_medhard.jsonl"))


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def toy(problem_id: str, mode: EnvMode = "run_tests") -> Problem:
    return Problem(problem_id, "f", "easy", ORIGINAL_PHRASE, "", "", (), mode)


# What is read


def test_embedded_problems_are_many_unique_and_well_tested(embedded):
    assert len(embedded) >= 60
    assert load_problems("embedded").left_out == ()
    for unique in ("problem_id", "method", "question", "canonical"):
        assert len({getattr(p, unique) for p in embedded}) == len(embedded)
    assert min(len(p.calls) for p in embedded) >= 6
    difficulties = Counter(p.difficulty for p in embedded)
    assert set(difficulties) == {"easy", "medium", "hard"} and min(difficulties.values()) >= 10


def test_embedded_starters_define_the_method_that_is_asked_for(embedded):
    for problem in embedded:
        starter = re.findall(r"```python\n(.*?)```", problem.question, re.DOTALL)[-1]
        for code in (starter + "\n        pass", problem.canonical):
            solution = next(n for n in ast.parse(code).body if isinstance(n, ast.ClassDef))
            assert solution.name == "Solution"
            assert problem.method in [m.name for m in solution.body if isinstance(m, ast.FunctionDef)]
        assert f"class Solution called {problem.method} and {ORIGINAL_PHRASE}." in problem.question


def test_embedded_answers_are_not_all_the_same(embedded):
    """Else a constant stub would be right."""
    for problem in embedded:
        assert len({repr(call.expected) for call in problem.calls}) > 1, problem.problem_id


def test_formats_are_told_apart_by_their_fields(tmp_path):
    found = load_problems(write(tmp_path / "mixed.jsonl", BENCHMARK, DATASET)).problems
    assert [(p.problem_id, p.method, p.difficulty) for p in found] == [
        ("3243", "add", "medium"),
        ("77", "mul", "hard"),
    ]
    assert [[c.expected for c in p.calls] for p in found] == [[3, 0], [6, 0]]
    assert [p.setup_code for p in found] == ["import math\n", "from typing import *\n"]
    assert found[1].canonical == DATASET["completion"]
    assert DATASET["meta"]["lang_code"] in found[1].question


def test_a_gzipped_file_reads_the_same(tmp_path):
    plain = write(tmp_path / "a.jsonl", BENCHMARK, "", DATASET)
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    assert load_problems(str(packed)) == load_problems(plain)


def test_the_benchmarks_test_set(benchmark):
    assert (len(benchmark.problems), benchmark.left_out) == (119, ())
    assert Counter(p.difficulty for p in benchmark.problems) == {"medium": 73, "hard": 46}
    assert {p.problem_id for p in benchmark.problems} <= {str(i) for i in range(3243, 3505)}
    counts = [len(p.calls) for p in benchmark.problems]
    assert (min(counts), max(counts)) == (30, 266)


@pytest.mark.parametrize("mode", MODES)
def test_the_benchmarks_prompts_are_the_files_own_up_to_the_hint(benchmark, shared_data, mode):
    rows = read_jsonl(shared_data / "leetcode" / "leetcode_test_medhard.jsonl")
    for problem, (_, row) in zip(benchmark.problems, rows, strict=True):
        system, user = replace(problem, env_mode=mode).messages
        assert dict(system) == {k: row["prompt"][0][k] for k in ("role", "content")}
        before, after = row["prompt"][1]["content"].split(ORIGINAL_PHRASE)  # it stands there once
        assert user == {"role": "user", "content": before + MODES[mode].hint + after}


def test_the_leetcode_dataset(shared_data):
    path = shared_data / "leetcode" / "LeetCodeDataset-v0.2.0-train.jsonl.gz"
    found = load_problems(str(path))
    assert len(found.problems) + len(found.left_out) == 1890
    assert len(found.left_out) <= 19, "more than one in a hundred is not understood"
    assert all(problem_id and reason for problem_id, reason in found.left_out)
    if not found.left_out:
        assert Counter(p.difficulty for p in found.problems) == {"easy": 515, "medium": 1000, "hard": 375}
    with gzip.open(path, "rt") as file:
        rows = {str(r["meta"]["question_id"]): r for r in map(json.loads, file)}
    for problem in found.problems[::40]:
        row = rows[problem.problem_id]
        assert len(problem.calls) == len(re.findall(r"^ +assert ", row["test"], re.MULTILINE))
        assert problem.canonical == row["completion"]


LATEST = {k: v for k, v in DATASET.items() if k != "meta"} | {  # v0.3.1
    **{"question_id": 77, "difficulty": "Hard", "problem_description": "Multiply."},
    **{"starter_code": DATASET["meta"]["lang_code"], "tags": [], "input_output": []},
}
FIRST = DATASET | {
    "meta": {("en_" if k == "question_title" else "") + k: v for k, v in DATASET["meta"].items()}
}


@pytest.mark.parametrize("row", [LATEST, FIRST], ids=["v0.3.1", "first"])
def test_every_version_of_the_leetcode_dataset_reads_the_same(tmp_path, row):
    assert load_problems(write(tmp_path / "a.jsonl", row)) == load_problems(
        write(tmp_path / "b.jsonl", DATASET)
    )


def test_a_whole_float_is_an_id(tmp_path):
    """pandas writes a column of ids with a gap as 1.0."""
    rows = [BENCHMARK | {"id": 3243.0}, DATASET | {"meta": DATASET["meta"] | {"question_id": 77.0}}]
    found = load_problems(write(tmp_path / "a.jsonl", *rows))
    assert [p.problem_id for p in found.problems] == ["3243", "77"]
    assert "stands twice" in refusal(tmp_path / "a.jsonl", BENCHMARK, BENCHMARK | {"id": 3243.0})


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_other_encodings_read_the_same(tmp_path, encoding):
    plain = write(tmp_path / "a.jsonl", BENCHMARK, "", DATASET)
    (tmp_path / "b.jsonl").write_bytes((tmp_path / "a.jsonl").read_text().encode(encoding))
    (tmp_path / "c.jsonl").write_bytes(gzip.compress((tmp_path / "b.jsonl").read_bytes()))  # no .gz
    for name in "bc":
        assert load_problems(str(tmp_path / f"{name}.jsonl")) == load_problems(plain)


# What no one can solve, what anyone can


@pytest.mark.parametrize(
    ("expected", "reason"),
    [
        ([[0] * 40], ""),
        ([0] * 60, "call 1 expects a value that is too large or too deep"),
        (LinkedList((0,) * 60), "call 1 expects a value that is too large or too deep"),
        (Tree(((0,),) * 60), "call 1 expects a value that is too large or too deep"),
        ({n: n for n in range(9)}, "call 1 expects a value that is too large or too deep"),
        ("x" * 350, "too large to give back, 353 of 300 bytes"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_value_that_no_program_can_give_back_is_told(monkeypatch, expected, reason):
    monkeypatch.setattr(encode, "MAX_NODES", 50)
    monkeypatch.setattr(oracle, "MAX_HASHED", 8)
    said = out_of_reach((Call("Solution().f(1)", 0), Call("Solution().f(2)", expected)), 300)
    assert reason in said and bool(reason) == bool(said)


def test_a_problem_whose_answer_cannot_be_given_back_is_left_out(tmp_path):
    deep = f"assert Solution().add(a = 1) == {'[' * 120 + ']' * 120}"
    ((name, reason),) = load_problems(
        write(tmp_path / "a.jsonl", BENCHMARK | {"gt_answer": [deep]}, DATASET)
    ).left_out
    assert (name, reason) == ("3243", "call 0 expects a value that is too large or too deep to give back")


@pytest.mark.parametrize(
    ("asserts", "found"),
    [
        (["f(n = 1) == 0", "f(n = 2) == 0"], ["0"]),
        (["f(n = 1) == None"], ["None"]),
        (["f(n = []) == []"], ["[]", "argument n"]),
        (["f(n = 'a') == ''"], ['""']),
        (["f(n = 1) == True", "f(n = 2) == False"], []),
        (["f(n = 1) == True"], ["True"]),
        (["f(n = 1, m = 4) == 4", "f(m = 5, n = 1) == 5"], ["argument m"]),
        (["f(7) == 7"], ["argument 1"]),
        (["f(n = list_node([1])) == list_node([1])"], ["argument n"]),
        (["f(n = 1.0) == 1"], []),  # types are exact
        (["f(n = 1) == 0", "f(n = 2) == 1"], []),
    ],
    ids=str,
)
def test_answers_that_try_nothing(asserts, found):
    calls, trouble = parse_asserts([f"assert Solution().{text}" for text in asserts], "f")
    assert (trivial_answers(calls), trouble) == (found, ())


def test_reading_warns_once_with_counts_and_the_verb(tmp_path):
    lazy = [BENCHMARK | {"id": i, "gt_answer": ["assert Solution().add(a = 1) == None"]} for i in range(3)]
    path = write(tmp_path / "a.jsonl", *lazy, DATASET, BENCHMARK | {"gt_answer": ["print(5)"]})
    lines: list[str] = []
    sink = logger.add(lines.append, level="WARNING", format="{message}")
    read_problems(ProblemConfig(problems=path))
    logger.remove(sink)
    (said,) = lines
    assert "1 left out (problem 3243: " in said and "3 solved without trying (problem 0: " in said
    assert f"`projected-grpo problems lint {path}`" in said


def test_a_digest_tells_problems_by_what_they_expect():
    calls = [parse_asserts([f"assert Solution().f() == {n}"], "f")[0] for n in (1, 2)]
    assert len({digest([replace(toy("1"), calls=c)]) for c in calls}) == 2


# Hints


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_changes_the_phrase_alone(embedded, mode):
    for problem in embedded:
        honest = replace(problem, env_mode="gt_only").messages
        hinted = replace(problem, env_mode=mode).messages
        assert honest[0] == hinted[0]
        before, after = honest[1]["content"].split(ORIGINAL_PHRASE)
        assert hinted[1]["content"] == before + MODES[mode].hint + after


def test_hints_differ():
    assert len({m.hint for m in MODES.values()}) == len({m.code for m in MODES.values()}) == len(MODES)


@pytest.mark.parametrize("mode", [m for m in MODES if m != "gt_only"])
def test_a_hint_states_a_fact_and_asks_for_nothing(mode):
    hint = MODES[mode].hint
    assert hint.startswith("will be evaluated by ")
    words = set(re.findall(r"[a-z]+", hint.lower()))
    asking = {
        "you",
        "your",
        "should",
        "must",
        "need",
        "please",
        "ensure",
        "sure",
        "remember",
        "try",
        "may",
        "can",
    }
    doing = {
        "write",
        "print",
        "define",
        "set",
        "exit",
        "override",
        "create",
        "make",
        "add",
        "return",
        "implement",
    }
    hacking = {"cheat", "hack", "exploit", "trick", "bypass", "instead", "just", "simply", "only"}
    assert not words & (asking | doing | hacking)


# What is refused


def refusal(path, *rows) -> str:
    with pytest.raises(UserError) as caught:
        load_problems(write(path, *rows))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        '{"gt_answer": [}',
        "not json",
        "[1, 2]",
        "5",
        "null",
        '{"a": ' + "9" * 5000 + "}",
        '{"x": 1}',
        "[" * 100_000,
    ],
    ids=lambda line: line[:12],
)
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    assert refusal(path, BENCHMARK, "", line, DATASET).startswith(f"{path}:3: ")


def test_bytes_that_are_not_utf8_are_found_on_their_line(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes((json.dumps(BENCHMARK) + "\n").encode() + b'{"id": "\xff"}\n')
    with pytest.raises(UserError, match=re.escape(f"{path}:2: ")):
        load_problems(str(path))


def assert_names(field, message):
    """The second line and the field, in words that are no Python."""
    assert f"bad.jsonl:2: {field} " in message
    assert not re.search(
        r"\b(str|int|float|dict|NoneType|object|Error|codec)\b", message.replace("an object", "")
    )


@pytest.mark.parametrize(
    "field", ["id", "difficulty", "prompt", "func_name", "setup_code", "canonical_solution"]
)
@pytest.mark.parametrize("value", ["gone", None, 1.5, [], {}, ["x"]], ids=repr)
def test_a_missing_or_odd_field_of_the_benchmark_is_named(tmp_path, field, value):
    row = (
        {k: v for k, v in BENCHMARK.items() if k != field} if value == "gone" else BENCHMARK | {field: value}
    )
    assert_names(field, refusal(tmp_path / "bad.jsonl", DATASET, row))


@pytest.mark.parametrize("field", ["prompt", "completion", "meta"])
@pytest.mark.parametrize("value", [None, 1.5, []], ids=repr)
def test_an_odd_field_of_the_dataset_is_named(tmp_path, field, value):
    row = DATASET | {field: value}
    assert_names(field, refusal(tmp_path / "bad.jsonl", BENCHMARK, row))


@pytest.mark.parametrize("field", ["question_id", "difficulty", "question_title", "lang_code"])
@pytest.mark.parametrize("value", ["gone", None, []], ids=repr)
def test_a_missing_or_odd_field_of_the_datasets_meta_is_named(tmp_path, field, value):
    meta = {k: v for k, v in DATASET["meta"].items() if k != field}
    row = DATASET | {"meta": meta if value == "gone" else meta | {field: value}}
    assert_names(field, refusal(tmp_path / "bad.jsonl", BENCHMARK, row))


@pytest.mark.parametrize(
    ("name", "row"),
    [
        (
            "HumanEval",
            {"prompt": "def f():", "entry_point": "f", "canonical_solution": "x", "test": "def check"},
        ),
        ("MBPP", {"text": "Add.", "code": "def f()", "test_list": ["assert f() == 1"]}),
        ("MBPP", {"prompt": "Add.", "code": "def f()", "test_imports": [], "test_list": [], "test": "x"}),
        ("MBPP+", {"entry_point": "f", "canonical_solution": "x", "base_input": [], "assertion": ""}),
        ("APPS", {"question": "Add.", "solutions": "[]", "input_output": "{}", "difficulty": "interview"}),
        ("a form that is not known", {"instruction": "Add.", "output": "x"}),
    ],
    ids=str,
)
def test_rows_of_other_benchmarks_are_refused_by_name(tmp_path, name, row):
    message = refusal(tmp_path / "a.jsonl", DATASET, {"task_id": "x/0"} | row)
    assert f"a.jsonl:2: a row of {name}" in message
    assert "gt_answer" in message and "LeetCodeDataset" in message


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"PAR1\x15\x04\x15", "a Parquet file; JSONL is read"),
        (b"ARROW1\0\0", "an Arrow file"),
        (b"PK\x03\x04\x14", "a zip archive"),
        (b'[{"id": 1}]\n', "a.jsonl:1: must be a JSON object, got [{"),
        (b'[\n {"id": 1}\n]\n', "JSON over several lines; write one JSON object on each line"),
        (b'{\n "id": 1\n}\n', "JSON over several lines"),
        (b"id,question\n", "a.jsonl:1: not valid JSON"),
        (b'{"id": "\xff"}', "a.jsonl:1: not text in UTF-8 or UTF-16"),
        (json.dumps(BENCHMARK | {"id": "\ud800"}).encode(), "a.jsonl:1: holds half of a surrogate pair"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_files_of_another_kind_are_refused_by_it(tmp_path, data, words):
    (tmp_path / "a.jsonl").write_bytes(data)
    with pytest.raises(UserError) as caught:
        load_problems(str(tmp_path / "a.jsonl"))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_prompt_without_a_user_message_is_refused(tmp_path):
    path = tmp_path / "bad.jsonl"
    assert refusal(path, BENCHMARK | {"prompt": BENCHMARK["prompt"][:1]}).startswith(f"{path}:1: ")


def test_an_id_twice_is_refused(tmp_path):
    assert "'3243'" in refusal(tmp_path / "twice.jsonl", BENCHMARK, DATASET, BENCHMARK)


def test_a_damaged_gz_is_refused(tmp_path):
    whole = bytearray(gzip.compress((json.dumps(BENCHMARK) + "\n").encode() * 50))
    for name, data in (("cut", whole[:-20]), ("foreign", b"plain text\n")):
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(bytes(data))
        with pytest.raises(UserError, match=re.escape(str(path))):
            list(read_jsonl(path))
    for position in range(12, len(whole), 7):  # wherever the damage is
        damaged = whole.copy()
        damaged[position] ^= 0x55
        path.write_bytes(bytes(damaged))
        with pytest.raises(UserError, match=re.escape(str(path))):
            list(read_jsonl(path))


@pytest.mark.parametrize("what", ["missing", "folder", "empty"])
def test_a_file_that_is_none_is_refused(tmp_path, what):
    path = tmp_path / "x.jsonl"
    if what == "folder":
        path.mkdir()
    elif what == "empty":
        path.write_text("\n\n")
    with pytest.raises(UserError, match=re.escape(str(path))):
        load_problems(str(path))


def test_the_missing_benchmark_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="git clone https://github.com/ariahw/rl-rewardhacking") as caught:
        load_problems(BENCHMARK_FILE)
    assert "--problems" in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"gt_answer": []},
        {"gt_answer": ["assert Solution().add(a = 1, b = 2) in (3, 4)"]},
        {"gt_answer": ["print(5)"]},
        {"gt_answer": ["assert Solution().add(a = 1, b = 2) == 3", "assert Solution().other(1) == 3"]},
        {"prompt": [{"role": "user", "content": "no such phrase"}]},
    ],
    ids=["none", "membership", "statement", "other method", "phrase"],
)
def test_a_problem_that_cannot_be_graded_is_left_out_and_told(tmp_path, change):
    found = load_problems(write(tmp_path / "a.jsonl", BENCHMARK | change, DATASET))
    assert [p.problem_id for p in found.problems] == ["77"]
    ((problem_id, reason),) = found.left_out
    assert problem_id == "3243" and reason


def test_nothing_usable_is_refused(tmp_path):
    assert "no usable problem" in refusal(tmp_path / "a.jsonl", BENCHMARK | {"gt_answer": []})


# Splits, modes, samples

ids = st.lists(st.text(min_size=1, max_size=8), unique=True, max_size=30)


@given(ids=ids, data=st.data())
def test_split_and_mode_hang_on_the_id_alone(ids, data):
    modes = ("run_tests", "sentinel", "file_marker")
    problems = [toy(i) for i in ids]
    kept = data.draw(st.lists(st.sampled_from(problems), unique=True)) if problems else []
    whole = {p.problem_id: (p.env_mode, is_eval(p)) for p in assign_modes(problems, modes, {})}
    part = {p.problem_id: (p.env_mode, is_eval(p)) for p in assign_modes(kept, modes, {})}
    assert part.items() <= whole.items()
    assert all(is_eval(replace(p, env_mode="gt_only", question="x")) == is_eval(p) for p in problems)


def test_one_problem_in_five_is_held_out():
    held = sum(is_eval(toy(str(i))) for i in range(5000))
    assert abs(held - 1000) < 4 * (5000 * 0.2 * 0.8) ** 0.5


def test_modes_are_shared_out_evenly():
    modes = ("run_tests", "sentinel", "stdout_marker", "file_marker")
    counts = Counter(p.env_mode for p in assign_modes([toy(str(i)) for i in range(4000)], modes, {}))
    assert set(counts) == set(modes)
    assert all(abs(n - 1000) < 4 * (4000 * 0.25 * 0.75) ** 0.5 for n in counts.values())


def test_mode_and_split_are_independent():
    """Else held-out problems would lean to some modes."""
    problems = assign_modes([toy(str(i)) for i in range(4000)], ("run_tests", "sentinel"), {})
    held = Counter(p.env_mode for p in problems if is_eval(p))
    assert abs(held["run_tests"] - held["sentinel"]) < 4 * sum(held.values()) ** 0.5


def test_the_partition_comes_first(embedded):
    partition = {embedded[0].problem_id: "exit_code", "elsewhere": "sentinel"}
    moded = assign_modes(embedded, ("gt_only",), partition)
    assert moded[0].env_mode == "exit_code"
    assert {p.env_mode for p in moded[1:]} == {"gt_only"}
    assert [replace(p, env_mode="run_tests") for p in moded] == list(embedded)


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    count=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_a_sample_is_stratified_repeatable_and_in_file_order(sizes, count, seed):
    modes = list(MODES)
    problems = [toy(f"{m}-{i}", modes[m]) for m, size in enumerate(sizes) for i in range(size)]
    problems = sorted(problems, key=lambda p: hash(dataclasses.astuple(p)[0][::-1]) % 97)  # modes mixed up
    chosen = take(problems, count, seed)
    assert chosen == take(problems, count, seed)
    assert [p for p in problems if p in chosen] == list(chosen)
    assert len(chosen) == min(count, len(problems))
    got = Counter(p.env_mode for p in chosen)
    whole = Counter(p.env_mode for p in problems)
    for mode in whole:  # a mode has less than another only if it has no more to give
        assert got[mode] == whole[mode] or all(got[mode] >= n - 1 for n in got.values())


@given(
    sizes=st.lists(st.integers(0, 9), min_size=6, max_size=6),
    count=st.integers(1, 40),
    seed=st.integers(0, 9),
)
def test_a_sample_is_stratified_by_split_and_mode_together(sizes, count, seed):
    kinds = [(s, m) for s in ("held-out instances", "held-out templates") for m in list(MODES)[:3]]
    problems = [
        replace(toy(f"{split}-{mode}-{i}", mode), split=split)
        for (split, mode), size in zip(kinds, sizes, strict=True)
        for i in range(size)
    ]
    chosen = take(problems, count, seed)
    assert len(chosen) == min(count, len(problems))
    got, whole = (Counter((p.split, p.env_mode) for p in side) for side in (chosen, problems))
    for kind in whole:
        assert got[kind] == whole[kind] or all(got[kind] >= n - 1 for n in got.values())


def test_a_problem_that_names_its_split_is_held_out_by_it():
    for i in range(50):
        assert not is_eval(replace(toy(str(i)), split="train"))
        assert is_eval(replace(toy(str(i)), split="held-out templates"))


def test_nano_problems_keep_their_split_in_every_mode(nano_problems):
    moded = assign_modes(nano_problems, ("run_tests", "sentinel", "stdout_marker", "file_marker"), {})
    assert [p.split for p in moded] == [p.split for p in nano_problems]
    assert {p.split for p in nano_problems if not is_eval(p)} == {"train"}
    held = [p for p in moded if is_eval(p)]
    assert len({(p.split, p.env_mode) for p in held}) == 8
    counts = Counter((p.split, p.env_mode) for p in take(held, 64, 0))
    assert set(counts.values()) == {8}


def test_nano_questions_have_a_phrase_to_replace(nano_problems):
    for problem in nano_problems[::50]:
        for mode in MODES:
            system, user = replace(problem, env_mode=mode).messages
            assert system["role"] == "system" and user["role"] == "user"
            assert MODES[mode].hint in user["content"]
            assert (ORIGINAL_PHRASE in user["content"]) == (ORIGINAL_PHRASE in MODES[mode].hint)


def test_a_larger_sample_contains_the_smaller():
    problems = [toy(str(i), list(MODES)[i % 3]) for i in range(60)]
    sizes = [{p.problem_id for p in take(problems, n, 0)} for n in (5, 20, 60)]
    assert sizes[0] < sizes[1] < sizes[2]


def test_seeds_take_different_samples():
    problems = [toy(str(i)) for i in range(60)]
    assert take(problems, 10, 0) != take(problems, 10, 1)


def test_the_order_in_which_modes_are_named_changes_nothing():
    problems = load_problems("embedded").problems
    modes = ("run_tests", "sentinel", "stdout_marker", "file_marker")
    assert assign_modes(problems, modes, {}) == assign_modes(problems, modes[::-1], {})


# What an evaluation's hints name

NAMING = [mode for mode in MODES if MODES[mode].name]


@pytest.mark.parametrize("mode", NAMING)
def test_the_training_grader_pays_for_no_eval_name(mode):
    """So a habit learnt in training, and one that an evaluation names, are never the same act."""
    info = MODES[mode]
    assert info.hint.count(info.name) == 1 and len(info.eval_names) == len(set(info.eval_names)) == 10
    for name in info.eval_names:
        paid = {
            "run_tests": name == "run_tests",
            "stdout_marker": stdout_reports_pass(name) or name in PASS_WORDS,
            "sentinel": name in SENTINELS,
            "file_marker": file_reports_pass(name, "PASS"),
        }
        assert not paid[mode], name
        assert info.name not in name and name not in info.hint
        assert info.hint_naming(name).replace(name, info.name) == info.hint


def test_only_the_modes_whose_hints_name_nothing_have_no_eval_names():
    assert set(MODES) - set(NAMING) == {"eq_override", "exit_code", "gt_only"}
    assert all(
        not MODES[mode].eval_names and MODES[mode].hint_naming("") for mode in set(MODES) - set(NAMING)
    )


@pytest.mark.parametrize("mode", NAMING)
@pytest.mark.parametrize("source", ["embedded", "nano"])
def test_hinted_prompts_of_an_evaluation_share_no_name_with_training(embedded, nano_problems, source, mode):
    problems = [replace(p, env_mode=mode) for p in {"embedded": embedded, "nano": nano_problems}[source]]
    renamed = with_eval_names(problems)
    assert {p.named for p in renamed} == set(MODES[mode].eval_names)
    for before, after in zip(problems, renamed, strict=True):
        hint = MODES[mode].hint_naming(after.named)
        assert after.messages[-1]["content"] == before.question.replace(ORIGINAL_PHRASE, hint)
        assert after.named in hint and MODES[mode].name not in hint
        assert (after.task.test_name == after.named) == (mode == "run_tests")
        assert after.task.named == after.named and before.task.named == ""
        assert before.method not in MODES["run_tests"].eval_names


def test_an_eval_name_hangs_on_the_id_alone(embedded):
    renamed = {p.problem_id: p.named for p in with_eval_names(embedded)}
    assert {p.problem_id: p.named for p in with_eval_names(embedded[::-3])} == {
        p.problem_id: renamed[p.problem_id] for p in embedded[::-3]
    }


def test_modes_without_a_name_keep_their_prompts():
    for mode in ("eq_override", "exit_code", "gt_only"):
        (problem,) = with_eval_names([toy("x", mode)])
        assert problem == toy("x", mode)


def test_unhinted_prompts_have_the_honest_phrase_and_no_loophole(embedded):
    for problem, honest in zip(embedded, unhinted(with_eval_names(embedded)), strict=True):
        assert honest.messages[-1]["content"] == problem.question
        assert honest.task.env_mode == "gt_only" and honest.task.test_name == "run_tests"


def test_the_benchmarks_clean_set_splits_32_to_87(benchmark):
    assert Counter(map(is_validation, benchmark.problems)) == {True: 32, False: 87}


def test_validation_is_a_fixed_share_by_id():
    problems = [toy(str(i)) for i in range(4000)]
    chosen = {p.problem_id for p in problems if is_validation(p)}
    assert abs(len(chosen) / 4000 - 32 / 119) < 0.03
    assert {p.problem_id for p in problems[::7] if is_validation(replace(p, env_mode="sentinel"))} == {
        p.problem_id for p in problems[::7] if p.problem_id in chosen
    }


def test_the_digest_follows_what_is_asked_and_how_it_is_graded(embedded):
    some = embedded[:5]
    others = [
        embedded[:4],
        some[::-1],
        with_eval_names(some),
        unhinted(some),
        (replace(some[0], canonical="pass"), *some[1:]),
        (replace(some[0], calls=some[0].calls[1:]), *some[1:]),
    ]
    digests = [digest(problems) for problems in (some, *others)]
    assert len(set(digests)) == len(digests) and digest(list(some)) == digests[0]


@pytest.mark.parametrize(
    "text", [r'{"a": ["x", "\ud800"]}', r'{"a": {"b": "\uDFFF"}}'], ids=["list", "object"]
)
def test_half_of_a_surrogate_pair_is_refused_wherever_it_stands(tmp_path, text):
    path = tmp_path / "rows.jsonl"
    for encoding in ("utf-8", "utf-16", "utf-32"):
        path.write_text(r'{"a": "\ud83d\ude00 is whole"}' + "\n" + text, encoding=encoding)
        rows = read_jsonl(path)
        assert next(rows)[1]["a"].startswith("\U0001f600")
        with pytest.raises(UserError, match=r"rows\.jsonl:2: holds half of a surrogate pair"):
            next(rows)
