"""The sweep's engine for Slurm, through submitit: one array job, an element per run, so many at a time.

A job that Slurm preempts or whose time is up is queued again by submitit, and goes on from its last save.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError

from projected_grpo.errors import UserError
from projected_grpo.sweep.jobs import JobResult, Submission, run_job_file
from projected_grpo.sweep.spec import one_of

CLUSTERS = (
    "slurm",
    "local",
    "debug",
)  # submitit's own names; local and debug try the same path without Slurm
MINUTES = 24 * 60
TIMEOUTS = 100  # how often a run whose time was up is queued again
NOT_SLURM = ("cluster", "timeout_min", "max_num_timeout")  # keys of [slurm] that are not slurm_* parameters


@dataclass(frozen=True)
class MakeRun:
    """What an element of the array does; submitit calls `checkpoint` when it has to give way."""

    file: Path

    def __call__(self) -> str:
        """Make the run. Raises RuntimeError if it failed, so that Slurm counts the job as failed."""
        result = run_job_file(self.file)
        if result.exit_code:
            raise RuntimeError(f"{result.kind}: {result.why}")
        return result.kind

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        return submitit.helpers.DelayedSubmission(self)


def parameters(work: Submission) -> dict[str, Any]:
    """submitit's parameters: the sweep's limits, and the spec's [slurm] table as slurm_*."""
    limits, options = work.limits, work.options
    found: dict[str, Any] = {
        "name": work.home.name,
        "timeout_min": options.get("timeout_min", MINUTES),
        "slurm_array_parallelism": limits.jobs or len(work.jobs),
    }
    found |= {"cpus_per_task": limits.cores} if limits.cores else {}
    found |= {"gpus_per_node": limits.gpus} if limits.gpus else {}
    own = {key: value for key, value in options.items() if key not in NOT_SLURM}
    return found | {f"slurm_{key}": value for key, value in own.items()}


def cluster_of(options: Mapping[str, Any]) -> str:
    return one_of(options.get("cluster", "slurm"), CLUSTERS, "[slurm] cluster")


def plan(work: Submission) -> list[str]:
    given = ", ".join(f"{k}={v}" for k, v in parameters(work).items())
    head = f"# {cluster_of(work.options)} array of {len(work.jobs)}: {given}"
    return [head, *(job.command() for job in work.jobs)]


def start(work: Submission) -> list[JobResult]:
    """Submit the array and return; `sweep status` tells how it goes."""
    cluster = cluster_of(work.options)
    folder = work.home.absolute() / "slurm"
    timeouts = work.options.get("max_num_timeout", TIMEOUTS)
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster, slurm_max_num_timeout=timeouts)
        executor.update_parameters(**parameters(work))
        with executor.batch():
            made = [executor.submit(MakeRun(job.file(".json").absolute())) for job in work.jobs]
    except (NameError, TypeError, RuntimeError, FailedJobError) as error:
        raise UserError(f"--engine slurm: {str(error).strip().splitlines()[-1]}") from error
    print(f"{len(made)} jobs submitted, the first as {made[0].job_id}; their output is in {folder}")
    if cluster == "slurm":
        return []
    return [outcome_of(job) for job in made]  # submitit's stand-ins live no longer than this process


def outcome_of(job: submitit.Job[str]) -> JobResult:
    error = job.exception()
    return JobResult("failed", str(error)) if error else JobResult(str(job.result()))
