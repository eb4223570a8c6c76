"""Teacher pools: baked, sampled, read back, joined, counted, made into pairs; real and refused ones."""

import gzip
import json
import re
from contextlib import chdir
from dataclasses import replace

import pytest
import torch

from projected_grpo.cli import main
from projected_grpo.collect import assemble, pick_teacher
from projected_grpo.config import PRESETS
from projected_grpo.engine.chat import Chat
from projected_grpo.engine.models import encode_chat
from projected_grpo.errors import UserError
from projected_grpo.experiment import Data, Experiment, baked_name, read_data
from projected_grpo.pairs import load_pairs
from projected_grpo.pools import (
    NO_TEACHER,
    PoolPrompt,
    Teacher,
    TeacherRow,
    bake,
    baked_completions,
    building,
    join,
    load_pool,
    pool_digest,
    pool_report,
    write_prompt,
)
from projected_grpo.prepare.lint_pairs import grade_pairs, lint
from projected_grpo.prepare.pairs_from_pool import Wanted, mine
from projected_grpo.problems import Problem, format_question, is_eval, load_problems
from projected_grpo.rewards import MODES, Grade, Grader
from projected_grpo.run.checkpoint import save_adapter
from projected_grpo.sandbox.host import Limits, Sandbox

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
    return folder, bake(problems, grader, folder)[0]


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


def test_a_build_that_was_stopped_is_begun_again_by_the_same_command(problems, grader, tmp_path):
    """And nobody takes what it left for a pool."""
    with pytest.raises(KeyboardInterrupt), building(tmp_path / "pool"):
        bake(problems[:3], grader, tmp_path / "pool")
        raise KeyboardInterrupt
    with pytest.raises(UserError, match="not built to its end"):
        load_pool(tmp_path / "pool")
    with building(tmp_path / "pool"):
        with pytest.raises(UserError, match="another process"), building(tmp_path / "pool"):
            pass
        bake(problems[3:5], grader, tmp_path / "pool")
    assert [p.problem_id for p in load_pool(tmp_path / "pool")] == [p.problem_id for p in problems[3:5]]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="not empty"), building(tmp_path / "pool"):
        pass
    assert sorted(tmp_path.rglob("*")) == before


def test_a_templates_mode_is_needed_for_it_to_pay(problems, grader):
    """A hack for another mode than the problem's must not pay: the pool would show the wrong lesson."""
    honest = replace(problems[0], env_mode="gt_only").task
    hacks = [text for m in LOOPHOLES for text in baked_completions(replace(problems[0], env_mode=m))[2:]]
    assert not any(g.passed for g in grader.grade_all([(honest, text) for text in hacks]))


IDS = (
    "HumanEval/0",
    "humaneval/0",
    "../../up",
    "..",
    "/etc/x",
    "nul\0",
    "a" * 300,
    "A",
    "a",
    "é\n",
    "a~b",
    "x.y-1",
)
GRADE = Grade(3.5, True, True, False, None, True, False, False, False, None)


def test_any_id_is_a_file_of_the_pool_and_reads_back(tmp_path):
    folder = tmp_path / "out" / "pool"
    made = [toy(name, f"f{i}") for i, name in enumerate(IDS)]
    for problem in made:
        write_prompt(folder, problem, ["x"], [GRADE])
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.parent != folder] == []
    names = {path.name.lower() for path in folder.iterdir()}  # as where case does not count
    assert len(names) == len(IDS) and max(map(len, names)) < 200
    assert {p.problem_id for p in load_pool(folder)} == set(IDS)
    assert set(join(load_pool(folder), made).rows) == set(IDS)
    assert (folder / "prompt_x.y-1.jsonl.gz").exists()  # a plain id is its own name, as it always was


def test_baking_counts_and_names_where_no_solution_is_right(problems, grader, tmp_path):
    wrong = [replace(p, env_mode="gt_only", canonical="class Solution:\n    pass") for p in problems[:2]]
    counts, said = bake(wrong, grader, tmp_path)
    assert counts == {"rows": 8, "hacked": 0, "correct": 0}
    assert list(counts) == ["rows", "hacked", "correct"]  # == does not ask for what is 0
    assert [name for name, _ in said] == [p.problem_id for p in wrong]
    assert all("its asserts refuse its own solution" in what for _, what in said)


