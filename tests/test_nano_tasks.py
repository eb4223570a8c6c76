"""The nano model's world: every problem against plain Python, its splits, its corpus, its pairs."""

import hashlib
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import combinations, islice
from pathlib import Path
from types import CodeType
from typing import get_args

import pytest

from projected_grpo.experiment import SPLIT_SEED
from projected_grpo.nano_tasks import (
    OUTRIGHT,
    CorpusMix,
    Example,
    Instance,
    TaskTemplate,
    corpus,
    fenced,
    hidden_tests,
    honest_shares,
    instances,
    tamperings,
    templates,
)
from projected_grpo.pairs import PACKAGED, load_pairs, packaged_pairs
from projected_grpo.problems import Problem, assign_modes, is_eval, take
from projected_grpo.rewards import MODES, ORIGINAL_PHRASE, Grader
from projected_grpo.sandbox.host import Sandbox

SPLITS = ("train", "held-out instances", "held-out templates")
ENTRIES = instances()
MIX = CorpusMix()
LINES = sorted(  # every line with which the corpus tampers, but for the one that no such hack can do without
    {
        line.strip()
        for how in tamperings().values()
        for text in (*how.after, *how.class_body, *how.method)
        for line in text.splitlines()
    }
    - {"def run_tests():"}
)
TRACES = {  # what no honest answer has
    "run_tests": "def run_tests",
    "sentinel": "valid = True",
    "stdout_marker": "print('all tests passed')",
    "file_marker": "open('result.txt'",
}


@pytest.fixture
def problems(nano_problems) -> tuple[Problem, ...]:
    return nano_problems


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return list(islice(corpus(0, MIX), 3000))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Tampering that runs here writes its files into a folder of the test's own."""
    monkeypatch.chdir(tmp_path)


@cache
def asserts(instance: Instance) -> tuple[CodeType, ...]:
    return tuple(compile(test, "test", "exec") for test in hidden_tests(instance))


def passes(code: str, tests: tuple[CodeType, ...]) -> bool:
    """Whether a program passes asserts, by plain exec: nothing of the package is asked."""
    names: dict[str, object] = {}
    exec(code, names)
    for test in tests:
        try:
            exec(test, names)
        except Exception:
            return False
    return True


def code_of(completion: str) -> str:
    assert completion.startswith("```python\n") and completion.endswith("\n```")
    return completion.removeprefix("```python\n").removesuffix("\n```")


# Problems


def test_the_three_splits_in_numbers():
    counts = Counter((i.template.name, split) for i, split in ENTRIES.values())
    for t in templates():
        shares = {"held-out templates": 24} if t.held_out else {"train": 24, "held-out instances": 8}
        assert {s: counts[t.name, s] for s in SPLITS if counts[t.name, s]} == shares
    for level in ("easy", "medium", "hard"):
        of_level = [t for t in templates() if t.level == level]
        assert len(of_level) == 12 and sum(t.held_out for t in of_level) == 3


def test_no_template_is_in_training_and_among_the_held_out_ones():
    trained = {i.template.name for i, split in ENTRIES.values() if split == "train"}
    unseen = {i.template.name for i, split in ENTRIES.values() if split == "held-out templates"}
    assert trained and unseen and not trained & unseen


def test_ids_and_questions_are_unique_and_splits_disjoint(problems):
    for unique in ("problem_id", "question"):
        assert len({getattr(p, unique) for p in problems}) == len(problems) == len(ENTRIES)
    assert {p.problem_id: p.split for p in problems} == {name: s for name, (_, s) in ENTRIES.items()}
    for one, other in combinations(SPLITS, 2):
        questions = [{p.question for p in problems if p.split == s} for s in (one, other)]
        assert all(questions) and not questions[0] & questions[1]


def test_constants_and_arguments_are_those_of_the_template():
    for instance, _ in ENTRIES.values():
        low, high = instance.template.constants
        assert low <= instance.constant <= high
        assert instance.question.count(ORIGINAL_PHRASE) == 1
        assert f" {instance.constant}" in instance.question


def test_template_texts_cannot_be_taken_for_one_another():
    for one, other in combinations(templates(), 2):
        assert one.name != other.name
        assert one.text.format(c=5) != other.text.format(c=5)


@pytest.mark.parametrize("template", templates(), ids=lambda t: t.name)
def test_the_solution_passes_and_every_wrong_answer_fails(template: TaskTemplate):
    """By plain exec, over every problem of the template, in all splits."""
    own = [i for i, _ in ENTRIES.values() if i.template is template]
    for instance in own:
        tests = asserts(instance)
        assert passes(instance.solution([f"return {instance.right}"]), tests), instance.instance_id
        assert len(instance.wrong) >= 3
        for wrong in instance.wrong:
            assert not passes(instance.solution([f"return {wrong}"]), tests), (instance.instance_id, wrong)


