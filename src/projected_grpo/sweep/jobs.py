"""A sweep on disk: one job file per run, its attempts, its lock, and the one way all engines make it.

Under the sweep's home: `runs/` (what `results` reads; a folder's name ends in its id), `vhack/`, `pools/`,
`logs/`, and `jobs/ID.json` (what to run), `.jsonl` (attempts), `.txt` (output), `.lock`.
"""

import fcntl
import gc
import os
import shlex
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loguru import logger
from tabulate import tabulate

from projected_grpo import train
from projected_grpo.errors import BAD_USAGE, DIVERGED, SIGNALLED
from projected_grpo.results.files import (
    Check,
    check_fields,
    check_summary,
    is_number,
    is_whole,
    is_words,
    read_steps,
)
from projected_grpo.runlog import append_jsonl, complete_lines, read_json, write_json
from projected_grpo.sweep.keep import kept_data, read_record, write_record
from projected_grpo.sweep.spec import SweepLimits, SweepRun, take

STATES = ("finished", "running", "failed", "interrupted", "to do")
PATIENCE_S = 120.0  # a queue's next attempt waits this long for what is left of the one before it

CHECKS: Mapping[str, Check] = {  # of a job's fields in its file
    **dict.fromkeys(("id", "name", "home", "cwd"), str),
    **{"argv": is_words, "submitted": is_number},
    **dict.fromkeys(("steps", "retries", "max_failures"), is_whole),
}
OPTIONAL: Mapping[str, Check] = dict.fromkeys(("why", "resolve", "record", "data"), str)
Launch = Callable[[Sequence[str], Path, int], int | None]
"""Runs train with these arguments, output file and lock; its exit code, or None if it was told to stop."""


@dataclass(frozen=True)
class Job:
    """All that a process on any machine needs to make one run."""

    id: str
    name: str
    argv: tuple[str, ...]
    steps: int
    home: str
    cwd: str
    retries: int
    max_failures: int
    submitted: float  # seconds since the epoch; earlier failures do not count against the sweep
    why: str = ""
    resolve: str = ""
    record: str = ""  # the file that keeps its outcome, if one does
    data: str = ""  # hash of what it reads

    def file(self, suffix: str) -> Path:
        """One of the job's own files."""
        return Path(self.home) / "jobs" / f"{self.id}{suffix}"

    @property
    def label(self) -> str:
        """What a queue shows: name, id, what the run is for and what settles it."""
        parts = [f"{self.argv[0]} {self.name} [{self.id}]"]
        parts += [f"why: {self.why}"] if self.why else []
        parts += [f"resolve: {self.resolve}"] if self.resolve else []
        return " | ".join(parts)

    def folders(self) -> list[Path]:
        """Its run folders, oldest first."""
        found = (Path(self.home) / "runs").glob(f"*_{self.id}*")
        return sorted(folder for folder in found if (folder / "config.json").exists())

    def ended(self) -> Path | None:
        """The folder of its outcome; a run that diverged has one too."""
        return next((f for f in reversed(self.folders()) if (f / "summary.json").exists()), None)

    def kept(self) -> dict[str, Any] | None:
        """Its record, if there is one. Raises UserError if the file is that of another run."""
        return read_record(Path(self.record), self.id, self.argv, self.data) if self.record else None

    def done(self) -> bool:
        """Whether its outcome is there; a record that is still missing is written."""
        if self.kept() is not None:
            return True
        folder = self.ended()
        if folder is not None and self.record:
            write_record(Path(self.record), folder, self.argv, self.data)
        return folder is not None

    def next_argv(self) -> list[str]:
        """The arguments of train that go on from what was saved last, or start."""
        for folder in reversed(self.folders()):
            if any((folder / "state").rglob("*.safetensors")):
                return [self.argv[0], f"--resume={folder}"]
        place = (f"--out-dir={self.home}", f"--out-tag=_{self.id}")
        return [*self.argv, *place]

    def command(self) -> str:
        """`next_argv` as it would be typed."""
        return shlex.join(["projected-grpo", "train", *self.next_argv()])


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


def note(job: Job, **facts: Any) -> None:
    """Add a line to the job's attempts."""
    append_jsonl(job.file(".jsonl"), [{"at": time.time(), **facts}])


@dataclass(frozen=True)
class State:
    """Where a run stands."""

    job: Job
    state: str
    folder: Path | None
    steps: int
    hack: float | None
    solve: float | None
    wall_s: float | None
    note: str


@dataclass(frozen=True)
class JobResult:
    """How one call of `make` ended: done, failed, held back, elsewhere or stopped; and why."""

    kind: str
    why: str = ""

    @property
    def exit_code(self) -> int:
        """Of a process that made this one run."""
        return 0 if self.kind in ("done", "elsewhere") else 1


@dataclass(frozen=True)
class Submission:
    """What an engine is given: all runs of the sweep, the jobs of those still to make, and how."""

    runs: tuple[SweepRun, ...]
    jobs: tuple[Job, ...]
    limits: SweepLimits
    options: Mapping[str, Any]  # of this engine, from the spec

    @property
    def home(self) -> Path:
        return Path(self.jobs[0].home)


def jobs_of(runs: Sequence[SweepRun], home: Path, limits: SweepLimits, keep: Path | None = None) -> list[Job]:
    """The runs as jobs of the folder `home`, submitted now; their records go to `keep`."""
    return [
        Job(
            run.id,
            run.name,
            run.argv,
            run.cfg.optim.steps,
            str(home),
            str(Path.cwd()),
            limits.retries,
            limits.max_failures,
            time.time(),
            run.arm.why,
            run.arm.resolve,
            str(keep / f"{run.stem}.json") if keep else "",
            kept_data(run.cfg) if keep else "",
        )
        for run in runs
    ]