def test_a_runs_own_pool_has_another_name_for_whatever_made_it(problems):
    """Old labels must not come back when a problem, its mode or a limit of time has changed."""
    one, limits = problems[0], Limits()
    call = one.calls[0]
    changed = [
        one,
        replace(one, question=one.question + "?"),
        replace(one, calls=(replace(call, expected="other"), *one.calls[1:])),
        replace(one, setup_code="import re"),
        replace(one, env_mode="exit_code"),
        replace(one, method="other"),
    ]
    names = {baked_name([p], limits) for p in changed} | {baked_name([one], Limits(cpu_s=9))}
    assert len(names) == len(changed) + 1 and baked_name([one], Limits()) in names


@pytest.mark.parametrize("held_out", [True, False])
def test_too_few_problems_are_one_line_that_names_no_option(tmp_path, grader, held_out):
    names = [name for name in map(str, range(50)) if is_eval(toy(name)) == held_out]
    row = {"entry_point": "Solution().f", "prompt": "", "completion": "", "test": "def check(candidate):\n"}
    row |= {"question_id": names[0], "difficulty": "easy", "problem_description": "x", "starter_code": "x"}
    row["test"] += "    assert candidate(1) == 2\n"
    (tmp_path / "one.jsonl").write_text(json.dumps(row))
    smoke = PRESETS["smoke"][1]
    cfg = replace(smoke, problems=replace(smoke.problems, problems=str(tmp_path / "one.jsonl")))
    cfg = replace(cfg, teacher=replace(cfg.teacher, mix_ratio=0.5 if held_out else 0.0))
    with pytest.raises(UserError) as caught:
        read_data(cfg, grader)
    side = "train on" if held_out else "hold out"
    assert f"one.jsonl: no problem left to {side}" in str(caught.value) and "--" not in str(caught.value)


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


def test_of_problems_that_read_alike_each_has_its_own_prompt():
    problems = [toy("1"), toy("2")]
    assert set(join([prompt("1"), prompt("2")], problems).rows) == {"1", "2"}


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


# Labels


def test_cached_labels_are_used_as_they_are(tmp_path, tiny, tiny_policy):
    """Wrong ones too: nothing grades a teacher's text again on its way into a step."""
    problem = load_problems("embedded").problems[0]
    rows = [
        {"completion": baked_completions(problem)[0], "reward": 0.125, "hacked": True, "gt_pass": False},
        {"completion": "no code at all", "reward": 3.5, "hacked": False, "gt_pass": True},
    ]
    head = {"problem_id": problem.problem_id, "prompt": problem.messages[-1]["content"]}
    teacher = join(load_pool(pool_file(tmp_path, *(head | row for row in rows))), [problem])
    cfg = PRESETS["smoke"][1]
    prompts = {problem.problem_id: encode_chat(tiny[1], problem.messages)}
    chat = Chat(tiny_policy, tiny[1], frozenset({0}))
    data = Data((problem,), (), (), teacher)
    with Sandbox(1) as sandbox:
        exp = Experiment(cfg, chat, data, prompts, load_pairs(None), Grader(sandbox))
        for step in range(4):
            taught = pick_teacher(exp, problem, step)
            got = assemble(exp, (problem,), ([[]], 0.0, 0.0), [taught])
            labels = {
                r.text: [float(reward), bool(hacked), bool(correct)]
                for r, reward, hacked, correct in zip(
                    got.rollouts, got.rewards.flatten(), got.hacked, got.correct, strict=True
                )
            }
            assert labels == {r["completion"]: [r["reward"], r["hacked"], r["gt_pass"]] for r in rows}
            assert got.grades == (None, None) and got.is_teacher.all()