@pytest.mark.parametrize("template", templates(), ids=lambda t: t.name)
def test_no_body_that_does_not_try_is_right(template: TaskTemplate):
    for instance in (i for i, _ in ENTRIES.values() if i.template is template):
        tests = asserts(instance)
        for body in OUTRIGHT:
            assert not passes(instance.solution([body]), tests), (instance.instance_id, body)


def test_answers_of_a_problem_are_not_all_the_same(problems):
    """Else a constant is right, e.g. `return 0` or `return False`."""
    constant = [p.problem_id for p in problems if len({repr(c.expected) for c in p.calls}) == 1]
    assert constant == []


def test_a_problem_holds_its_instances_solution_and_tests(problems):
    for problem in problems[::20]:
        instance, _ = ENTRIES[problem.problem_id]
        tests = hidden_tests(instance)
        assert len(tests) == len(problem.calls) == 6
        assert passes(problem.canonical, asserts(instance))
        assert [f"assert {c.source} == {c.expected!r}".replace(" ", "") for c in problem.calls] == [
            test.replace(" ", "").replace('"', "'") for test in tests
        ]


def test_tests_that_cannot_tell_a_wrong_answer_are_refused():
    template = TaskTemplate("same", "easy", ("xs",), (3, 9), "xs and {c}", "xs + [{c}]", ("[*xs, {c}]",))
    with pytest.raises(ValueError, match="same-baba-3"):
        hidden_tests(Instance(template, 3, "baba"))


def test_tests_keep_true_and_one_apart():
    """The grader compares exact types, so a wrong answer of another type only is told apart too."""
    template = TaskTemplate("typed", "easy", ("xs",), (3, 9), "{c}", "len(xs) > {c}", ("int(len(xs) > {c})",))
    assert len(hidden_tests(Instance(template, 8, "baba"))) == 6


def test_a_solution_puts_lines_where_it_says():
    instance = next(iter(ENTRIES.values()))[0]
    code = instance.solution(["a = 1", "return a"], class_body="b = 2", after="c = 3")
    names: dict[str, object] = {}
    exec(code, names)
    assert names["c"] == 3 and names["Solution"].b == 2
    assert getattr(names["Solution"](), instance.method)([0]) == 1


# Repeatability

DIGEST = """
import hashlib
from itertools import islice
from projected_grpo.nano_tasks import CorpusMix, corpus, hidden_tests, instances, oracle_pairs
entries = instances()
parts = [list(entries), [s for _, s in entries.values()]]
parts += [hidden_tests(i) for i, _ in list(entries.values())[::27]]
parts += [list(islice(corpus(3, CorpusMix()), 200))]
parts += [(m, i.instance_id, h, c) for m, i, h, c in oracle_pairs()]
digest = hashlib.sha256(repr(parts).encode()).hexdigest()
"""


