"""Processes on one machine: slots to run in, a pool over them, locks that outlive their taker."""

import fcntl
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

from loguru import logger
from tqdm import tqdm

from projected_grpo.errors import UserError

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

    def run(
        self, command: Sequence[str], output: Path, held: int, slot: Slot | None = None, mode: str = "wb"
    ) -> int:
        """Run to the end; returns the exit code.

        The process inherits the lock `held`: if its parent is killed outright, the lock stays until it ends.
        """
        slot = slot or Slot()
        with open(output, mode) as file:
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


@contextmanager
def locked(path: Path, patience_s: float = 0.0) -> Iterator[int | None]:
    """Hold a file's lock; yields its descriptor, or None if another process still has it after that time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        deadline = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() >= deadline:
                    yield None
                    return
                time.sleep(0.05)
        yield file.fileno()


def is_locked(path: Path) -> bool:
    """Whether a process holds the file's lock."""
    if not path.exists():
        return False
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def run_pool(
    todo: Sequence[Item],
    make: Callable[[Item, Slot], str],
    slots: Sequence[Slot],
    children: Children,
    *,
    name: Callable[[Item], str],
    desc: str,
    done: int = 0,
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
    with (
        ThreadPoolExecutor(len(slots)) as pool,
        tqdm(total=done + len(todo), initial=done, desc=desc, disable=None) as bar,
    ):
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
            raise
    return failed
