"""`projected-grpo VERB ...`: one dispatcher, a frozen dataclass of options and a function per verb."""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import tyro
from loguru import logger

from projected_grpo import train
from projected_grpo.bench import bench_grader, bench_table, benchmark_work
from projected_grpo.config import EMBEDDED, BasisConfig, LossConfig, ModelConfig, ProblemConfig, env_modes
from projected_grpo.errors import MISTAKES, UserError
from projected_grpo.experiment import open_chat, open_grader, read_problems
from projected_grpo.extract_vhack_grad import (
    HARD_GATE,
    SOFT_GATE,
    heldout_json,
    obtain,
    pair_grads,
    select,
    verify_vhack_heldout,
)
from projected_grpo.grading import (
    Comparison,
    as_line,
    disagreement_tables,
    grade_file,
    mode_table,
    read_completions,
)
from projected_grpo.pairs import load_pairs
from projected_grpo.plots import heldout_histogram
from projected_grpo.pools import bake, join, load_pool
from projected_grpo.problems import Problem, assign_modes
from projected_grpo.results import read_summaries, table
from projected_grpo.runlog import start_logging, write_atomically, write_json

GATE_FAILED = 1


@dataclass(frozen=True)
class ExtractOptions:
    """The basis of one model and pair set; `train` finds it under the same options."""

    model: ModelConfig = field(default_factory=ModelConfig)
    basis: BasisConfig = field(default_factory=BasisConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    out_dir: Path = Path("out")


@dataclass(frozen=True)
class PoolBuildOptions:
    """Canonical solutions and template hacks of every problem, graded."""

    out: Path
    """Folder to write the pool to."""
    problems: ProblemConfig = field(default_factory=lambda: ProblemConfig(problems=EMBEDDED))
    workers: int = 0
    """Grader processes; 0 is one per core."""


@dataclass(frozen=True)
class PoolRegradeOptions:
    """A pool against today's grader."""

    pool: tyro.conf.Positional[Path]
    """Teacher pool folder."""
    out: Path | None = None
    """JSONL of every completion's stored and new labels."""
    problems: ProblemConfig = field(default_factory=ProblemConfig)
    workers: int = 0
    """Grader processes; 0 is one per core."""


@dataclass(frozen=True)
class BenchGraderOptions:
    """Canonical solutions, each with a test function, so that oracle and detectors all run."""

    problems: ProblemConfig = field(default_factory=lambda: ProblemConfig(problems=EMBEDDED))
    limit: int = 0
    """Take only this many problems; 0 is all."""
    workers: int = 0
    """Grader processes of the parallel measurement; 0 is one per core."""
    baseline_sample: int = 20
    """How many responses plain subprocesses grade, one program at a time."""
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
    workers: int = 0
    """Grader processes; 0 is one per core."""


@dataclass(frozen=True)
class ResultsOptions:
    """Runs, or folders of runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = (Path("out/runs"),)


def extract_verb(options: ExtractOptions) -> int:
    """Extract the hack basis (or check the one that is there) and say what is in it."""
    pairs = load_pairs(options.basis.vhack_pairs_path)
    chat = open_chat(options.model)
    extraction, path = obtain(
        chat.policy,
        chat.tokenizer,
        chat.stop_id,
        pairs,
        options.basis,
        options.loss,
        options.model.model,
        options.out_dir,
    )
    basis = select(extraction, options.basis.v_hack_k, options.basis.v_hack_drop_bottom_frac)
    axes = sum(len(V) for V in basis.V.values())
    dead = sum(not bool(D.any()) for D in extraction.grads.differences().values())
    print(
        f"{path}: {len(extraction.V)} modules, {dead} with zero norm (must be 0); "
        f"in use: {axes} axes of {len(basis.V)} modules"
    )
    return 0


def verify_verb(options: ExtractOptions) -> int:
    """Do held-out pairs lie hack-ward of the basis? Exit 1 unless over half of the cosines are above 0."""
    pairs = load_pairs(options.basis.vhack_pairs_path)
    chat = open_chat(options.model)
    loss, model = options.loss, options.model.model
    extraction, path = obtain(
        chat.policy, chat.tokenizer, chat.stop_id, pairs, options.basis, loss, model, options.out_dir
    )
    basis = select(extraction, options.basis.v_hack_k, options.basis.v_hack_drop_bottom_frac)
    held_out = pairs.split()[1]
    length_norm = options.basis.v_hack_length_norm
    grads = pair_grads(chat.policy, chat.tokenizer, held_out, loss, chat.stop_id, length_norm=length_norm)
    result = verify_vhack_heldout(basis, grads)
    write_json(path.with_suffix(".heldout.json"), heldout_json(result))
    picture = path.with_suffix(".heldout.png")
    heldout_histogram(result, f"{pairs.name} pairs, {model}", picture)
    print(
        f"{'PASS' if result.passed else 'FAIL'}: {result.fraction_positive:.3f} of {len(result.cosines)} "
        f"held-out cosines above 0 (must exceed {HARD_GATE:.2f}), mean {result.mean:+.3f}; "
        f"histogram in {picture}"
    )
    if result.mean < SOFT_GATE:
        logger.warning("mean held-out cosine is under {}: the basis generalises weakly", SOFT_GATE)
    return 0 if result.passed else GATE_FAILED


def with_modes(cfg: ProblemConfig) -> tuple[Problem, ...]:
    """The file's problems with their modes."""
    return assign_modes(read_problems(cfg), env_modes(cfg.env_mode), {})


def pool_build_verb(options: PoolBuildOptions) -> int:
    """Bake and grade a teacher pool."""
    if options.out.exists() and any(options.out.iterdir()):
        raise UserError(f"--out {options.out}: not empty; old prompts would stay in the pool")
    problems = with_modes(options.problems)[: options.problems.n_problems]
    with ExitStack() as stack:
        counts = bake(problems, open_grader(options.workers, stack), options.out)
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
        grader = open_grader(options.workers, stack)
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
        rows = grade_file(items, open_grader(options.workers, stack), options.out)
    print(mode_table(rows))
    return 0


def bench_grader_verb(options: BenchGraderOptions) -> int:
    """Responses per second of the grader, its latencies, and plain subprocesses on the same work."""
    work = benchmark_work(read_problems(options.problems), options.limit)
    report = bench_grader(work, options.workers or None, options.baseline_sample)
    print(bench_table(report))
    if options.json is not None:
        write_json(options.json, report)
    return 0


def results_verb(options: ResultsOptions) -> int:
    """Mean ± SEM over the seeds of every setting."""
    print(table(read_summaries(options.runs)))
    return 0


def run_verb(name: str, options: type, function: Callable[..., int], argv: Sequence[str]) -> int:
    """Parse a verb's options and run it."""
    parsed: object = tyro.cli(
        options,
        prog=f"projected-grpo {name}",
        description=function.__doc__,
        args=list(argv),
        config=(tyro.conf.OmitArgPrefixes,),
    )
    start_logging(None)
    return function(parsed)


VERBS: Mapping[str, tuple[type, Callable[..., int]]] = {
    "extract": (ExtractOptions, extract_verb),
    "verify": (ExtractOptions, verify_verb),
    "pool build": (PoolBuildOptions, pool_build_verb),
    "pool regrade": (PoolRegradeOptions, pool_regrade_verb),
    "grade": (GradeOptions, grade_verb),
    "results": (ResultsOptions, results_verb),
    "bench grader": (BenchGraderOptions, bench_grader_verb),
}


def usage() -> str:
    """The list of verbs."""
    rows = [("train PRESET", "Train one arm: " + ", ".join(train.PRESETS))]
    rows += [(name, (function.__doc__ or "").splitlines()[0]) for name, (_, function) in VERBS.items()]
    lines = "\n".join(f"  {name:<14} {text}" for name, text in rows)
    return f"usage: projected-grpo VERB [options]   (VERB --help tells more)\n\n{lines}"


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatch on the verb; a user's mistake is one line on stderr and exit code 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["train"]:
        return train.main(arguments[1:])
    if arguments in (["-h"], ["--help"]):
        print(usage())
        return 0
    for name, (options, function) in VERBS.items():
        words = name.split()
        if arguments[: len(words)] == words:
            try:
                return run_verb(name, options, function, arguments[len(words) :])
            except MISTAKES as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
    verb = arguments[0] if arguments else "(none)"
    print(f"error: unknown verb {verb}; choose from train, {', '.join(VERBS)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
