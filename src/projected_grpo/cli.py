"""`projected-grpo VERB ...`: one dispatcher; each verb is a frozen dataclass of options and a function."""

import gc
import sys
from collections.abc import Callable, Mapping, Sequence

import tyro

from projected_grpo import train
from projected_grpo.errors import LOST, MISTAKES, RankLost
from projected_grpo.runlog import start_logging
from projected_grpo.verbs.basis import ExtractOptions, extract_verb, verify_verb
from projected_grpo.verbs.bench import (
    BenchGraderOptions,
    BenchOptions,
    BenchStepOptions,
    bench_backward_verb,
    bench_extraction_verb,
    bench_generation_verb,
    bench_grader_verb,
    bench_growth_verb,
    bench_step_verb,
    bench_svd_verb,
)
from projected_grpo.verbs.deploy import EvaluateOptions, ExportOptions, evaluate_verb, export_verb
from projected_grpo.verbs.doctor import DoctorOptions, doctor_verb
from projected_grpo.verbs.grade import GradeOptions, grade_verb
from projected_grpo.verbs.pairs import (
    PairsFromPoolOptions,
    PairsLintOptions,
    pairs_from_pool_verb,
    pairs_lint_verb,
)
from projected_grpo.verbs.pools import (
    PoolBuildOptions,
    PoolRegradeOptions,
    PoolReportOptions,
    PoolSampleOptions,
    pool_build_verb,
    pool_regrade_verb,
    pool_report_verb,
    pool_sample_verb,
)
from projected_grpo.verbs.probe import GateOptions, ProbeOptions, gate_verb, probe_verb
from projected_grpo.verbs.results import (
    PlotOptions,
    ReportOptions,
    ResultsOptions,
    plot_verb,
    report_verb,
    results_verb,
)
from projected_grpo.verbs.study import PretrainNanoOptions, StudyOptions, pretrain_nano_verb, study_verb
from projected_grpo.verbs.sweep import (
    SweepOptions,
    SweepRunOptions,
    SweepStatusOptions,
    sweep_run_verb,
    sweep_status_verb,
    sweep_verb,
)


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
    "pairs lint": (PairsLintOptions, pairs_lint_verb),
    "pairs from-pool": (PairsFromPoolOptions, pairs_from_pool_verb),
    "pool build": (PoolBuildOptions, pool_build_verb),
    "pool sample": (PoolSampleOptions, pool_sample_verb),
    "pool report": (PoolReportOptions, pool_report_verb),
    "pool regrade": (PoolRegradeOptions, pool_regrade_verb),
    "grade": (GradeOptions, grade_verb),
    "evaluate": (EvaluateOptions, evaluate_verb),
    "export": (ExportOptions, export_verb),
    "probe gate": (GateOptions, gate_verb),
    "probe": (ProbeOptions, probe_verb),
    "sweep status": (SweepStatusOptions, sweep_status_verb),
    "sweep run": (SweepRunOptions, sweep_run_verb),
    "sweep": (SweepOptions, sweep_verb),
    "study": (StudyOptions, study_verb),
    "pretrain-nano": (PretrainNanoOptions, pretrain_nano_verb),
    "results": (ResultsOptions, results_verb),
    "doctor": (DoctorOptions, doctor_verb),
    "plot": (PlotOptions, plot_verb),
    "report": (ReportOptions, report_verb),
    "bench grader": (BenchGraderOptions, bench_grader_verb),
    "bench step": (BenchStepOptions, bench_step_verb),
    "bench generation": (BenchOptions, bench_generation_verb),
    "bench backward": (BenchOptions, bench_backward_verb),
    "bench extraction": (BenchOptions, bench_extraction_verb),
    "bench svd": (BenchOptions, bench_svd_verb),
    "bench growth": (BenchOptions, bench_growth_verb),
}


def usage() -> str:
    """The list of verbs."""
    rows = [("train PRESET", "Train one arm: " + ", ".join(train.PRESETS))]
    rows += [(name, (function.__doc__ or "").splitlines()[0]) for name, (_, function) in VERBS.items()]
    lines = "\n".join(f"  {name:<16} {text}" for name, text in rows)
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
            except RankLost as error:
                print(f"error: {error}", file=sys.stderr)
                return LOST
    verb = arguments[0] if arguments else "(none)"
    print(f"error: unknown verb {verb}; choose from train, {', '.join(VERBS)}", file=sys.stderr)
    return 2


def console() -> int:
    """`projected-grpo VERB ...` as a process of its own."""
    gc.freeze()  # what is imported by now stays: collections, and the end of the process, need not walk it
    return main()


if __name__ == "__main__":
    sys.exit(console())
