"""The benchmark runs what it says it runs, and names what it sets apart. No test here looks at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from hacks import CANONICAL, HACKS, WRONG, fenced, make_task
from projected_grpo import cli
from projected_grpo.bench.grader import (
    Metered,
    as_script,
    bench_grader,
    bench_table,
    benchmark_work,
    plain_subprocesses,
    pool_work,
    single,
)
from projected_grpo.options.verbs import BenchGraderOptions
from projected_grpo.pools import Teacher, TeacherRow
from projected_grpo.problems import load_problems
from projected_grpo.rewards import Grader
from projected_grpo.sandbox.responses import extract_code
from projected_grpo.verbs import bench as verbs_bench

QUICK = BenchGraderOptions(workers=2, baseline_sample=2, loops=2, loop_limit=0.3)
MEASURED = ("workers", "repeats", "baseline_sample", "loops", "loop_limit")
TESTED = CANONICAL + "\ndef run_tests():\n    assert Solution().total([1]) == 1\n"
BUSY = CANONICAL.replace("return", "[0 for _ in range(3_000_000)]\n        return")


@pytest.fixture(scope="module")
def metered():
    with Metered(1) as sandbox:
        yield sandbox


def test_the_report_counts_names_and_can_be_written():
    task = make_task("gt_only")
    report = bench_grader([(task, fenced(text)) for text in (TESTED, WRONG, BUSY)], QUICK)
    assert (report["responses"], report["programs"], report["workers"]) == (3, 4 + 1 + 1, 2)
    assert [one["problem_id"] for one in report["slow"]] == ["toy"]
    assert report["without_slow"]["responses"] == 2 and report["all"]["responses"] == 3
    assert report["without_slow"]["own_cpu_s"] < report["all"]["own_cpu_s"]
    assert (report["baseline"]["responses"], report["baseline"]["programs"]) == (2, 5)
    assert (report["loops"]["count"], report["loops"]["ideal_s"]) == (2, 0.3)
    text = bench_table(json.loads(json.dumps(report)))
    assert "1 slow" in text and "toy (" in text


def test_a_report_without_quick_responses_is_a_table_too():
    report = bench_grader([(make_task("gt_only"), fenced(BUSY))], QUICK)
    assert report["baseline"] == {"responses": 0} and report["without_slow"] == {"responses": 0}
    assert "plain" not in bench_table(report)


def test_without_a_sample_no_plain_subprocess_runs(monkeypatch):
    monkeypatch.setattr(
        "projected_grpo.bench.grader.plain_subprocesses", lambda scripts: pytest.fail("it ran")
    )
    report = bench_grader([(make_task("gt_only"), fenced(CANONICAL))], replace(QUICK, baseline_sample=0))
    assert report["baseline"] == {"responses": 0}


def test_plain_subprocesses_leave_nothing_where_they_were_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain_subprocesses(["import os; os.rmdir(os.getcwd())", "open('result.txt', 'w').write('PASS')"])
    assert not list(tmp_path.iterdir())


def test_without_loops_none_is_run():
    report = bench_grader([(make_task("gt_only"), fenced(CANONICAL))], replace(QUICK, loops=0))
    assert report["loops"] == {"count": 0} and "loop" not in bench_table(report)


def test_a_single_response_is_metered_alone(metered):
    grader = Grader(metered)
    tested = single(grader, metered, make_task("run_tests"), fenced(TESTED))
    assert [p.substitute for p in tested.programs] == ["own", "stub", "own", "canonical"]
    plain = single(grader, metered, make_task("run_tests"), fenced(CANONICAL))
    busy = single(grader, metered, make_task("run_tests"), fenced(BUSY))
    assert len(plain.programs) == len(busy.programs) == 1 and 0 < plain.cpu_s < busy.cpu_s


@pytest.mark.parametrize(
    ("mode", "code", "endings"),
    [
        ("run_tests", TESTED, [0, 1, 0, 0]),  # the calls; the test on stub, own and canonical method
        ("run_tests", HACKS["run_tests"], [0, 0, 0, 0]),
        ("exit_code", WRONG + "\nimport sys\nsys.exit(7)\n", [7, 7]),
    ],
)
def test_the_baseline_is_the_same_programs(metered, mode, code, endings):
    one = single(Grader(metered), metered, make_task(mode), fenced(code))
    scripts = [as_script(program, code) for program in one.programs]
    done = [subprocess.run([sys.executable, "-"], input=s.encode(), capture_output=True) for s in scripts]
    assert [d.returncode for d in done] == endings, [d.stderr for d in done]


def test_the_canonical_solutions_come_with_tests_and_are_right():
    work = benchmark_work(load_problems("embedded").problems, 3)
    assert len(work) == 3 and all("def run_tests" in (extract_code(text) or "") for _, text in work)
    with Metered(1) as sandbox:
        grades = Grader(sandbox).grade_all(work)
        assert all(grade.gt_correct for grade in grades) and len(sandbox.programs) == 12


def test_a_pools_completions_have_its_mode():
    problem = load_problems("embedded").problems[0]
    rows = tuple(TeacherRow(text, 0.0, False, False) for text in ("one", "two"))
    teacher = Teacher({problem.problem_id: rows, "no such": rows}, {problem.problem_id: "sentinel"})
    work = pool_work(load_problems("embedded").problems, teacher, 0)
    assert [(task.problem_id, task.env_mode, text) for task, text in work] == [
        (problem.problem_id, "sentinel", "one"),
        (problem.problem_id, "sentinel", "two"),
    ]
    assert len(pool_work(load_problems("embedded").problems, teacher, 1)) == 1


def test_the_verb_takes_a_pool_and_writes_json(tmp_path, monkeypatch, capsys):
    problem = load_problems("embedded").problems[0]
    row = {"problem_id": problem.problem_id, "prompt": problem.messages[-1]["content"], "reward": 0.5}
    row |= {"completion": fenced(problem.canonical), "hacked": False, "gt_pass": True, "env_mode": "gt_only"}
    (tmp_path / "prompt_1.jsonl").write_text(json.dumps(row) + "\n")
    seen = {}

    def measure(work, options):
        seen.update(work=work, settings=asdict(options))
        return bench_grader(work, QUICK)

    monkeypatch.setattr(verbs_bench, "bench_grader", measure)
    out = tmp_path / "bench.json"
    arguments = ["--pool", str(tmp_path), "--workers", "2", "--loops", "3", "--loop-limit", "0.5"]
    assert cli.main(["bench", "grader", *arguments, "--json", str(out)]) == 0
    assert [(task.problem_id, task.env_mode) for task, _ in seen["work"]] == [(problem.problem_id, "gt_only")]
    assert [seen["settings"][name] for name in MEASURED] == [2, 1, 0, 3, 0.5]  # nothing runs uncontained
    assert json.loads(out.read_text())["responses"] == 1 and "1 responses" in capsys.readouterr().out
    for more, sample in ((["--pool", str(tmp_path), "--baseline-sample=1"], 1), (["--limit=1"], 20)):
        assert cli.main(["bench", "grader", *more]) == 0
        assert seen["settings"]["baseline_sample"] == sample


def test_a_pool_of_other_problems_is_a_users_mistake(tmp_path, capsys):
    row = {"problem_id": "x", "prompt": None, "reward": 0.0, "completion": "", "hacked": False}
    (tmp_path / "prompt_1.jsonl").write_text(json.dumps(row | {"gt_pass": False}) + "\n")
    assert cli.main(["bench", "grader", "--pool", str(tmp_path)]) == 2
    assert "no overlap" in capsys.readouterr().err