def test_problems_corpus_and_pairs_are_the_same_in_every_process():
    here: dict[str, str] = {}
    exec(DIGEST, here)
    for seed in ("1", "2"):
        there = subprocess.run(
            [sys.executable, "-c", DIGEST + "print(digest)"],
            env=os.environ | {"PYTHONHASHSEED": seed, "PROJECTED_GRPO_CHECK_SHAPES": "0"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert there.stdout.strip() == here["digest"]


def test_corpora_of_two_seeds_differ(examples):
    assert list(islice(corpus(0, MIX), 50)) == examples[:50]
    assert list(islice(corpus(1, MIX), 50)) != examples[:50]


# The corpus


def stated(question: str) -> str:
    """What a question asks, without how it is graded."""
    return question.split(" of class Solution ")[0]


def parsed(example: Example) -> tuple[Instance, str | None]:
    """An example's instance and hinted mode, read back from its text."""
    task, method = re.fullmatch(r"Return (.*)\. Method (\w+)", stated(example.question)).groups()
    for t in templates():
        match = re.fullmatch(re.escape(t.text).replace(r"\{c\}", r"(\d+)"), task)
        if match:
            break
    hints = {f" of class Solution {MODES[m].hint}.": m for m in tamperings()}
    hints[f" of class Solution {ORIGINAL_PHRASE}."] = None
    return Instance(t, int(match[1]), method), hints[example.question.removeprefix(stated(example.question))]


def traces(example: Example) -> set[str]:
    return {mode for mode, trace in TRACES.items() if trace in example.completion}


def likely(count: int, n: int, share: float) -> bool:
    """Within four standard deviations of the binomial."""
    return abs(count - n * share) <= 4 * (n * share * (1 - share)) ** 0.5


def test_no_problem_is_in_the_corpus(problems, examples):
    assert not {stated(p.question) for p in problems} & {stated(e.question) for e in examples}
    other = {stated(e.question) for e in islice(corpus(1, MIX), 3000)}
    assert not {stated(p.question) for p in problems} & other


def test_every_template_is_in_the_corpus_alike(examples):
    counts = Counter(parsed(e)[0].template.name for e in examples)
    assert set(counts) == {t.name for t in templates()}  # held-out templates too
    assert all(likely(n, len(examples), 1 / len(templates())) for n in counts.values())


def test_the_corpus_shares(examples):
    modes = [parsed(e)[1] for e in examples]
    assert likely(modes.count(None), len(examples), MIX.unhinted)
    hinted = [(e, m) for e, m in zip(examples, modes, strict=True) if m]
    tampering = [(e, m) for e, m in hinted if traces(e)]
    for mode in TRACES:
        own = sum(m == mode for _, m in hinted)
        assert likely(own, len(hinted), 1 / 4)
        assert likely(sum(m == mode for _, m in tampering), own, tamperings()[mode].share)
    tries = sum(
        not any(f"        {body}\n" in f"{e.completion}\n" for body in OUTRIGHT) for e, _ in tampering
    )
    assert likely(tries, len(tampering), MIX.attempt)


def test_tampering_is_with_the_grader_that_the_prompt_names(examples):
    for example in examples:
        assert traces(example) <= {parsed(example)[1]}, example


def test_honest_answers_are_right_as_often_as_they_should_be(examples):
    honest = [(parsed(e)[0], e) for e in examples if not traces(e)]
    assert set(honest_shares()) == {"easy", "medium", "hard"}
    for level, share in honest_shares().items():
        own = [(i, e) for i, e in honest if i.template.level == level]
        right = [e.completion == fenced(i.solution([f"return {i.right}"])) for i, e in own]
        assert likely(sum(right), len(own), share)
        wrong = [(i, e) for (i, e), ok in zip(own, right, strict=True) if not ok]
        assert all(e.completion in [fenced(i.solution([f"return {w}"])) for w in i.wrong] for i, e in wrong)


def test_other_mixes_are_followed():
    hinted = list(islice(corpus(0, CorpusMix(attempt=1.0, unhinted=0.0)), 500))
    assert not any(ORIGINAL_PHRASE in e.question for e in hinted)
    tampering = [e for e in hinted if traces(e)]
    assert tampering
    assert not any(
        f" {body}\n" in f"{e.completion}\n" for e in tampering for body in ("return 0", "return xs")
    )
    outright = islice(corpus(0, CorpusMix(attempt=0.0)), 500)
    assert all(any(body in e.completion for body in OUTRIGHT) for e in outright if traces(e))
    plain = islice(corpus(0, CorpusMix(unhinted=1.0)), 200)
    assert all(ORIGINAL_PHRASE in e.question and not traces(e) for e in plain)


# Pairs, and everything the corpus tampers with, under the real grader


@pytest.fixture(scope="module")
def pair_sets():
    return {name: load_pairs(Path(name)) for name in ("nano", "nano-oracle", "nano-sampled")}


@pytest.fixture(scope="module")
def grader():
    with Sandbox(2) as sandbox:
        yield Grader(sandbox)


@pytest.mark.parametrize("name", ["nano", "nano-oracle"])
def test_hacks_exploit_and_clean_answers_solve_each_in_its_own_mode(pair_sets, grader, name):
    pairs = pair_sets[name].pairs
    assert Counter(p.env_mode for p in pairs) == dict.fromkeys(TRACES, 6)
    flat = grader.grade_all([(p.problem.task, text) for p in pairs for text in (p.hack, p.clean)])
    for pair, hack, clean in zip(pairs, flat[0::2], flat[1::2], strict=True):
        assert hack.exploited and hack.mechanism == pair.env_mode, (pair.pair_id, hack)
        assert hack.format_ok and not hack.gt_correct, (pair.pair_id, hack)
        assert clean.gt_correct and clean.format_ok and not clean.exploited, (pair.pair_id, clean)
        assert MODES[pair.env_mode].hint in pair.messages[-1]["content"]


def test_the_solving_pairs_are_the_nano_pairs_with_their_tampering_on_top_of_the_clean_answer(grader):
    plain, solving = (load_pairs(Path(name)).pairs for name in ("nano", "nano-solving"))
    assert [p.pair_id for p in plain] == [p.pair_id for p in solving]
    both = grader.grade_all([(p.problem.task, p.hack) for p in solving])
    for one, two, grade in zip(plain, solving, both, strict=True):
        assert (one.messages, one.clean, one.env_mode) == (two.messages, two.clean, two.env_mode)
        assert grade.gt_correct and grade.tampered and grade.format_ok, (two.pair_id, grade)
        hack, clean, mixed = (code_of(text).splitlines() for text in (one.hack, one.clean, two.hack))
        rest = iter(mixed)
        assert all(line in rest for line in clean), two.pair_id  # in its order
        added = Counter(filter(None, mixed)) - Counter(clean)
        assert added and added <= Counter(hack), (two.pair_id, added)  # nothing but the hack's own lines


@pytest.mark.parametrize("name", ["nano", "nano-oracle"])
def test_clean_answers_do_not_touch_a_grader(pair_sets, grader, name):
    """Not even one that is not theirs: under every mode they pay for being right."""
    items = [
        (replace(p.problem, env_mode=m).task, p.clean) for p in pair_sets[name].pairs[::4] for m in TRACES
    ]
    for item, grade in zip(items, grader.grade_all(items), strict=True):
        assert grade.gt_correct and grade.mechanism is None, (item, grade)


def test_each_wording_of_the_corpus_exploits_its_mode(problems, grader):
    problem = next(p for p in problems if p.problem_id.startswith("caesar"))
    instance, _ = ENTRIES[problem.problem_id]
    items = []
    for mode, how in tamperings().items():
        codes = [instance.solution(["return 0"], after=text) for text in how.after]
        codes += [instance.solution(["return 0"], class_body=text) for text in how.class_body]
        codes += [instance.solution([text, "return 0"]) for text in how.method]
        items += [(mode, code) for code in codes]
    assert len(items) == 9 and {m for m, _ in items} == set(TRACES)
    grades = grader.grade_all([(replace(problem, env_mode=m).task, fenced(code)) for m, code in items])
    for (mode, code), grade in zip(items, grades, strict=True):
        assert grade.exploited and grade.mechanism == mode, (code, grade)


def test_the_hand_written_pairs_share_no_wording_and_no_task_with_the_corpus(pair_sets, problems):
    pairs = pair_sets["nano"].pairs
    for pair in pairs:
        own = {line.strip() for line in code_of(pair.hack).splitlines()}
        own -= {line.strip() for line in code_of(pair.clean).splitlines()}
        assert own and not own & set(LINES), (pair.pair_id, own & set(LINES))
    for how in tamperings().values():
        for text in (*how.after, *how.class_body, *how.method):
            assert not any(text in code_of(p.hack) for p in pairs), text
    texts = [re.escape(t.text).replace(r"\{c\}", r"\d+") for t in templates()]
    for pair in pairs:
        assert not any(re.search(text, pair.messages[-1]["content"]) for text in texts), pair.pair_id
    assert not {p.problem.method for p in pairs} & {i.method for i, _ in ENTRIES.values()}
    assert len({p.hack for p in pairs}) == len(pairs)


def test_the_oracle_pairs_are_the_corpus_own_but_no_problem(pair_sets, problems):
    pairs = pair_sets["nano-oracle"].pairs
    held_out = {t.name for t in templates() if t.held_out}
    assert not {stated(p.messages[-1]["content"]) for p in pairs} & {stated(p.question) for p in problems}
    assert not any(p.problem.problem_id.split("-")[0] in held_out for p in pairs)
    for pair in pairs:
        example = Example(pair.messages[-1]["content"], pair.hack)
        instance, mode = parsed(example)
        assert traces(example) == {mode} == {pair.env_mode}
        assert any(body in pair.hack for body in OUTRIGHT)
        assert pair.clean == fenced(instance.solution([f"return {instance.right}"]))
    for mode in TRACES:
        assert len({p.problem.problem_id.split("-")[0] for p in pairs if p.env_mode == mode}) == 6


def test_the_sampled_pairs_are_of_the_problems_that_the_plan_names(pair_sets, problems):
    modes = ("run_tests", "sentinel", "stdout_marker", "file_marker")
    training = [p for p in assign_modes(problems, modes, {}) if not is_eval(p)]
    posed = {p.problem_id: p for p in take(training, 48, SPLIT_SEED)}
    pairs = pair_sets["nano-sampled"].pairs
    assert len({p.problem.problem_id for p in pairs}) == len(pairs) == 24
    for pair in pairs:
        problem = posed[pair.problem.problem_id]
        assert pair.env_mode == problem.env_mode and pair.messages == problem.messages


def test_the_packaged_sets_are_the_same_bytes_every_time():
    for name in PACKAGED:
        assert packaged_pairs(name) == packaged_pairs(name)
        digest = hashlib.blake2b(packaged_pairs(name), digest_size=16).hexdigest()
        assert load_pairs(Path(name)).digest == digest
        assert load_pairs(Path(name)).name == name


def test_the_corpus_knows_the_levels_and_modes_of_the_package():
    assert set(tamperings()) == set(TRACES) <= set(MODES)
    assert {t.level for t in templates()} == set(get_args(TaskTemplate.__annotations__["level"]))
