"""The sweep's engine for a Ray cluster: one remote task per run, in a process of its own.

A task whose process or machine dies is started again by Ray, and goes on from what the run saved; so the
sweep's folder has to be on storage that all machines see.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from loguru import logger
from ray.exceptions import RayError

from projected_grpo.errors import UserError
from projected_grpo.sweep.jobs import JobResult, Submission, run_job_file
from projected_grpo.sweep.spec import SweepLimits, take

CORES = 1


def resources(limits: SweepLimits) -> dict[str, Any]:
    """What Ray sets aside for each run. A process makes one run, so that its GPU memory is free again."""
    wanted = {"num_cpus": limits.cores or CORES, "num_gpus": limits.gpus or 0}
    return wanted | {"max_retries": limits.retries, "max_calls": 1}


def address_of(options: Mapping[str, Any]) -> str | None:
    """The cluster's address, from the spec's [ray] table; without one, Ray starts on this machine."""
    take(options, ("address",), "[ray]")
    return options.get("address")


def plan(work: Submission) -> list[str]:
    given = ", ".join(f"{k}={v}" for k, v in resources(work.limits).items())
    at_once = f", {work.limits.jobs} at a time" if work.limits.jobs else ""
    head = f"# ray {address_of(work.options) or 'on this machine'}: {given}{at_once}"
    return [head, *(job.command() for job in work.jobs)]


def start(work: Submission) -> list[JobResult]:
    """Make all runs, waiting for them; returns how each one ended."""
    address = address_of(work.options)
    try:
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, configure_logging=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"--engine ray: no cluster at {address or 'this machine'} ({error})") from error
    try:
        return made([job.file(".json").absolute() for job in work.jobs], work.limits)
    finally:
        ray.shutdown()


def made(files: Sequence[Path], limits: SweepLimits) -> list[JobResult]:
    """Keep at most `jobs` tasks going until all have ended."""
    task = ray.remote(**resources(limits))(run_job_file)
    waiting, results = list(files), []
    going: dict[ray.ObjectRef, Path] = {}
    while waiting or going:
        while waiting and (not limits.jobs or len(going) < limits.jobs):
            file = waiting.pop(0)
            going[task.remote(file)] = file
        (ready, *_), _ = ray.wait(list(going))
        file = going.pop(ready)
        try:
            result = ray.get(ready)
        except RayError as error:
            result = JobResult("failed", str(error).strip().splitlines()[-1])
        results.append(result)
        logger.info("{} ({} of {}): {} {}", file.stem, len(results), len(files), result.kind, result.why)
    return results