def write_job(job: Job) -> Path:
    """Put the job where whoever makes it will read it; returns the file."""
    path = job.file(".json")
    write_json(path, asdict(job))
    return path


def read_job(path: Path) -> Job:
    """A job from its file. Raises UserError if it is none."""
    where = f"sweep run: {path} is not a sweep's job file"
    data = read_json(path, "sweep run")
    take(data, (*CHECKS, *OPTIONAL), where)
    check_fields(data, CHECKS, OPTIONAL, where)
    return Job(**{**data, "argv": tuple(data["argv"]), "submitted": float(data["submitted"])})


def make(job: Job, launch: Launch, *, patience_s: float = 1.0) -> JobResult:
    """Make one run, going on from what is there; several processes may try, one does."""
    with locked(job.file(".lock"), patience_s) as held:
        if held is None:
            return JobResult("elsewhere", "another process is making it")
        for attempt in range(1 + job.retries):
            if job.done():
                return JobResult("done")
            failures = failures_since(Path(job.home), job.submitted)
            if job.max_failures and failures >= job.max_failures:
                return JobResult("held back", f"{failures} runs of this sweep have failed")
            argv = job.next_argv()
            note(job, command=shlex.join(argv), host=socket.gethostname(), pid=os.getpid())
            code = launch(argv, job.file(".txt"), held)
            if code is None:
                return JobResult("stopped", "told to stop")
            note(job, code=code)
            if code in (0, DIVERGED) and job.done():
                return JobResult("done")
            logger.warning("{}: attempt {} ended with code {}", job.name, attempt + 1, code)
            if code == BAD_USAGE:  # no further attempt would mend it
                break
        why = f"code {code} in attempt {attempt + 1}; its output is in {job.file('.txt')}"
        note(job, failed=why)
        return JobResult("failed", why)


def failures_since(home: Path, moment: float) -> int:
    """How many of the sweep's runs have failed for good since then."""
    last = ((complete_lines(path) or [{}])[-1] for path in (home / "jobs").glob("*.jsonl"))
    return sum("failed" in line and is_number(line.get("at")) and line["at"] >= moment for line in last)


def in_process(argv: Sequence[str], output: Path, held: int) -> int | None:
    """Train in this process, which a queue started for it alone: what kills the one kills the other."""
    try:
        code = train.main(argv)
    except SystemExit as error:
        if error.code != BAD_USAGE:  # a queue's signal handler wants this process gone
            raise
        code = BAD_USAGE
    except Exception:
        logger.exception("train {} failed", shlex.join(argv))
        code = 1
    gc.collect()  # the model of a failed attempt must not lie beside that of the next
    return None if code >= SIGNALLED else code


def run_job_file(path: Path) -> JobResult:
    """What a queue calls: make the run of a job file, from the folder it was submitted in."""
    job = read_job(path.absolute())
    with chdir(job.cwd):
        return make(job, in_process, patience_s=PATIENCE_S)


def states(jobs: Sequence[Job]) -> list[State]:
    """Where every run stands, by its files and its lock."""
    return [state_of(job) for job in jobs]


def state_of(job: Job) -> State:
    attempts = complete_lines(job.file(".jsonl"))
    tried = sum("command" in line for line in attempts)
    remark = f"attempt {tried}" if tried > 1 else ""
    ended = job.ended()
    record = job.kept()
    summary = record["summary"] if record else None
    if ended is not None and not job.record:
        summary = read_json(ended / "summary.json", "sweep")
    if summary is not None:
        check_summary(summary, f"sweep: the summary of {job.name}")
        remark = remark if summary["finished"] else "diverged"
        rates = (summary["hack_deploy"], summary["solve_deploy"], summary.get("seconds"))
        return State(job, "finished", ended, summary["steps"], *rates, remark)
    folder = next(reversed(job.folders()), None)
    rows = read_steps(folder, "sweep") if folder else []
    if is_locked(job.file(".lock")):
        state = "running"
    elif attempts and "failed" in attempts[-1]:
        state, remark = "failed", str(attempts[-1]["failed"])
    else:
        state = "interrupted" if tried else "to do"
    wall = sum(row["sec"] or 0.0 for row in rows) if rows else None
    return State(
        job, state, folder, len(rows), latest(rows, "hack_deploy"), latest(rows, "solve_deploy"), wall, remark
    )


def latest(rows: Sequence[Mapping[str, Any]], column: str) -> float | None:
    """The last value of a column that is not measured at every step."""
    return next((row[column] for row in reversed(rows) if row[column] is not None), None)


def status_table(found: Sequence[State]) -> str:
    """One line per run under a line of counts."""
    counts = Counter(s.state for s in found)
    head = f"{len(found)} runs: " + ", ".join(f"{counts[s]} {s}" for s in STATES if counts[s])
    rows = [
        [
            s.job.id,
            s.job.name,
            s.state,
            f"{s.steps}/{s.job.steps}",
            *("-" if rate is None else f"{rate:.3f}" for rate in (s.hack, s.solve)),
            "-" if s.wall_s is None else f"{s.wall_s:.0f} s",
            s.note,
        ]
        for s in found
    ]
    headers = ["id", "run", "state", "steps", "hack", "solve", "wall", ""]
    return f"{head}\n{tabulate(rows, headers=headers, tablefmt='github', disable_numparse=True)}"
