"""The sweep's engine for one machine: processes side by side, each kept to cores and GPUs of its own."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

import torch
from loguru import logger
from tqdm import tqdm

from projected_grpo.errors import UserError
from projected_grpo.sweep.jobs import Job, JobResult, Submission, make
from projected_grpo.sweep.spec import SweepLimits

Item = TypeVar("Item")

# A signal that another thread takes, or that comes just before a wait begins, does not end that wait: Python
# acts on it when the main thread runs again.
LONGEST_WAIT_S = 0.5


@dataclass(frozen=True)
class Slot:
    """What a process in this place of the pool may use; None is whatever there is."""

    cores: frozenset[int] | None = None
    gpus: tuple[str, ...] | None = None

    def environment(self) -> dict[str, str] | None:
        """The variables of a process in this slot."""
        return None if self.gpus is None else os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)}


def deal(
    jobs: int, cores: Sequence[int], gpus: Sequence[str] = (), cores_each: int = 0, gpus_each: int = 0
) -> list[Slot]:
    """Slots of consecutive cores and GPUs, going round where there are fewer than asked for.

    0 jobs is as many as the GPUs, or else the cores, are enough for; 0 cores each is an equal share.
    Raises UserError if a single run asks for more than there is.
    """
    for what, each, there in (("cores", cores_each, cores), ("gpus", gpus_each, gpus)):
        if each > len(there):
            raise UserError(f"--{what} {each}: this machine has {len(there)}")
    fit = len(gpus) // gpus_each if gpus_each else len(cores) // max(cores_each, 1)
    jobs = jobs or max(fit, 1)
    share = cores_each or max(len(cores) // jobs, 1)

    def taken(things: Sequence[str], each: int, slot: int) -> tuple[str, ...]:
        return tuple(things[(slot * each + i) % len(things)] for i in range(each))

    names = [str(core) for core in sorted(cores)]
    return [
        Slot(frozenset(map(int, taken(names, share, i))), taken(gpus, gpus_each, i) if gpus_each else None)
        for i in range(jobs)
    ]


class Children:
    """The running processes, so that whoever is interrupted leaves none behind."""

    def __init__(self) -> None:
        self.running: set[subprocess.Popen[bytes]] = set()
        self.lock = threading.Lock()
        self.ended = False

    def run(self, command: Sequence[str], output: Path, held: int, slot: Slot) -> int:
        """Run to the end, adding to the output; returns the exit code.

        The process inherits the lock `held`: if its parent is killed outright, the lock stays until it ends.
        """
        with open(output, "ab") as file:
            with self.lock:
                if self.ended:
                    return 1
                with pinned(slot.cores):
                    process = subprocess.Popen(
                        command,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        pass_fds=(held,),
                        env=slot.environment(),
                    )
                self.running.add(process)
            try:
                return process.wait()
            finally:
                with self.lock:
                    self.running.discard(process)

    def end(self) -> None:
        """Terminate what runs and start nothing more."""
        with self.lock:
            self.ended = True
            for process in self.running:
                process.terminate()


@contextmanager
def pinned(cores: frozenset[int] | None) -> Iterator[None]:
    """Keep the calling thread, and so the processes it starts, to these cores."""
    if cores is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def run_pool(
    todo: Sequence[Item],
    make: Callable[[Item, Slot], str],
    slots: Sequence[Slot],
    children: Children,
    *,
    name: Callable[[Item], str],
    desc: str,
) -> list[Item]:
    """Make every item, one at a time in each slot; returns those that failed.

    `make` returns why it failed, or nothing. When this is interrupted, the running processes are ended.
    """
    free: SimpleQueue[Slot] = SimpleQueue()
    for slot in slots:
        free.put(slot)

    def in_a_slot(item: Item) -> str:
        slot = free.get()
        try:
            return make(item, slot)
        finally:
            free.put(slot)

    failed = []
    with ThreadPoolExecutor(len(slots)) as pool, tqdm(total=len(todo), desc=desc, disable=None) as bar:
        try:  # from the first start on: an interruption must find what runs by then
            futures = {pool.submit(in_a_slot, item): item for item in todo}
            while futures:
                for future in wait(futures, LONGEST_WAIT_S, FIRST_COMPLETED).done:
                    item = futures.pop(future)
                    try:
                        why = future.result()
                    except (OSError, UserError) as error:
                        why = str(error)
                    if why:
                        failed.append(item)
                        logger.error("{} failed; {}", name(item), why)
                    bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            children.end()
            logger.warning("stopping: runs end after their step, and are saved")
            raise
    return failed


def visible_gpus() -> tuple[str, ...]:
    """GPUs that a process may be given, by the names CUDA_VISIBLE_DEVICES knows."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return tuple(part for part in named.split(",") if part not in ("", "-1"))
    return tuple(map(str, range(torch.cuda.device_count())))


def slots_of(limits: SweepLimits) -> list[Slot]:
    gpus = visible_gpus()
    each = min(len(gpus), 1) if limits.gpus is None else limits.gpus
    return deal(limits.jobs, sorted(os.sched_getaffinity(0)), gpus, limits.cores, each)


def plan(work: Submission) -> list[str]:
    """The commands, and where they would run; of a sweep for a larger machine, why not on this one."""
    commands = [job.command() for job in work.jobs]
    try:
        slots = slots_of(work.limits)
    except UserError as error:
        return [f"# not on this machine: {error}", *commands]
    places = sorted(
        {f"cores {sorted(s.cores or ())}" + (f" GPUs {','.join(s.gpus)}" if s.gpus else "") for s in slots}
    )
    return [f"# {len(slots)} at a time: {'; '.join(places)}", *commands]


def start(work: Submission) -> list[JobResult]:
    """Make all runs; returns how each one ended that was tried."""
    results: list[JobResult] = []
    children = Children()

    def one(job: Job, slot: Slot) -> str:
        def launch(argv: Sequence[str], output: Path, held: int) -> int | None:
            code = children.run([sys.executable, "-m", "projected_grpo.train", *argv], output, held, slot)
            return None if children.ended else code

        result = make(job, launch)
        results.append(result)
        return result.why if result.kind in ("failed", "held back") else ""

    run_pool(work.jobs, one, slots_of(work.limits), children, name=lambda job: job.name, desc="sweep")
    return results
