"""The verbs of sweeps: make all runs of one, make one run (what queues call), and say how it stands."""

import importlib
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType

from projected_grpo.config import TrainConfig
from projected_grpo.engine.cost import Cost, all_of
from projected_grpo.errors import GATE_FAILED, UserError, goes_on
from projected_grpo.experiment import expected_of
from projected_grpo.options.verbs import SweepOptions, SweepRunOptions, WhichSweep
from projected_grpo.sweep.jobs import (
    Job,
    JobResult,
    Submission,
    jobs_of,
    run_job_file,
    states,
    status_table,
    write_job,
)
from projected_grpo.sweep.spec import Spec, SweepRun, expand, given_options, only, quick_spec, read_spec

EXTRAS = {"slurm": "submitit", "ray": "ray"}  # the package behind each extra of that name


def spec_of(which: WhichSweep) -> Spec:
    """The sweep that is meant. Raises UserError unless it is given in exactly one of the two ways."""
    if (which.spec is None) == (not which.preset):
        raise UserError("sweep: give a TOML file, or --preset with --grid")
    if which.spec is None:
        spec = quick_spec(which.preset, which.name, which.grid, which.set)
    elif which.grid or which.name != WhichSweep().name:
        raise UserError(f"sweep: {which.spec} says what is run; --grid and --name go with --preset")
    else:
        spec = read_spec(which.spec)
        spec = replace(spec, options={**spec.options, **given_options(which.set)})
    return replace(only(spec, which.arms, which.seeds), keep=which.keep or spec.keep)


def with_options(spec: Spec, options: SweepOptions) -> Spec:
    """The spec with what the command line says instead. Raises UserError for a negative count."""
    given = {
        name: value
        for name in ("jobs", "cores", "gpus", "retries", "max_failures")
        if (value := getattr(options, name)) is not None
    }
    limits = replace(spec.limits, **given)
    for name, value in vars(limits).items():
        if value is not None and value < 0:
            raise UserError(f"--{name.replace('_', '-')} must be >= 0, got {value}")
    engine = options.engine or spec.engine
    if options.gates and engine != "pueue":
        raise UserError(f"--gates needs --engine pueue, not {engine}; `probe` goes through them by itself")
    engines = {**spec.engines}
    if options.gates:
        engines["pueue"] = {**engines.get("pueue", {}), "gates": True}
    return replace(spec, limits=limits, engine=engine, engines=engines)


def engine_module(engine: str) -> ModuleType:
    """The module of an engine: `plan(batch)` and `start(batch)`. Raises UserError naming a missing extra."""
    try:
        return importlib.import_module(f"projected_grpo.sweep.{engine}")
    except ModuleNotFoundError as error:
        if engine in EXTRAS and (error.name or "").split(".")[0] == EXTRAS[engine]:
            raise UserError(
                f"--engine {engine} needs {EXTRAS[engine]}: pip install 'projected_grpo[{engine}]'"
            ) from error
        raise


def sweep_verb(options: SweepOptions) -> int:
    """Make every run of a sweep that is not finished, resuming what was interrupted. Exit 1 if one failed."""
    spec = with_options(spec_of(options.sweep), options)
    runs = expand(spec)
    jobs = jobs_of(runs, spec.home, spec.limits, spec.keep)
    work = to_make(spec, runs, jobs)
    if work.jobs:
        print(f"# {len(work.jobs)} of {len(jobs)} runs to make\n# {cost_of_jobs(work)}", flush=True)
    if options.dry_run and work.jobs:
        print("\n".join(["# --dry-run starts none", *engine_module(spec.engine).plan(work)]))
        return 0
    results = make_all(spec.engine, work)
    print(status_table(states(jobs)))
    held_back = sum(result.kind == "held back" for result in results)
    if held_back:
        print(f"{held_back} runs were not started: {spec.limits.max_failures} had failed (--max-failures)")
    return GATE_FAILED if any(result.exit_code for result in results) else 0


def to_make(spec: Spec, runs: Sequence[SweepRun], jobs: Sequence[Job]) -> Submission:
    """The jobs that have no outcome and that no process is making, as an engine is given them."""
    todo = tuple(s.job for s in states(jobs) if s.state not in ("finished", "running"))
    return Submission(tuple(runs), todo, spec.limits, spec.engines.get(spec.engine, {}))


def cost_of_jobs(work: Submission) -> str:
    """What the jobs will take; runs that differ in their seed alone are looked at once."""
    waiting = {job.id for job in work.jobs}
    known: dict[TrainConfig, Cost | None] = {}
    costs = []
    for run in work.runs:
        if run.id in waiting:
            alike = replace(run.cfg, run=replace(run.cfg.run, seed=0))
            if alike not in known:
                known[alike] = expected_of(alike, (work.home / "runs",))
            costs.append(known[alike])
    found = [cost for cost in costs if cost is not None]
    return all_of(found) if len(found) == len(costs) else "what they take is not known without the model"


def make_all(engine: str, work: Submission) -> list[JobResult]:
    """Make these runs; how those ended that the engine waited for."""
    if not work.jobs:
        return []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the runs are ended too
    for job in work.jobs:
        write_job(job)
    with goes_on():
        results: list[JobResult] = engine_module(engine).start(work)
    return results


def sweep_run_verb(options: SweepRunOptions) -> int:
    """Make one run of a sweep from its job file: what a queue calls. Exit 1 if it failed."""
    outcome = run_job_file(options.job)
    print(f"{options.job.stem}: {outcome.kind} {outcome.why}".rstrip())
    return outcome.exit_code


def sweep_status_verb(options: WhichSweep) -> int:
    """A line per run of a sweep: finished, running, failed, interrupted, to do; steps, rates, wall time."""
    spec = spec_of(options)
    print(status_table(states(jobs_of(expand(spec), spec.home, spec.limits, spec.keep))))
    return 0
