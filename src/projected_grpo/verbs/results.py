"""The verbs that read finished runs: tables, verdicts, pictures, a page."""

from loguru import logger

from projected_grpo.errors import UserError
from projected_grpo.options.verbs import RUNS, PlotOptions, ReportOptions, ResultsOptions
from projected_grpo.results.compare import check_arm, headline, modes, notes, paired, rates
from projected_grpo.results.pictures import draw
from projected_grpo.results.report import report_page
from projected_grpo.results.runs import BASELINE, Groups, finished, grouped, read_runs
from projected_grpo.results.tables import Format, Table, render, render_tables
from projected_grpo.runlog import command_line, write_atomically
from projected_grpo.study.hypotheses import verdicts


def results_verb(options: ResultsOptions) -> int:
    """Tables over seeds of every setting: rates, headline, paired differences, modes; or verdicts."""
    if options.against is not None and (options.falsify or options.table not in ("all", "paired")):
        raise UserError("--against is for paired differences: give --table paired, or no --table")
    runs = read_runs(options.runs)
    groups = grouped(runs if options.falsify else finished(runs))
    if options.against is not None:
        check_arm(groups, options.against)
    text = falsify_text(groups, options.format) if options.falsify else tables_text(groups, options)
    if options.out is None:
        print(text)
        if options.format == "markdown" and all(run.path.is_dir() for run in runs):
            places = [] if options.runs == RUNS else options.runs
            pictures = command_line("plot", "--out=pictures", *places)
            page = command_line("report", *options.runs)
            logger.info(
                "\npictures:\n  {}\na page with every completion and its grade:\n  {}", pictures, page
            )
    else:
        write_atomically(options.out, (text + "\n").encode())
        logger.info("{}", options.out)
    return 0


def tables_text(groups: Groups, options: ResultsOptions) -> str:
    against = options.against or BASELINE
    estimates = [*rates(groups), *headline(groups), *paired(groups, against), *modes(groups)]
    shown = [e for e in estimates if options.table in ("all", e.table)]
    return render(options.format, shown, notes(groups, against))


def falsify_text(groups: Groups, kind: Format) -> str:
    """The verdicts; runs that ended early count with the rates they ended with, and are named."""
    early = [run.name for seeds in groups.values() for run in seeds.values() if not run.finished]
    found = verdicts(groups)
    rows = [[v.hypothesis, v.context, v.options, v.text] for v in found]
    table = Table(
        "Verdicts by the preregistered rules", ["hypothesis", "context", "options", "verdict"], rows
    )
    told = [f"ended early, counted as they ended: {', '.join(early)}"] if early else []
    if kind == "markdown":
        lines = [
            f"{v.hypothesis} ({', '.join(filter(None, (v.context, v.options)))}): {v.text}" for v in found
        ]
        return "\n".join(f"- {line}" for line in [*lines, *told])
    return render_tables(kind, [table], told)


def plot_verb(options: PlotOptions) -> int:
    """Pictures of finished runs: dynamics, Pareto frontier, modes, cosines, routed share, held-out pairs."""
    groups = grouped(finished(read_runs(options.runs)))
    made, skipped = draw(groups, options.kind, options.out, options.arms)
    for line in skipped:
        logger.warning("{}", line)
    if not made:
        raise UserError(f"plot --kind {options.kind}: nothing to draw; {'; '.join(skipped)}")
    print("\n".join(made))
    return 0


def report_verb(options: ReportOptions) -> int:
    """One HTML page on some runs: summary, curves, differences of settings, rollouts to read and search."""
    if options.max_rollouts < 1:
        raise UserError(f"--max-rollouts must be at least 1, got {options.max_rollouts}")
    if not options.runs:
        raise UserError(f"report needs folders of runs, as in: {command_line('report', *RUNS)}")
    write_atomically(options.out, report_page(read_runs(options.runs), options.max_rollouts).encode())
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB, for a browser; it needs no network")
    return 0
