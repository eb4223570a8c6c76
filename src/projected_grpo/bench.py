"""Benchmarks: our figure beside a baseline measured in the same run, on the same work."""

import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from tabulate import tabulate

from projected_grpo.problems import Problem
from projected_grpo.rewards import Grader, Task, extract_code
from projected_grpo.runlog import git_commit
from projected_grpo.sandbox import Sandbox

Work = Sequence[tuple[Task, str]]
LOOP = (
    "```python\nclass Solution:\n    def {method}(self, *a, **k):\n        while True:\n            pass\n```"
)
TESTS_PER_RESPONSE = 3


def benchmark_work(problems: Sequence[Problem], limit: int) -> list[tuple[Task, str]]:
    """Each canonical solution with a run_tests of its own, so that the oracle and all detectors run."""
    chosen = problems[:limit] if limit else problems
    work = []
    for problem in chosen:
        checks = "\n".join(f"    {call.source}" for call in problem.calls[:TESTS_PER_RESPONSE])
        text = f"```python\n{problem.canonical.strip()}\n\n\ndef run_tests():\n{checks}\n```"
        work.append((problem.task, text))
    return work


def bench_grader(work: Work, workers: int | None, baseline_sample: int) -> dict[str, Any]:
    """Responses per second with one worker and with all, latencies, a timeout's cost, plain subprocesses."""
    with Sandbox(1) as sandbox:
        alone = _throughput(Grader(sandbox), work)
    with Sandbox(workers) if workers else Sandbox() as sandbox:
        grader = Grader(sandbox)
        together = _throughput(grader, work)
        latency = _latencies(grader, work)
        task = work[0][0]
        started = time.monotonic()
        grader.grade(task, LOOP.format(method=task.method))
        timeout_s = time.monotonic() - started
    sample = work[:: max(1, len(work) // baseline_sample)][:baseline_sample]
    with Sandbox(1) as sandbox:
        ours_on_sample = _throughput(Grader(sandbox), sample)
    plain = _plain_subprocesses(sample)
    return {
        "responses": len(work),
        "one_worker_per_s": alone,
        "all_workers_per_s": together,
        "latency_s": latency,
        "timeout_s": timeout_s,
        "sample": len(sample),
        "sample_ours_one_worker_per_s": ours_on_sample,
        "sample_plain_subprocess_per_s": plain,
        "ratio_one_worker": ours_on_sample / plain,
        "python": platform.python_version(),
        "git_commit": git_commit(),
    }


def _throughput(grader: Grader, work: Work) -> float:
    grader.grade(*work[0])  # the interpreters are up
    started = time.monotonic()
    grader.grade_all(list(work))
    return len(work) / (time.monotonic() - started)


def _latencies(grader: Grader, work: Work) -> dict[str, float]:
    seconds = []
    for task, text in work:
        started = time.monotonic()
        grader.grade(task, text)
        seconds.append(time.monotonic() - started)
    ranked = sorted(seconds)
    return {"median": median(ranked), "p90": ranked[int(0.9 * (len(ranked) - 1))], "max": ranked[-1]}


def _plain_subprocesses(work: Work) -> float:
    started = time.monotonic()
    for task, text in work:
        for program in _programs(task, text):
            subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=False)
    return len(work) / (time.monotonic() - started)


def _programs(task: Task, text: str) -> list[str]:
    """The same four programs as scripts: all calls; the tests on stub, canonical and own solution."""
    code = extract_code(text) or ""
    base = f"{task.setup_code}\n{code}\n"
    calls = "\n".join(call.source for call in task.calls)
    substitutes = (f"Solution.{task.method} = lambda self, *a, **k: 0", task.canonical, "")
    return [base + calls, *(f"{base}{substitute}\nrun_tests()" for substitute in substitutes)]


def bench_table(report: Mapping[str, Any]) -> str:
    """The figures as a table."""
    latency = report["latency_s"]
    rows = [
        ["one worker", f"{report['one_worker_per_s']:.1f} responses/s"],
        ["all workers", f"{report['all_workers_per_s']:.1f} responses/s"],
        [
            "latency, median / p90 / max",
            " / ".join(f"{latency[k] * 1e3:.0f}" for k in ("median", "p90", "max")) + " ms",
        ],
        ["an infinite loop", f"{report['timeout_s']:.2f} s"],
        [
            f"plain subprocess per program ({report['sample']} responses)",
            f"{report['sample_plain_subprocess_per_s']:.1f} responses/s",
        ],
        ["ours, one worker, same responses", f"{report['sample_ours_one_worker_per_s']:.1f} responses/s"],
        ["ratio", f"{report['ratio_one_worker']:.1f}"],
    ]
    return tabulate(rows, headers=[f"{report['responses']} responses", ""], tablefmt="github")
