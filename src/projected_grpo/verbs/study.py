"""The verbs of whole experiments: the nano model's recipe, and the study."""

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from projected_grpo.errors import GATE_FAILED, UserError
from projected_grpo.options.verbs import PretrainNanoOptions, StudyOptions
from projected_grpo.prepare.pretrain_nano import check_base, pretrain, save_model
from projected_grpo.runlog import write_atomically, write_json
from projected_grpo.study.plan import plan, read_records, run_study
from projected_grpo.study.report import filled, write_report

TERMINATED = 143
RESULTS = Path("docs/results/nano")


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
    """Every arm x seed that is not there yet, then tables and pictures. Exit 1 if a run failed."""
    for option in ("jobs", "max_seeds", "steps", "final_n_prompts"):
        if getattr(options, option) < 0:
            raise UserError(f"--{option.replace('_', '-')} must be >= 0, got {getattr(options, option)}")
    size = (options.steps, options.final_n_prompts)
    if any(size) and options.out == RESULTS:
        raise UserError("--steps and --final-n-prompts make another study: give it an --out of its own")
    if options.page is not None and not options.page.is_file():
        raise UserError(f"--page {options.page}: no such file")  # before hours of runs
    runs = plan(options.study, options.out, options.arms, options.max_seeds, *size)
    jobs = options.jobs or len(os.sched_getaffinity(0))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # so that the runs are ended too
    failed = [] if options.report_only else run_study(runs, options.work, jobs)
    everything = plan(options.study, options.out, (), 0, *size)  # the tables are of all arms that there are
    records = read_records(everything)
    path = write_report(records, options.out)
    if options.page is not None:
        renew_page(options.page, records)
    print(path.read_text() if options.report_only else f"{path}: {sum(run.done for run in everything)} runs")
    return GATE_FAILED if failed else 0