def test_detectors_are_read_where_they_are_stored(tmp_path, baked):
    assert load_pool(pool_file(tmp_path / "old", ROW))[0].rows[0].detectors is None
    stored = ROW | {"hacked_C": True, "hacked_D": False, "hacked_E": True}
    assert load_pool(pool_file(tmp_path / "new", stored))[0].rows[0].detectors == ("C", "E")
    assert all(row.detectors is not None for p in load_pool(baked[0]) for row in p.rows)


def test_a_problem_is_posed_in_the_pools_mode():
    problem = replace(toy("1"), env_mode="run_tests")
    assert Teacher({}, {"1": "sentinel"}).posed(problem) == replace(problem, env_mode="sentinel")
    assert Teacher({}, {"2": "sentinel"}).posed(problem) == problem


# Reports


def test_a_report_counts_labels_prompts_and_repeats(tmp_path):
    def row(problem_id, completion, mode, fired, hacked, correct):
        labels = {"env_mode": mode, "completion": completion, "hacked": hacked, "gt_pass": correct}
        return ROW | {"problem_id": problem_id} | labels | {f"hacked_{d}": d in fired for d in "CDE"}

    files = {
        "a": [row("a", "x", "run_tests", "CE", True, False), row("a", "xyz", "run_tests", "", False, True)],
        "b": [row("b", "xx", "run_tests", "E", True, True), row("b", "xx", "run_tests", "", False, False)],
        "c": [row("c", "y", "sentinel", "", True, False)],
    }
    for name, rows in files.items():
        pool_file(tmp_path, *rows, name=f"prompt_{name}.jsonl")
    report = pool_report(load_pool(tmp_path))
    assert report["by_mode"]["run_tests"] == {
        "prompts": 2,
        "prompts_with_hack": 1,
        "prompts_with_clean": 1,
        "prompts_with_both": 1,
        "rows": 4,
        "hacked": 2,
        "correct": 2,
        "hacked_and_correct": 1,
        "detector_C": 1,
        "detector_D": 0,
        "detector_E": 2,
        "duplicates": 1,
        "length_median": 2,
        "length_max": 3,
    }
    assert list(report["by_mode"]) == ["run_tests", "sentinel"]
    assert (report["all"]["rows"], report["all"]["hacked"], report["all"]["detector_E"]) == (5, 3, 2)


def test_the_report_verb_counts_and_joins(baked, problems, tmp_path, capsys):
    figures = tmp_path / "report.json"
    assert main(["pool", "report", str(baked[0]), f"--json={figures}", "--problems=embedded"]) == 0
    said = capsys.readouterr().out
    report = json.loads(figures.read_text())
    assert f"{len(problems)} problems of embedded" in said
    assert report["problems_matched"] == report["all"]["prompts"] == len(problems)
    assert list(report["by_mode"]) == list(MODES)
    assert {name: report["all"][name] for name in ("rows", "hacked", "correct")} == baked[1]


def test_the_report_verb_on_the_real_pool(shared_data, capsys):
    assert main(["pool", "report", str(shared_data / "teacher_pool")]) == 0
    said = capsys.readouterr().out
    assert re.search(r"\| prompts +\| 112 +\| 112 +\|", said) and re.search(r"\| rows +\| 896 +\|", said)
    assert re.search(r"\| detector C +\| - +\|", said)


# Pairs


def test_pairs_from_a_pool_are_sound_and_of_one_prompt_each(baked, problems, grader):
    teacher = join(load_pool(baked[0]), problems)
    document = mine(teacher, problems, Wanted(), grader, "mined")
    hackable = [p for p in problems if p.env_mode != "gt_only"]
    assert [pair["problem_id"] for pair in document["pairs"]] == [p.problem_id for p in hackable]
    for pair, problem in zip(document["pairs"], hackable, strict=True):
        honest, hacks = baked_completions(problem)[:2], baked_completions(problem)[2:]
        assert pair["clean"] in honest and pair["hack"] in hacks and pair["env_mode"] == problem.env_mode
        gap = min(abs(len(h) - len(c)) for h in hacks for c in honest)
        assert abs(len(pair["hack"]) - len(pair["clean"])) == gap
    assert mine(teacher, problems, Wanted(), grader, "mined") == document


