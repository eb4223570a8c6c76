"""The sweep's engine for one machine: processes side by side, each kept to cores and GPUs of its own."""

import os
from functools import partial

import torch

from projected_grpo.sweep.jobs import Job, JobResult, Submission, as_process, make
from projected_grpo.sweep.runner import Children, Slot, deal, run_pool
from projected_grpo.sweep.spec import SweepLimits


def visible_gpus() -> tuple[str, ...]:
    """GPUs that a process may be given, by the names CUDA_VISIBLE_DEVICES knows."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return tuple(part for part in named.split(",") if part not in ("", "-1"))
    return tuple(map(str, range(torch.cuda.device_count())))


def slots_of(limits: SweepLimits) -> list[Slot]:
    """The places this machine has for runs of this size."""
    gpus = visible_gpus()
    each = min(len(gpus), 1) if limits.gpus is None else limits.gpus
    return deal(limits.jobs, sorted(os.sched_getaffinity(0)), gpus, limits.cores, each)


def plan(work: Submission) -> list[str]:
    """What would run, and where."""
    slots = slots_of(work.limits)
    places = sorted(
        {f"cores {sorted(s.cores or ())}" + (f" GPUs {','.join(s.gpus)}" if s.gpus else "") for s in slots}
    )
    return [f"# {len(slots)} at a time: {'; '.join(places)}", *(job.command() for job in work.jobs)]


def start(work: Submission) -> list[JobResult]:
    """Make all runs; returns how each one ended that was tried."""
    results: list[JobResult] = []
    children = Children()

    def one(job: Job, slot: Slot) -> str:
        run = partial(children.run, slot=slot, mode="ab")
        result = make(job, partial(as_process, run, lambda: children.ended))
        results.append(result)
        return result.why if result.kind in ("failed", "held back") else ""

    run_pool(work.jobs, one, slots_of(work.limits), children, name=lambda job: job.name, desc="sweep")
    return results
