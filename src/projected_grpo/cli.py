"""`projected-grpo VERB ...`: one dispatcher. A verb's module is imported when the verb is run, not before."""

import sys

from projected_grpo.errors import UserError, answer, as_process

if __name__ == "__main__":
    sys.exit(as_process())  # before the imports below, for Ctrl-C

import ast
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import make_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Union

import tyro

from projected_grpo.options import train, verbs
from projected_grpo.options.paths import check_paths
from projected_grpo.options.typed import VALUES, as_typed, near
from projected_grpo.runlog import start_logging

VERBS: Mapping[str, tuple[type, str]] = {  # a verb's options, and `module:function` in verbs/
    "score": (verbs.ScoreOptions, "score:score_verb"),
    "extract": (verbs.ExtractOptions, "probe:extract_verb"),
    "verify": (verbs.VerifyOptions, "probe:verify_verb"),
    "problems lint": (verbs.ProblemsLintOptions, "problems:problems_lint_verb"),
    "pairs lint": (verbs.PairsLintOptions, "pairs:pairs_lint_verb"),
    "pairs from-pool": (verbs.PairsFromPoolOptions, "pairs:pairs_from_pool_verb"),
    "pool build": (verbs.PoolBuildOptions, "pools:pool_build_verb"),
    "pool sample": (verbs.PoolSampleOptions, "pools:pool_sample_verb"),
    "pool report": (verbs.PoolReportOptions, "pools:pool_report_verb"),
    "pool regrade": (verbs.PoolRegradeOptions, "pools:pool_regrade_verb"),
    "grade": (verbs.GradeOptions, "grade:grade_verb"),
    "evaluate": (verbs.EvaluateOptions, "deploy:evaluate_verb"),
    "export": (verbs.ExportOptions, "deploy:export_verb"),
    "probe gate": (verbs.GateOptions, "probe:gate_verb"),
    "probe": (verbs.ProbeOptions, "probe:probe_verb"),
    "sweep status": (verbs.WhichSweep, "sweep:sweep_status_verb"),
    "sweep run": (verbs.SweepRunOptions, "sweep:sweep_run_verb"),
    "sweep": (verbs.SweepOptions, "sweep:sweep_verb"),
    "study": (verbs.StudyOptions, "study:study_verb"),
    "pretrain-nano": (verbs.PretrainNanoOptions, "study:pretrain_nano_verb"),
    "results": (verbs.ResultsOptions, "results:results_verb"),
    "doctor": (verbs.DoctorOptions, "doctor:doctor_verb"),
    "plot": (verbs.PlotOptions, "results:plot_verb"),
    "report": (verbs.ReportOptions, "results:report_verb"),
    "bench grader": (verbs.BenchGraderOptions, "bench:bench_grader_verb"),
    "bench step": (verbs.BenchStepOptions, "bench:bench_step_verb"),
    "bench generation": (verbs.BenchOptions, "bench:bench_generation_verb"),
    "bench backward": (verbs.BenchOptions, "bench:bench_backward_verb"),
    "bench extraction": (verbs.BenchOptions, "bench:bench_extraction_verb"),
    "bench svd": (verbs.BenchOptions, "bench:bench_svd_verb"),
    "bench precision": (verbs.BenchOptions, "bench:bench_precision_verb"),
    "bench movement": (verbs.BenchOptions, "bench:bench_movement_verb"),
    "bench growth": (verbs.BenchOptions, "bench:bench_growth_verb"),
}


def about(target: str) -> str:
    """A function's docstring, read from its file: importing that could take seconds."""
    module, _, function = target.partition(":")
    tree = ast.parse((Path(__file__).parent / "verbs" / f"{module}.py").read_text())
    found = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function]
    return ast.get_docstring(found[0]) or ""


