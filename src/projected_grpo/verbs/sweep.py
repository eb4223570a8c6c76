"""The verbs of sweeps: make all runs of one, make one run (what queues call), and say how it stands."""

import importlib
import signal
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Literal

import tyro

from projected_grpo.errors import GATE_FAILED, UserError
from projected_grpo.sweep.jobs import Batch, Job, jobs_of, run_job_file, states, status_table, write_job
from projected_grpo.sweep.spec import Spec, expand, given_options, quick_spec, read_spec, seed_range

Engine = Literal["local", "pueue", "slurm", "ray"]
EXTRAS = {"slurm": "submitit", "ray": "ray"}  # the package behind each extra of that name


@dataclass(frozen=True)
class WhichSweep:
    """A TOML file (docs/sweeps.md), or --preset with --grid; either with --seeds and --set."""

    spec: tyro.conf.Positional[Path | None] = None
    """The sweep's TOML file."""
    seeds: str = ""
    """In place of the file's: `41-45`, `41,43` or `41 43`."""
    preset: str = ""
    """Without a file: smoke, nano, fast or full."""
    grid: tuple[str, ...] = ()
    """Without a file: axes, e.g. `intervention=none,erase v-hack-k=1,5`."""
    set: tuple[str, ...] = ()
    """Options of every run, e.g. `steps=20`; over a file's [options], under its arms' and axes' own."""
    name: str = "quick"
    """Without a file: the sweep lives in out/sweeps/NAME. Sweeps may share it; each run has its own id."""


@dataclass(frozen=True)
class SweepOptions:
    """Which runs, on what, how many at a time. What is not given is the file's."""

    sweep: WhichSweep = field(default_factory=WhichSweep)
    engine: Engine | None = None
    """Processes here, tasks of pueue, an array job of Slurm (extra `slurm`), tasks of Ray (extra `ray`)."""
    jobs: int | None = None
    """Runs at a time; 0 is as many as this machine has GPUs, or else cores, for (local), or no limit."""
    cores: int | None = None
    """CPU cores of each run; 0 is an equal share (local), or the queue's default."""
    gpus: int | None = None
    """GPUs of each run; by default one where this machine has any (local), else none."""
    retries: int | None = None
    """How often a run that failed is tried again, going on from what it saved."""
    max_failures: int | None = None
    """After so many runs have failed for good, no other is started; 0 is no limit."""
    gates: bool = False
    """pueue: extract, verify, vanilla, then the other arms of a seed, with the probe's gates between."""
    dry_run: bool = False
    """Print what would run, and run nothing."""


@dataclass(frozen=True)
class SweepStatusOptions:
    """Which sweep."""

    sweep: WhichSweep = field(default_factory=WhichSweep)


@dataclass(frozen=True)
class SweepRunOptions:
    """One run of a sweep."""

    job: tyro.conf.Positional[Path]
    """Its job file, HOME/jobs/ID.json."""


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
    return replace(spec, grid={**spec.grid, "seed": seed_range(which.seeds)}) if which.seeds else spec


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


def all_jobs(spec: Spec) -> list[Job]:
    """The sweep's runs as jobs."""
    return jobs_of(expand(spec), spec.home, spec.limits)


def sweep_verb(options: SweepOptions) -> int:
    """Make every run of a sweep that is not finished, resuming what was interrupted. Exit 1 if one failed."""
    spec = with_options(spec_of(options.sweep), options)
    engine, runs = engine_module(spec.engine), expand(spec)
    jobs = jobs_of(runs, spec.home, spec.limits)
    found = states(jobs)
    todo = tuple(s.job for s in found if s.state not in ("finished", "running"))
    if not todo:
        print(status_table(found))
        return 0
    batch = Batch(tuple(runs), todo, spec.limits, spec.engines.get(spec.engine, {}))
    if options.dry_run:
        print("\n".join([f"# {len(todo)} of {len(jobs)} runs to make", *engine.plan(batch)]))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the runs are ended too
    for job in todo:
        write_job(job)
    outcomes = engine.start(batch)
    print(status_table(states(jobs)))
    held_back = sum(outcome.kind == "held back" for outcome in outcomes)
    if held_back:
        print(f"{held_back} runs were not started: {spec.limits.max_failures} had failed (--max-failures)")
    return GATE_FAILED if any(outcome.exit_code for outcome in outcomes) else 0


def sweep_run_verb(options: SweepRunOptions) -> int:
    """Make one run of a sweep from its job file: what a queue calls. Exit 1 if it failed."""
    outcome = run_job_file(options.job)
    print(f"{options.job.stem}: {outcome.kind} {outcome.why}".rstrip())
    return outcome.exit_code


def sweep_status_verb(options: SweepStatusOptions) -> int:
    """A line per run of a sweep: finished, running, failed, interrupted, to do; steps, rates, wall time."""
    print(status_table(states(all_jobs(spec_of(options.sweep)))))
    return 0
