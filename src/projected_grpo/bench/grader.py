"""Benchmarks: our figure with a baseline and a floor measured in the same run, on the same work."""

import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tabulate import tabulate

from projected_grpo.options.verbs import BenchGraderOptions
from projected_grpo.pools import Teacher
from projected_grpo.problems import Problem
from projected_grpo.rewards import Grader, Task
from projected_grpo.runlog import git_commit
from projected_grpo.sandbox.host import Limits, Outcome, Plan, Program, Sandbox, T
from projected_grpo.sandbox.responses import extract_code

Work = Sequence[tuple[Task, str]]
LOOP = (
    "```python\nclass Solution:\n    def {method}(self, *a, **k):\n        while True:\n            pass\n```"
)
TESTS_PER_RESPONSE = 3
CANONICAL_SAMPLE = 20  # canonical solutions that plain subprocesses run too
SLOW_S = 0.2  # own CPU time from which a response is counted, and named, apart


@dataclass(frozen=True)
class Single:
    """One response graded alone: its latency, its programs, and their CPU time."""

    seconds: float
    programs: tuple[Program, ...]
    cpu_s: float


class Metered(Sandbox):
    """Remembers the programs it was given and adds up their CPU time."""

    def __init__(self, workers: int | None = None) -> None:
        self.programs: list[Program] = []
        self.outcomes: list[Outcome] = []
        super().__init__(workers)

    def submit_plan(self, plan: Plan, conclude: Callable[[Mapping[str, Outcome]], T]) -> Future[T]:
        def noted(done: Mapping[str, Outcome]) -> Mapping[str, Program]:
            programs = plan(done)
            self.programs += programs.values()
            return programs

        def counted(done: Mapping[str, Outcome]) -> T:
            self.outcomes += done.values()
            return conclude(done)

        return super().submit_plan(noted, counted)

    def forget(self) -> None:
        self.programs, self.outcomes = [], []

    def __enter__(self) -> "Metered":
        return self


def benchmark_work(problems: Sequence[Problem], limit: int) -> list[tuple[Task, str]]:
    """Each canonical solution with a run_tests of its own, so that the oracle and all detectors run."""
    chosen = problems[:limit] if limit else problems
    work = []
    for problem in chosen:
        checks = "\n".join(f"    {call.source}" for call in problem.calls[:TESTS_PER_RESPONSE])
        text = f"```python\n{problem.canonical.strip()}\n\n\ndef run_tests():\n{checks}\n```"
        work.append((problem.task, text))
    return work


def pool_work(problems: Sequence[Problem], teacher: Teacher, limit: int) -> list[tuple[Task, str]]:
    """A pool's completions, each with its problem under the pool's mode."""
    work = [
        (teacher.posed(problem).task, text)
        for problem in problems
        for text in (row.completion for row in teacher.rows.get(problem.problem_id, ()))
    ]
    return work[:limit] if limit else work


