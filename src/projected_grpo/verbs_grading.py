"""The verbs that grade: anyone's completions, teacher pools, and the grader's own speed."""

import hashlib
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tyro
from loguru import logger

from projected_grpo.bench.grader import BenchSettings, bench_grader, bench_table, benchmark_work, pool_work
from projected_grpo.config import EMBEDDED, ModelConfig, ProblemConfig, SandboxMode, env_modes
from projected_grpo.engine.placement import pick_devices, pick_dtype
from projected_grpo.errors import UserError
from projected_grpo.experiment import SPLIT_SEED, open_chat, open_grader, read_problems, sampler_opener
from projected_grpo.pools import bake, join, load_pool, pool_report, report_table
from projected_grpo.prepare.grade_file import (
    Comparison,
    as_line,
    disagreement_tables,
    grade_file,
    mode_table,
    read_completions,
)
from projected_grpo.prepare.sample_pool import PoolSampling, sample_pool
from projected_grpo.problems import Problem, assign_modes, is_eval, load_problems, take
from projected_grpo.run.checkpoint import load_knobs
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
class PoolSampleOptions:
    """Completions of a model for every training problem, graded."""

    out: Path
    """Folder to write the pool to. A sampling that was stopped goes on in it under the same options."""
    model: ModelConfig = field(default_factory=ModelConfig)
    knobs: Path | None = None
    """Knobs of a run (train.safetensors, ckpt_stepNNNN.safetensors) to put into the model."""
    problems: ProblemConfig = field(default_factory=ProblemConfig)
    how: PoolSampling = field(default_factory=PoolSampling)
    grader: GraderOptions = field(default_factory=GraderOptions)


@dataclass(frozen=True)
class PoolReportOptions:
    """A pool's stored labels."""

    pool: tyro.conf.Positional[Path]
    """Teacher pool folder."""
    problems: str | None = None
    """Tell how many prompts match a problem of this file (or `embedded`, `nano`)."""
    json: Path | None = None
    """Write the figures here."""


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
    baseline_sample: int | None = None
    """How many responses plain subprocesses run, one program after another and without containment: 20 of the
    canonical solutions, or, unless this says so, none of a pool, whose programs may do anything."""
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


def pool_sample_verb(options: PoolSampleOptions) -> int:
    """Sample a teacher pool from a model, graded, in the form that --teacher-pool-dir takes."""
    _ = options.how.sampler  # bad settings are told before anything is written
    open_sampler = sampler_opener(options.model)
    if options.problems.n_problems < 1:
        raise UserError(f"--n-problems must be at least 1, got {options.problems.n_problems}")
    problems = [p for p in with_modes(options.problems) if not is_eval(p)]
    problems = list(take(problems, options.problems.n_problems, SPLIT_SEED))
    made_with = sampled_with(options)
    with ExitStack() as stack:
        grader = open_grader(options.grader.workers, stack, options.grader.sandbox)
        chat = open_chat(options.model, open_sampler)
        if options.knobs is not None:
            load_knobs(options.knobs, chat.policy)
        counts = sample_pool(options.out, made_with, chat, grader, problems, options.how)
    told = ", ".join(f"{name} {counts[name]}" for name in ("rows", "hacked", "correct"))
    print(f"{options.out}: {len(load_pool(options.out))} prompts; made now: {told}")
    return 0


def sampled_with(options: PoolSampleOptions) -> dict[str, Any]:
    """What decides the rows of a sampled pool."""
    knobs = None
    if options.knobs is not None:
        try:
            knobs = hashlib.blake2b(options.knobs.read_bytes(), digest_size=16).hexdigest()
        except OSError as error:
            raise UserError(f"--knobs {options.knobs}: cannot be read ({error.strerror})") from error
    how = {name: value for name, value in asdict(options.how).items() if name != "batch"}
    dtype = str(pick_dtype(options.model.dtype, pick_devices(options.model.device)[0]))
    made = {"model": options.model.model, "dtype": dtype, "knobs": knobs, **asdict(options.problems), **how}
    engine = options.model.sampler  # told only where it is another: older pools go on
    return made if engine == "own" else made | {"sampler": engine}


def pool_report_verb(options: PoolReportOptions) -> int:
    """Count a pool's stored labels per mode and detector, its prompts, duplicates and lengths."""
    pool = load_pool(options.pool)
    report = pool_report(pool)
    print(report_table(report))
    if options.problems is not None:
        matched = len(join(pool, load_problems(options.problems).problems).rows)
        report["problems_matched"] = matched
        print(f"\n{matched} problems of {options.problems} have a prompt in the pool")
    if options.json is not None:
        write_json(options.json, report)
    return 0


def pool_regrade_verb(options: PoolRegradeOptions) -> int:
    """Grade a teacher pool with today's grader and report where the stored labels disagree."""
    problems = with_modes(options.problems)
    teacher = join(load_pool(options.pool), problems)
    if not teacher.rows:
        raise UserError(f"{options.pool}: no overlap with the problems of {options.problems.problems}")
    by_id = {p.problem_id: teacher.posed(p) for p in problems}
    work = [(by_id[name], i, row) for name, rows in teacher.rows.items() for i, row in enumerate(rows)]
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
    baseline = options.baseline_sample
    if baseline is None:
        baseline = BenchSettings.baseline_sample if options.pool is None else 0
    settings = BenchSettings(options.workers, options.repeats, baseline, options.loops, options.loop_limit)
    if options.pool is not None and baseline:
        logger.warning("plain subprocesses will run programs of this pool without containment")
    report = bench_grader(work, settings)
    print(bench_table(report))
    if options.json is not None:
        write_json(options.json, report)
    return 0
