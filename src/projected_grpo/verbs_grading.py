"""The verbs that grade: anyone's completions, teacher pools, and the grader's own speed."""

from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import tyro

from projected_grpo.bench import BenchSettings, bench_grader, bench_table, benchmark_work, pool_work
from projected_grpo.config import EMBEDDED, ProblemConfig, SandboxMode, env_modes
from projected_grpo.errors import UserError
from projected_grpo.experiment import open_grader, read_problems
from projected_grpo.grading import (
    Comparison,
    as_line,
    disagreement_tables,
    grade_file,
    mode_table,
    read_completions,
)
from projected_grpo.pools import bake, join, load_pool
from projected_grpo.problems import Problem, assign_modes
from projected_grpo.runlog import write_atomically, write_json


@dataclass(frozen=True)
class GraderOptions:
    """How the grader runs, in every verb that grades."""

    workers: int = 0
    """Grader processes; 0 is one per core."""
    sandbox: SandboxMode = "auto"
    """strict refuses to start unless every layer of containment is in force; auto warns what is missing."""


@dataclass(frozen=True)
class PoolBuildOptions:
    """Canonical solutions and template hacks of every problem, graded."""

    out: Path
    """Folder to write the pool to."""
    problems: ProblemConfig = field(default_factory=lambda: ProblemConfig(problems=EMBEDDED))
    grader: GraderOptions = field(default_factory=GraderOptions)


@dataclass(frozen=True)
class PoolRegradeOptions:
    """A pool against today's grader."""

    pool: tyro.conf.Positional[Path]
    """Teacher pool folder."""
    out: Path | None = None
    """JSONL of every completion's stored and new labels."""
    problems: ProblemConfig = field(default_factory=ProblemConfig)
    grader: GraderOptions = field(default_factory=GraderOptions)


@dataclass(frozen=True)
class BenchGraderOptions:
    """Canonical solutions, each with a test function so that oracle and detectors all run, or a pool."""

    problems: ProblemConfig = field(default_factory=lambda: ProblemConfig(problems=EMBEDDED))
    pool: Path | None = None
    """Teacher pool folder: grade its completions instead, those that match one of the problems."""
    limit: int = 0
    """Take only this many responses; 0 is all."""
    workers: int = 0
    """Grader processes of the parallel measurement; 0 is one per core."""
    repeats: int = 1
    """Passes over the work for each throughput; the best counts."""
    baseline_sample: int = 20
    """How many responses plain subprocesses run, one program after another."""
    loops: int = 4
    """How many endless loops are graded at once."""
    loop_limit: float = 0.0
    """Seconds after which these are stopped; 0 is the grader's own limit."""
    json: Path | None = None
    """Write the figures here."""


@dataclass(frozen=True)
class GradeOptions:
    """Grade anyone's completions."""

    completions: Path
    """JSONL with problem_id, completion and optionally env_mode."""
    out: Path
    """JSONL to write, one line per input line, in order: the input's ids and every Grade field."""
    problems: ProblemConfig = field(default_factory=lambda: ProblemConfig(problems=EMBEDDED))
    grader: GraderOptions = field(default_factory=GraderOptions)


def with_modes(cfg: ProblemConfig) -> tuple[Problem, ...]:
    """The file's problems with their modes."""
    return assign_modes(read_problems(cfg), env_modes(cfg.env_mode), {})


def pool_build_verb(options: PoolBuildOptions) -> int:
    """Bake and grade a teacher pool."""
    if options.out.exists() and any(options.out.iterdir()):
        raise UserError(f"--out {options.out}: not empty; old prompts would stay in the pool")
    problems = with_modes(options.problems)[: options.problems.n_problems]
    with ExitStack() as stack:
        counts = bake(
            problems, open_grader(options.grader.workers, stack, options.grader.sandbox), options.out
        )
    print(f"{options.out}: {len(problems)} prompts, " + ", ".join(f"{k} {n}" for k, n in counts.items()))
    return 0


def pool_regrade_verb(options: PoolRegradeOptions) -> int:
    """Grade a teacher pool with today's grader and report where the stored labels disagree."""
    problems = with_modes(options.problems)
    teacher = join(load_pool(options.pool), problems)
    if not teacher.rows:
        raise UserError(f"{options.pool}: no overlap with the problems of {options.problems.problems}")
    by_id = {p.problem_id: p for p in problems}
    work = [
        (replace(by_id[name], env_mode=teacher.partition.get(name, by_id[name].env_mode)), i, row)
        for name, rows in teacher.rows.items()
        for i, row in enumerate(rows)
    ]
    with ExitStack() as stack:
        grader = open_grader(options.grader.workers, stack, options.grader.sandbox)
        grades = grader.grade_all([(problem.task, row.completion) for problem, _, row in work])
    compared = [
        Comparison(problem.problem_id, i, row.hacked, row.gt_pass, asdict(grade))
        for (problem, i, row), grade in zip(work, grades, strict=True)
    ]
    if options.out is not None:
        write_atomically(options.out, "".join(map(as_line, compared)).encode())
    print(f"{len(compared)} completions of {len(teacher.rows)} problems\n{disagreement_tables(compared)}")
    return 0


def grade_verb(options: GradeOptions) -> int:
    """Grade a JSONL of completions, in input order, resumable, with a summary per mode."""
    items = read_completions(options.completions, with_modes(options.problems))
    with ExitStack() as stack:
        rows = grade_file(
            items, open_grader(options.grader.workers, stack, options.grader.sandbox), options.out
        )
    print(mode_table(rows))
    return 0


def bench_grader_verb(options: BenchGraderOptions) -> int:
    """Responses per second of the grader, its latencies, and plain subprocesses on the same work."""
    if options.pool is None:
        work = benchmark_work(read_problems(options.problems), options.limit)
    else:
        problems = with_modes(options.problems)
        work = pool_work(problems, join(load_pool(options.pool), problems), options.limit)
        if not work:
            raise UserError(f"{options.pool}: no overlap with the problems of {options.problems.problems}")
    settings = BenchSettings(
        options.workers, options.repeats, options.baseline_sample, options.loops, options.loop_limit
    )
    report = bench_grader(work, settings)
    print(bench_table(report))
    if options.json is not None:
        write_json(options.json, report)
    return 0