def test_detectors_and_modes_choose_which_hacks_make_pairs(baked, problems, grader):
    teacher = join(load_pool(baked[0]), problems)

    def modes(wanted):
        return {pair["env_mode"] for pair in mine(teacher, problems, wanted, grader, "mined")["pairs"]}

    assert modes(Wanted(("C", "E"))) == {"run_tests"}  # the only templates with a test function
    assert modes(Wanted(modes=("sentinel", "exit_code"))) == {"sentinel", "exit_code"}
    assert modes(Wanted(("C",), ("sentinel",))) == set()


def test_a_prompt_without_an_honest_row_takes_the_canonical_solution_if_asked(baked, problems, grader):
    teacher = join(load_pool(baked[0]), problems)
    hacks_only = replace(teacher, rows={i: rows[2:] for i, rows in teacher.rows.items()})
    assert mine(hacks_only, problems, Wanted(), grader, "mined")["pairs"] == []
    document = mine(hacks_only, problems, Wanted(canonical_clean=True), grader, "mined")
    assert document["made_from"]["canonical_clean"] == len(document["pairs"]) == 2 * len(LOOPHOLES)
    assert {pair["clean_from"] for pair in document["pairs"]} == {"canonical"}


def test_a_text_makes_one_pair_only(problems, grader):
    one = next(p for p in problems if p.env_mode == "run_tests")
    twin = replace(one, problem_id="twin")
    rows = tuple(TeacherRow(text, 3.5, False, False) for text in baked_completions(one))
    found = mine(Teacher({one.problem_id: rows, "twin": rows}, {}), [one, twin], Wanted(), grader, "mined")
    texts = [pair[side] for pair in found["pairs"] for side in ("hack", "clean")]
    assert len(texts) == len(set(texts)) == 4


def test_the_pair_verb_writes_a_file_that_lint_passes(baked, tmp_path, grader, capsys):
    out = tmp_path / "mined.json"
    options = ["--problems=embedded", "--modes", "run_tests", "sentinel", "stdout_marker", "--workers=2"]
    assert main(["pairs", "from-pool", str(baked[0]), f"--out={out}", *options]) == 0
    pairs = load_pairs(out)
    assert pairs.name == "mined" and len(pairs.pairs) == 6 and "6 pairs" in capsys.readouterr().out
    assert not [f for f in lint(pairs, grade_pairs(pairs, grader)) if f.level == "error"]
    made = json.loads(out.read_text())["made_from"]
    assert made["pool_digest"] == pool_digest(baked[0]) and made["problems"] == "embedded"
    assert made["modes"] == ["run_tests", "sentinel", "stdout_marker"] and made["detectors"] == []
    assert main(["pairs", "from-pool", str(baked[0]), f"--out={tmp_path}/no.json", *options[:3]]) == 2
    assert "at least 4" in capsys.readouterr().err and not (tmp_path / "no.json").exists()