def bench_grader(work: Work, options: BenchGraderOptions) -> dict[str, Any]:
    """Responses per second, latencies, the floor, what endless loops cost, and plain subprocesses."""
    load = os.getloadavg()[0]
    with Metered(options.workers or None) as sandbox:
        grader, workers = Grader(sandbox), sandbox.workers
        singles = [single(grader, sandbox, *response) for response in work]
        empty_s = {count: empty_cpu(sandbox, count) for count in {1, *(len(one.programs) for one in singles)}}
    own = [max(0.0, one.cpu_s - empty_s[len(one.programs)]) for one in singles]
    slow = [i for i, seconds in enumerate(own) if seconds > SLOW_S]
    quick = [i for i in range(len(work)) if i not in set(slow)]
    asked = min(options.baseline_sample or 0, len(quick))
    sample = quick[:: len(quick) // asked][:asked] if asked else []
    return {
        "responses": len(work),
        "programs": sum(len(one.programs) for one in singles),
        "workers": workers,
        "all": rates(work, own, workers, options),
        "slow": [
            {"problem_id": work[i][0].problem_id, "own_cpu_s": own[i]}
            for i in sorted(slow, key=own.__getitem__, reverse=True)
        ],
        "without_slow": rates([work[i] for i in quick], [own[i] for i in quick], workers, options),
        "empty_program_cpu_s": empty_s[1],
        "latency_s": quantiles([one.seconds for one in singles]),
        "loops": bench_loops(work[0][0], workers, options),
        "baseline": baseline(work, singles, sample, workers, options),
        "load_average_before": load,
        **machine(),
    }


def machine() -> dict[str, Any]:
    """What a figure was measured on."""
    cores, python = len(os.sched_getaffinity(0)), platform.python_version()
    return {"cores": cores, "python": python, "git_commit": git_commit()}


def timed(function: Callable[[], object]) -> float:
    started = time.monotonic()
    function()
    return time.monotonic() - started


def single(grader: Grader, sandbox: Metered, task: Task, text: str) -> Single:
    """Grade one response on an idle sandbox."""
    sandbox.forget()
    seconds = timed(lambda: grader.grade(task, text))
    return Single(seconds, tuple(sandbox.programs), sum(outcome.cpu_s for outcome in sandbox.outcomes))


def empty_cpu(sandbox: Sandbox, programs: int) -> float:
    """CPU seconds of a response's programs where they do nothing: several of them share a process."""
    plan = {str(i): Program("", "f", more=i < programs - 1) for i in range(programs)}
    waiting = [
        sandbox.submit_plan(
            lambda done: {} if done else plan, lambda done: sum(one.cpu_s for one in done.values())
        )
        for _ in range(20)
    ]
    return median(future.result() for future in waiting)


def rates(work: Work, own: Sequence[float], workers: int, options: BenchGraderOptions) -> dict[str, Any]:
    """Responses per second with one worker and with all, and what no grader of this work could exceed.

    The floor is the programs' own CPU time (an empty program's subtracted), spread evenly over the workers.
    """
    if not work:
        return {"responses": 0}
    return {
        "responses": len(work),
        "one_worker_per_s": throughput(work, 1, options.repeats),
        "all_workers_per_s": throughput(work, workers, options.repeats),
        "own_cpu_s": sum(own),
        "floor_s": sum(own) / workers,
        "floor_per_s": len(work) * workers / sum(own) if sum(own) else None,
    }


def throughput(work: Work, workers: int, repeats: int) -> float:
    """Responses per second, the best of some passes: what else runs on a machine only ever slows it."""
    with Sandbox(workers) as sandbox:
        grader = Grader(sandbox)
        grader.grade_all([work[0]] * workers)  # the interpreters are up
        return len(work) / min(timed(lambda: grader.grade_all(work)) for _ in range(repeats))


def cpu_of_tree() -> float:
    """CPU seconds so far of this process, its descendants, and those of them that ended."""
    parents: dict[int, int] = {}
    seconds: dict[int, float] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path("/proc", name, "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(name)] = int(fields[1])
        seconds[int(name)] = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    family = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(seconds.get(pid, 0.0) for pid in family)


def cpu_per_response(work: Work) -> float:
    """CPU seconds of trainer, interpreter and programs together, one worker; one tick of the clock at least,
    since that is what the kernel counts in.
    """
    with Sandbox(1) as sandbox:
        grader = Grader(sandbox)
        grader.grade(*work[0])
        before = cpu_of_tree()
        grader.grade_all(work)
        return max(cpu_of_tree() - before, 1 / os.sysconf("SC_CLK_TCK")) / len(work)


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 90th percentile and maximum."""
    ranked = sorted(values)
    return {"median": median(ranked), "p90": ranked[int(0.9 * (len(ranked) - 1))], "max": ranked[-1]}


def bench_loops(task: Task, workers: int, options: BenchGraderOptions) -> dict[str, Any]:
    """What one endless loop costs, and several at once against the ideal of loops / workers x limit."""
    if not options.loops:
        return {"count": 0}
    limits = Limits(wall_s=options.loop_limit) if options.loop_limit else Limits()
    limit = min(limits.wall_s, limits.cpu_s)
    loop = (task, LOOP.format(method=task.method))
    with Sandbox(workers, limits) as sandbox:
        grader = Grader(sandbox)
        grader.grade_all([(task, "```python\n```")] * workers)
        one_s = timed(lambda: grader.grade(*loop))
        all_s = timed(lambda: grader.grade_all([loop] * options.loops))
    ideal = options.loops / workers * limit
    loops = {"count": options.loops, "all_s": all_s, "ideal_s": ideal, "over_ideal": all_s / ideal}
    return {"limit_s": limit, "one_s": one_s, **loops}


def baseline(
    work: Work, singles: Sequence[Single], sample: Sequence[int], workers: int, options: BenchGraderOptions
) -> dict[str, Any]:
    """The sample's programs as plain scripts, one after another, against the grader on the same responses."""
    if not sample:
        return {"responses": 0}
    scripts = [
        as_script(program, extract_code(work[i][1]) or "") for i in sample for program in singles[i].programs
    ]
    before = cpu_of_tree()
    passes = [plain_subprocesses(scripts) for _ in range(options.repeats)]
    plain_cpu = (cpu_of_tree() - before) / len(sample) / options.repeats
    plain = len(sample) / min(passes)
    chosen = [work[i] for i in sample]
    our_cpu = cpu_per_response(chosen)
    one, every = (throughput(chosen, count, options.repeats) for count in (1, workers))
    return {
        "responses": len(sample),
        "programs": len(scripts),
        "plain_per_s": plain,
        "one_worker_per_s": one,
        "all_workers_per_s": every,
        "ratio_one_worker": one / plain,
        "ratio_all_workers": every / plain,
        "plain_cpu_s": plain_cpu,
        "our_cpu_s": our_cpu,
        "ratio_cpu": plain_cpu / our_cpu,
    }


def plain_subprocesses(scripts: Sequence[str]) -> float:
    """Seconds that plain interpreters take for the scripts, one after another; on stdin, as -c is limited.

    Nothing contains them, but that each begins in a folder of its own, which goes with what was left in it.
    """
    command = [sys.executable, "-"]
    started = time.monotonic()
    for script in scripts:
        data = script.encode(errors="replace")
        with (
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
            suppress(subprocess.TimeoutExpired),
        ):
            subprocess.run(command, input=data, cwd=folder, capture_output=True, timeout=10, check=False)
    return time.monotonic() - started


def as_script(program: Program, code: str) -> str:
    """The same program for a plain interpreter."""
    lines = [program.setup, code]
    if program.action == "tests":
        if program.substitute == "stub":
            lines.append(f"Solution.{program.method} = lambda self, *a, **k: 0")
        elif program.substitute == "canonical":
            lines.append(program.canonical)
        place = "" if program.test_place == "module" else "Solution()."
        lines.append(f"{place}{program.test_name}()")
    else:
        lines += program.calls
    return "\n".join(lines)


def bench_table(report: Mapping[str, Any]) -> str:
    """The figures as a table, and under it the responses that are slow by themselves."""
    rows: dict[str, str] = {}
    for name, part in (
        ("", report["all"]),
        (f", without {len(report['slow'])} slow ones", report["without_slow"]),
    ):
        if part["responses"] and (not name or report["slow"]):
            floor = f"{part['floor_per_s']:.1f}" if part["floor_per_s"] else "none"
            own = f"({part['own_cpu_s']:.2f} s / {report['workers']})"
            rows |= {
                f"one worker{name}": f"{part['one_worker_per_s']:.1f} responses/s",
                f"{report['workers']} workers{name}": f"{part['all_workers_per_s']:.1f} responses/s",
                f"limit set by the programs' own CPU time{name}": f"{floor} responses/s {own}",
            }
    latency, loops, plain = report["latency_s"], report["loops"], report["baseline"]
    milliseconds = " / ".join(f"{latency[k] * 1e3:.0f}" for k in ("median", "p90", "max"))
    rows["latency, median / p90 / max"] = f"{milliseconds} ms"
    rows["CPU time of an empty program"] = f"{report['empty_program_cpu_s'] * 1e3:.1f} ms"
    if loops["count"]:
        rows[f"an endless loop (limit {loops['limit_s']:g} s)"] = f"{loops['one_s']:.2f} s"
        rows[f"{loops['count']} endless loops"] = (
            f"{loops['all_s']:.2f} s, ideal {loops['ideal_s']:.2f} s, ratio {loops['over_ideal']:.2f}"
        )
    if plain["responses"]:
        heading = f"plain subprocesses, {plain['responses']} responses, {plain['programs']} programs"
        rows[heading] = f"{plain['plain_per_s']:.2f} responses/s"
        for workers, which in (("one worker", "one_worker"), (f"{report['workers']} workers", "all_workers")):
            rate, ratio = plain[f"{which}_per_s"], plain[f"ratio_{which}"]
            rows[f"ours on these, {workers}"] = f"{rate:.1f} responses/s, {ratio:.1f} times"
        both = " / ".join(f"{plain[key] * 1e3:.0f}" for key in ("plain_cpu_s", "our_cpu_s"))
        rows["CPU time of one of these, plain / ours"] = f"{both} ms, {plain['ratio_cpu']:.1f} times"
    heading = f"{report['responses']} responses, {report['programs']} programs"
    names = ", ".join(f"{one['problem_id']} ({one['own_cpu_s']:.2f} s)" for one in report["slow"])
    slow = f"\nover {SLOW_S} s of own CPU time: {names}" if names else ""
    return tabulate(rows.items(), headers=[heading, ""], tablefmt="github") + slow
