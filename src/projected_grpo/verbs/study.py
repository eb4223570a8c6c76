"""The verbs of whole experiments: the nano model's recipe, and the study."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from tabulate import tabulate

from projected_grpo.errors import GATE_FAILED, UserError
from projected_grpo.options.verbs import RESULTS, PretrainNanoOptions, StudyOptions, SweepOptions
from projected_grpo.prepare.pretrain_nano import check_base, pretrain, save_model
from projected_grpo.runlog import command_line, write_atomically, write_json
from projected_grpo.study.report import filled, study_spec, write_report
from projected_grpo.sweep.jobs import jobs_of
from projected_grpo.sweep.spec import expand, given_options, only
from projected_grpo.verbs.sweep import cost_of_jobs, make_all, to_make, with_options


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


def renew_page(page: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Put the tables between a page's markers. Raises UserError if it cannot be read or they are wrong."""
    try:
        write_atomically(page, filled(page.read_text(), records).encode())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--page {page}: cannot be read ({error})") from error
    except UserError as error:
        raise UserError(f"--page {page}: {error}") from error


def study_verb(options: StudyOptions) -> int:
    """Every run of a study whose record is missing, then tables and pictures. Exit 1 if a run failed.

    The records in docs/results/nano came with the package; --out FOLDER makes your own.
    """
    if options.set and options.out == RESULTS:
        raise UserError("--set makes another study: give it an --out of its own")
    if options.out == RESULTS and not RESULTS.is_dir():  # a day of runs is not begun by mistake
        raise UserError(
            f"{RESULTS}, with the kept records, is not here: begin in the root of a clone, or make your own: "
            f"{own_study(options)}"
        )
    if options.page is not None and not options.page.is_file():
        raise UserError(f"--page {options.page}: no such file")  # before hours of runs
    spec = study_spec(options.study)
    spec = replace(spec, options={**spec.options, **given_options(options.set)}, keep=options.out)
    spec = with_options(spec, SweepOptions(jobs=options.jobs))
    runs = expand(only(spec, options.arms, options.seeds))
    place = (spec.home, spec.limits, spec.keep)
    jobs = jobs_of(runs, *place)
    work = to_make(spec, runs, [] if options.report_only else jobs)
    if work.jobs:
        logger.info(
            "{} of {} runs to make; {} keeps a record of each, and the same command goes on where it stopped",
            *(len(work.jobs), len(jobs), options.out),
        )
    if work.jobs:
        logger.info("they take {}", cost_of_jobs(work))
    failed = any(result.exit_code for result in make_all(spec.engine, work))
    if options.arms or options.seeds:  # the tables are of all that is there, whichever part was asked for
        jobs = list({job.record: job for job in (*jobs_of(expand(spec), *place), *jobs)}.values())
    records = [record for job in jobs if (record := job.kept()) is not None]
    if not records:
        raise UserError(
            f"no record of this study lies in {options.out}; a clone has the kept ones in {RESULTS}, and "
            f"without --report-only what is missing is made"
        )
    path = write_report(records, options.out)
    if options.page is not None:
        renew_page(options.page, records)
    print(path.read_text() if options.report_only else found_text(options, records, len(work.jobs), path))
    return GATE_FAILED if failed else 0


def found_text(options: StudyOptions, records: Sequence[Mapping[str, Any]], tried: int, path: Path) -> str:
    """What a study found, what it made, where its tables are, and how to make one's own."""
    did = f"{tried} runs were tried now" if tried else "no run was left to make"
    lines = [
        f"{len(records)} records of the study {options.study} lie in {options.out}; {did}",
        f"tables and pictures: {path}",
    ]
    if options.out == RESULTS and not tried:
        hours = sum(record["wall_s"] for record in records) / 3600
        lines.append(f"the records are {hours:.0f} hours of one core; your own: {own_study(options)}")
    return "\n".join(lines)


def own_study(options: StudyOptions) -> str:
    """The command that makes a part of the study anew, in a folder of its own."""
    part = ("--arms=none,erase+sampled_pairs", "--seeds=41-43")
    return command_line("study", options.study, *part, "--out=my_study")