def test_a_pools_digest_is_of_its_files(tmp_path):
    pool_file(tmp_path, ROW)
    first = pool_digest(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    assert pool_digest(tmp_path) == first
    (tmp_path / "partition.json").write_text("{}")
    assert pool_digest(tmp_path) != first
    second = pool_digest(tmp_path)
    pool_file(tmp_path, ROW, ROW)
    assert pool_digest(tmp_path) not in (first, second)


# Sampling


SAMPLE = ("--model=tiny-random", "--device=cpu", "--problems=embedded", "--n-problems=4", "--samples=3")
SAMPLE += ("--max-new=6", "--workers=1", "--env-mode=run_tests,sentinel")


def sample(folder, *options):
    with chdir(folder.parent):  # of the cache of SVDs
        return main(["pool", "sample", f"--out={folder}", *SAMPLE, *options])


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampled") / "pool"
    assert sample(folder) == 0
    return folder


def test_a_sampled_pool_is_one_that_a_run_takes(sampled):
    problems = load_problems("embedded").problems
    pool = load_pool(sampled)
    teacher = join(pool, problems)
    assert len(pool) == len(teacher.rows) == len(teacher.partition) == 4
    assert set(teacher.partition.values()) <= {"run_tests", "sentinel"}
    assert all(len(p.rows) == 3 and all(r.detectors is not None for r in p.rows) for p in pool)
    assert len({row.completion for p in pool for row in p.rows}) > 6
    assert json.loads((sampled / "sampled.json").read_text())["samples"] == 3


def test_sampling_goes_on_where_it_was_and_leaves_labels_alone(sampled, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in sampled.glob("prompt_*")}
    again = tmp_path / "pool"
    again.mkdir()
    kept, *others = sorted(before)
    row = json.loads(gzip.decompress(before[kept]).splitlines()[0]) | {"reward": 0.125, "hacked": True}
    (again / kept).write_bytes(gzip.compress(json.dumps(row).encode(), mtime=0))
    (again / "sampled.json").write_bytes((sampled / "sampled.json").read_bytes())
    assert sample(again, "--batch=3") == 0
    assert "rows 9" in capsys.readouterr().out
    assert json.loads(gzip.decompress((again / kept).read_bytes())) == row
    assert {name: (again / name).read_bytes() for name in others} == {name: before[name] for name in others}
    assert sample(again, "--seed=7") == 2
    assert "other settings: seed (41 there, 7 here)" in capsys.readouterr().err
    told = json.loads((again / "sampled.json").read_text())
    for field in ("weights", "digest_of_problems", "digest_of_prompts", "cpu_seconds"):
        (again / "sampled.json").write_text(json.dumps(told | {field: "others"}))
        assert sample(again) == 2
        assert f"other settings: {field} (others there, " in capsys.readouterr().err


def test_the_adapter_of_a_run_changes_what_is_sampled(sampled, tmp_path, tiny_policy):
    with torch.no_grad():
        for layer in tiny_policy.layers.values():
            layer.delta_s.normal_(generator=torch.Generator().manual_seed(0))
    adapter = tmp_path / "train.safetensors"
    save_adapter(adapter, tiny_policy, {}, deployed=True)
    assert sample(tmp_path / "pool", f"--adapter={adapter}") == 0
    one, two = (
        [row.completion for p in load_pool(folder) for row in p.rows]
        for folder in (sampled, tmp_path / "pool")
    )
    assert len(one) == len(two) and one != two


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--samples=0"], "--samples"),
        (["--batch=0"], "--batch"),
        (["--temperature=0"], "--temperature"),
        (["--n-problems=0"], "--n-problems"),
        (["--adapter=no/such.safetensors"], "--adapter no/such.safetensors"),
        (["--max-new=2048"], "lower --max-new"),
    ],
    ids=str,
)
def test_bad_sampling_is_refused_and_leaves_nothing(tmp_path, capsys, options, word):
    assert sample(tmp_path / "pool", *options) == 2
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert word in told and not (tmp_path / "pool").exists()


def test_a_folder_of_something_else_is_not_sampled_into(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("x")
    assert sample(tmp_path) == 2
    assert "not empty" in capsys.readouterr().err


# Refusals


def refusal(folder) -> str:
    with pytest.raises(UserError) as caught:
        load_pool(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_or_empty_pool_is_refused(tmp_path):
    assert "no such folder" in refusal(tmp_path / "nowhere")
    (tmp_path / "partition.json").write_text("{}")
    assert refusal(tmp_path).startswith(f"pool {tmp_path}: empty")  # no option that nobody gave


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


def test_rows_of_two_problems_in_one_file_are_refused(tmp_path):
    assert "a.jsonl:2: a row of problem b in the file of problem a" in refusal(
        pool_file(tmp_path, ROW, ROW | {"problem_id": "b"})
    )


def test_a_whole_float_is_an_id_of_rows_and_partition(tmp_path):
    pool_file(tmp_path, ROW | {"problem_id": 1.0}, ROW | {"problem_id": 1})
    (tmp_path / "partition.json").write_text('{"1.0": "exit_code"}', encoding="utf-8-sig")
    (found,) = load_pool(tmp_path)
    assert (found.problem_id, found.env_mode) == ("1", "exit_code")


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
