"""What can be wrong with a problem file: answers that its tests let pass, problems that nothing solves."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

from projected_grpo.problems import Problem, ProblemSet
from projected_grpo.rewards import answers_right, asking_order, first_error, main_program
from projected_grpo.sandbox.host import Outcome, Sandbox
from projected_grpo.sandbox.oracle import trivial_answers

SHOWN = 50  # problems; of a file with more, only those with findings are printed
REMARKS = {"None": " (all expected values are None: anything that returns nothing is right)"}


@dataclass(frozen=True)
class Linted:
    """One problem: its tests, the answers that try nothing and are right, how its own solution fares.

    Seconds are the solution's. A problem that is left out has None where nothing is known.
    """

    problem_id: str
    tests: int | None = None
    trivial: tuple[str, ...] = ()
    solution_right: bool | None = None
    cpu_s: float | None = None
    wall_s: float | None = None
    error: str | None = None
    left_out: str | None = None

    @property
    def findings(self) -> list[str]:
        """What is wrong with it."""
        found = [f"left out: {self.left_out}"] if self.left_out else []
        found += [f"returning {name} is right{REMARKS.get(name, '')}" for name in self.trivial]
        return found + ([f"its solution is not right: {self.error}"] if self.solution_right is False else [])


def lint(loaded: ProblemSet, sandbox: Sandbox) -> list[Linted]:
    """The usable problems of a file, whose solutions are run, then those that are left out."""
    asked = [(p, asking_order(p.task, p.canonical)) for p in loaded.problems]
    running = [sandbox.submit(main_program(p.task, [p.canonical], order)) for p, order in asked]
    bar = tqdm(zip(asked, running, strict=True), total=len(asked), desc="solutions", disable=None)
    found = [examine(problem, order, outcome.result()) for (problem, order), outcome in bar]
    return found + [Linted(name, left_out=reason) for name, reason in loaded.left_out]


def examine(problem: Problem, order: Sequence[int], outcome: Outcome) -> Linted:
    """What is known of a problem once its solution has run."""
    right = answers_right(problem.task, order, outcome)
    error = first_error(problem.task, order, outcome)
    if outcome.status == "timeout":
        error += "; --cpu-seconds and --wall-seconds raise it"
    return Linted(
        problem.problem_id,
        len(problem.calls),
        tuple(trivial_answers(problem.calls)),
        right,
        round(outcome.cpu_s, 3),
        round(outcome.seconds, 3),
        None if right else error,
    )


def report(source: str, found: Sequence[Linted]) -> dict[str, Any]:
    """Everything as plain data: counts, then every problem."""
    run = [one for one in found if one.cpu_s is not None]
    slowest = max(run, key=lambda one: one.cpu_s or 0.0, default=None)
    return {
        "source": source,
        "problems": len(found),
        "with_findings": sum(bool(one.findings) for one in found),
        "left_out": sum(one.left_out is not None for one in found),
        "trivial": sum(bool(one.trivial) for one in found),
        "solution_not_right": sum(one.solution_right is False for one in found),
        "slowest": slowest and {"problem_id": slowest.problem_id, "cpu_s": slowest.cpu_s},
        "each": [asdict(one) | {"findings": one.findings} for one in found],
    }


def describe(source: str, found: Sequence[Linted]) -> str:
    """The report for the terminal: a line per problem, then the counts."""
    said, solution = report(source, found), {True: "right", False: "not right", None: "-"}
    rows = [
        [
            one.problem_id,
            "-" if one.tests is None else one.tests,
            solution[one.solution_right],
            "-" if one.cpu_s is None else f"{one.cpu_s:.2f}",
            "; ".join(one.findings) or "-",
        ]
        for one in found
        if one.findings or len(found) <= SHOWN
    ]
    headers = ["problem", "tests", "its solution", "CPU s", "findings"]
    table = tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
    counts = (
        f"{source}: {said['problems']} problems, {said['with_findings']} with findings: {said['left_out']} "
        f"left out, {said['trivial']} solved without trying, {said['solution_not_right']} whose own solution "
        "is not right"
    )
    slowest = said["slowest"]
    return f"{table}\n{counts}" + (f"; slowest solution {slowest['cpu_s']:.2f} s of CPU" if slowest else "")
