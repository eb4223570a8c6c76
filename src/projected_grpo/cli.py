"""`projected-grpo VERB ...`: one dispatcher, a frozen dataclass of options and a function per verb."""

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from loguru import logger
from tabulate import tabulate

from projected_grpo import train
from projected_grpo.bench import BenchSettings, bench_grader, bench_table, benchmark_work, pool_work
from projected_grpo.config import (
    EMBEDDED,
    BasisConfig,
    LossConfig,
    ModelConfig,
    ProblemConfig,
    SandboxMode,
    env_modes,
)
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
from projected_grpo.pairs import chosen_pairs
from projected_grpo.plots import heldout_histogram
from projected_grpo.pools import bake, join, load_pool
from projected_grpo.pretrain import PretrainConfig, check_base, pretrain, save_model
from projected_grpo.problems import Problem, assign_modes
from projected_grpo.results import read_summaries, table
from projected_grpo.runlog import start_logging, write_atomically, write_json
from projected_grpo.study import plan, read_records, run_study
from projected_grpo.study_report import write_report

GATE_FAILED = 1
TERMINATED = 143
RESULTS = Path("docs/results/nano")


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
    sandbox: SandboxMode = "auto"
    """strict refuses to start unless every layer of containment is in force; auto warns what is missing."""


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
    sandbox: SandboxMode = "auto"
    """strict refuses to start unless every layer of containment is in force; auto warns what is missing."""


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
    workers: int = 0
    """Grader processes; 0 is one per core."""
    sandbox: SandboxMode = "auto"
    """strict refuses to start unless every layer of containment is in force; auto warns what is missing."""


@dataclass(frozen=True)
class PretrainNanoOptions:
    """The recipe of the packaged nano model."""

    out: Path
    """Folder to write the model to; `train nano --model FOLDER` then uses it."""
    recipe: PretrainConfig = field(default_factory=PretrainConfig)
    check_prompts: int = 432
    """Held-out problems, 8 samples each, to check the model against the gates with; 0 skips the check."""
    threads: int = 1
    """CPU threads of torch; the packaged model was made with one."""


@dataclass(frozen=True)
class StudyOptions:
    """Which arms and seeds, and where."""

    study: tyro.conf.Positional[Literal["nano"]]
    arms: tuple[str, ...] = ()
    """Only these arms (default: all)."""
    max_seeds: int = 0
    """At most this many seeds of each arm; 0 is as many as the study asks for."""
    jobs: int = 0
    """Runs at a time; 0 is one per core."""
    out: Path = RESULTS
    """Folder of the kept records, the tables and the pictures."""
    work: Path = Path("out/study")
    """Folder of the runs themselves."""
    steps: int = 0
    """Steps of every run; 0 is the preset's. For trying the command out."""
    final_n_prompts: int = 0
    """Held-out prompts of the last evaluation; 0 is the preset's."""
    report_only: bool = False
    """Make no run; write the tables and pictures of what is there."""


@dataclass(frozen=True)
class ResultsOptions:
    """Runs, or folders of runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = (Path("out/runs"),)


def extract_verb(options: ExtractOptions) -> int:
    """Extract the hack basis (or check the one that is there) and say what is in it."""
    pairs = chosen_pairs(options.basis.vhack_pairs_path, options.basis.vhack_pairs_modes)
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
    pairs = chosen_pairs(options.basis.vhack_pairs_path, options.basis.vhack_pairs_modes)
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
        counts = bake(problems, open_grader(options.workers, stack, options.sandbox), options.out)
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
        grader = open_grader(options.workers, stack, options.sandbox)
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
        rows = grade_file(items, open_grader(options.workers, stack, options.sandbox), options.out)
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


def pretrain_nano_verb(options: PretrainNanoOptions) -> int:
    """Train the nano model from scratch and check it. Exit 1 if a gate does not hold."""
    if options.out.exists() and any(options.out.iterdir()):
        raise UserError(f"--out {options.out}: not empty")
    torch.set_num_threads(options.threads)
    save_model(*pretrain(options.recipe), options.out)
    if options.check_prompts == 0:
        return 0
    report = check_base(str(options.out), options.check_prompts, options.out)
    write_json(options.out / "base.json", report)
    rows = [
        [kind, *(f"{rates[k]:.3f}" for k in ("format", "solve", "hack", "tampered")), rates["n"]]
        for group in ("by_mode", "by_level", "by_split")
        for kind, rates in report[group].items()
    ]
    rows.append(["all", *(f"{report[k]:.3f}" for k in ("format", "solve", "hack", "tampered")), report["n"]])
    print(tabulate(rows, headers=["", "format", "solve", "hack", "tampered", "n"], disable_numparse=True))
    bounds = ", ".join(f"{name} {low}-{high}" for name, (low, high) in report["gates"].items())
    print(f"{'PASS' if report['passed'] else 'FAIL'}: gates {bounds} (hack in each mode)")
    return 0 if report["passed"] else GATE_FAILED


def study_verb(options: StudyOptions) -> int:
    """Every arm x seed that is not there yet, then tables and pictures. Exit 1 if a run failed."""
    for option in ("jobs", "max_seeds", "steps", "final_n_prompts"):
        if getattr(options, option) < 0:
            raise UserError(f"--{option.replace('_', '-')} must be >= 0, got {getattr(options, option)}")
    size = (options.steps, options.final_n_prompts)
    if any(size) and options.out == RESULTS:
        raise UserError("--steps and --final-n-prompts make another study: give it an --out of its own")
    runs = plan(options.study, options.out, options.arms, options.max_seeds, *size)
    jobs = options.jobs or len(os.sched_getaffinity(0))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # so that the runs are ended too
    failed = [] if options.report_only else run_study(runs, options.work, jobs)
    everything = plan(options.study, options.out, (), 0, *size)  # the tables are of all arms that there are
    path = write_report(read_records(everything), options.out)
    print(path.read_text() if options.report_only else f"{path}: {sum(run.done for run in everything)} runs")
    return GATE_FAILED if failed else 0


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
    "study": (StudyOptions, study_verb),
    "pretrain-nano": (PretrainNanoOptions, pretrain_nano_verb),
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