def run_verb(name: str, argv: Sequence[str], loaded: Callable[[], None]) -> int:
    options, target = VERBS[name]
    with VALUES:
        parsed: object = tyro.cli(
            options,
            prog=f"projected-grpo {name}",
            description=about(target),
            args=as_typed(argv, options, name),
            config=(tyro.conf.OmitArgPrefixes,),
        )
    start_logging(None)
    check_paths(parsed)
    verb = implementation(target)
    loaded()
    return verb(parsed)


def implementation(target: str) -> Callable[[object], int]:
    """A verb's function, which takes its options and returns the exit code."""
    module, _, function = target.partition(":")
    found: Callable[[object], int] = getattr(
        importlib.import_module(f"projected_grpo.verbs.{module}"), function
    )
    return found


def run_train(argv: Sequence[str], loaded: Callable[[], None]) -> int:
    """Train. Help and mistakes are answered before torch is imported."""
    train.checked(argv)
    module = importlib.import_module("projected_grpo.train")
    loaded()
    code: int = module.main(argv)
    return code


def usage(names: Iterable[str] = VERBS) -> str:
    """The list of these verbs; of all of them, with `train`."""
    rows = [] if names is not VERBS else [("train PRESET", "Train one arm: " + ", ".join(train.PRESETS))]
    rows += [(name, about(VERBS[name][1]).splitlines()[0]) for name in names]
    lines = "\n".join(f"  {name:<16} {text}" for name, text in rows)
    return f"usage: projected-grpo VERB [options]   (VERB --help tells more; --version)\n\n{lines}"


def print_completion(argv: Sequence[str]) -> None:
    """`--tyro-print-completion SHELL`: a script that completes verbs and options. tyro ends the process."""
    groups: dict[str, dict[str, type]] = {
        "train": {name: train.command(cfg) for name, (_, cfg) in train.PRESETS.items()}
    }
    for name, (options, _) in VERBS.items():
        first, _, second = name.partition(" ")
        groups.setdefault(first, {})[second] = options
    first_words = {
        first: own[""] if "" in own else make_dataclass(first, [("verb", _one_of(own))])
        for first, own in groups.items()
    }
    flat = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    tyro.cli(_one_of(first_words), prog="projected-grpo", args=list(argv), config=flat)


def _one_of(kinds: Mapping[str, type]) -> Any:
    named = [Annotated[options, tyro.conf.subcommand(name)] for name, options in kinds.items()]
    return Union[tuple(named)]  # noqa: UP007  # not known before


def dispatch(argv: Sequence[str], loaded: Callable[[], None]) -> int:
    """Run the verb that the first words name. Raises UserError if there is no such verb."""
    if argv and argv[0].startswith("--tyro-"):
        print_completion(argv)
    if argv and argv[0] in ("-h", "--help") and len(argv) > 1:  # `--help train` is `train --help`
        argv = [*argv[1:], "--help"]
    asked = [word for word in argv if word not in ("-h", "--help")]
    if asked[:1] == ["train"]:
        return run_train(argv[1:], loaded)
    if list(argv) == ["--version"]:
        print(version("projected_grpo"))
        return 0
    for name in VERBS:
        words = name.split()
        if list(argv[: len(words)]) == words:
            return run_verb(name, argv[len(words) :], loaded)
    group = [name for name in VERBS if name.split()[:1] == asked]
    if group or not asked:
        print(usage(group or VERBS))
        if asked != list(argv):
            return 0
        raise UserError("name a verb: " + ", ".join(group or ["train", *VERBS]))
    names = [name for name in VERBS if name.split()[0] == asked[0]] or ["train", *VERBS]
    verb = " ".join(asked[: 2 if len(names) < len(VERBS) else 1])
    raise UserError(f"unknown verb {verb}{near(verb, names)}; choose from {', '.join(names)}")


def main(argv: Sequence[str] | None = None, loaded: Callable[[], None] = lambda: None) -> int:
    """Dispatch on the verb; a user's mistake is one line on stderr and exit code 2.

    `loaded` is called between the verb's imports and its work.
    """
    return answer(lambda: dispatch(sys.argv[1:] if argv is None else argv, loaded))
