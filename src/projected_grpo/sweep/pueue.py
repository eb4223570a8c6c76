"""The sweep's engine for a pueue queue: one task per run, gates as tasks between them.

With gates: extract -> gate A -> verify (gate B) -> gate A2 -> none -> gate C -> the other arms -> gate D.
A task whose gate fails makes pueue fail everything behind it. Its options: https://github.com/Nukesor/pueue.
"""

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from projected_grpo.errors import UserError
from projected_grpo.state import reach
from projected_grpo.sweep.jobs import Job, JobResult, Submission
from projected_grpo.sweep.spec import SweepRun, basis_options, take

CLI = (sys.executable, "-m", "projected_grpo.cli")
ABOUT = (
    "# Tasks for pueue: runs, and with --gates the checks between them. $t1, $t2, ... are the ids of tasks,",
    "# and a task waits for those behind --after. Where a check fails, all that waits for it is not started.",
)
MISSING = (
    "pueue is not installed: install it (https://github.com/Nukesor/pueue) and start pueued, "
    "or use --engine local"
)
OVER = ("Done",)  # states of a task that will not run (again)


@dataclass(frozen=True)
class QueuedTask:
    """One task of the queue: a key that no other has, its label, a shell command, the keys it waits for."""

    key: str
    label: str
    command: str
    after: tuple[str, ...] = ()

    def argv(self, group: str, ids: Mapping[str, str]) -> list[str]:
        """The `pueue add` that queues it and prints its id."""
        words = ["pueue", "add", "--print-task-id", "--label", self.label]
        words += ["--group", group] if group else []
        words += ["--after", *(ids[key] for key in self.after)] if self.after else []
        return [*words, "--", self.command]


def train_task(job: Job, after: Sequence[str] = ()) -> QueuedTask:
    command = shlex.join([*CLI, "sweep", "run", str(job.file(".json"))])
    return QueuedTask(job.id, job.label, command, tuple(after))


def gate_task(
    gate: str, key: str, files: Sequence[str], after: Sequence[str], label: str, more: Sequence[str] = ()
) -> QueuedTask:
    """A gate over files, whose patterns the queue's shell expands when the task starts."""
    command = f"{shlex.join([*CLI, 'probe', 'gate', gate, *more])} {' '.join(files)}"
    return QueuedTask(key, f"gate {gate} {label} [{key}]", command, tuple(after))


def pattern(home: Path, tail: str) -> str:
    """A path for a shell, with `*` in its tail left open."""
    return f"{shlex.quote(str(home))}/{tail}"


def basis_files(run: SweepRun, home: Path) -> str:
    """Where the basis of a run is, for a shell."""
    basis = run.cfg.basis.v_hack_path
    return shlex.quote(str(basis)) if basis else pattern(home, "vhack/*.safetensors")


def basis_tasks(run: SweepRun, home: Path) -> list[QueuedTask]:
    options = basis_options(run.cfg)
    words = [*options, f"--out-dir={home}"]
    key = run.id
    files = [basis_files(run, home)]
    what = f"{run.cfg.model.model} {run.cfg.basis.vhack_pairs_path or 'core'} pairs"
    extract, gate, verify = f"extract {key}", f"gate-A {key}", f"verify {key}"
    return [
        QueuedTask(extract, f"extract {what} [{extract}]", shlex.join([*CLI, "extract", *words])),
        gate_task("A", gate, files, [extract], what),
        QueuedTask(
            verify, f"gate B: verify {what} [{verify}]", shlex.join([*CLI, "verify", *words]), (gate,)
        ),
    ]


def baseline_of(run: SweepRun, runs: Sequence[SweepRun]) -> SweepRun:
    """The run without an intervention that this one is read against. Raises UserError unless there is one."""
    found = [
        other
        for other in runs
        if other.cfg.arm.intervention == "none"
        and other.cfg.run.seed == run.cfg.run.seed
        and all(run.axes.get(axis) == value for axis, value in other.axes.items() if axis != "intervention")
    ]
    if len(found) != 1:
        raise UserError(
            f"gates: {run.name} needs one run with intervention=none at its seed and axes, not {len(found)}"
        )
    return found[0]


def gated_tasks(work: Submission) -> list[QueuedTask]:
    """The chain of every seed. Finished runs are not queued again, but their gates are."""
    runs, home = work.runs, work.home
    todo = {job.id: job for job in work.jobs}
    tasks: dict[str, QueuedTask] = {}
    verified: dict[tuple[str, ...], str] = {}
    for run in sorted(runs, key=lambda r: (r.cfg.run.seed, r.cfg.arm.intervention != "none")):
        baseline = baseline_of(run, runs)
        if run.id not in todo:
            continue
        options = tuple(basis_options(run.cfg))
        if options not in verified:
            basis = basis_tasks(run, home)
            tasks |= {task.key: task for task in basis}
            verified[options] = basis[-1].key
        total = reach(run.cfg.optim)
        gate_a2 = f"gate-A2 {verified[options]} {total:.4g}"
        if gate_a2 not in tasks:
            files = [basis_files(run, home)]
            tasks[gate_a2] = gate_task(
                "A2", gate_a2, files, [verified[options]], "learning rate", [f"--reach={total:.4g}"]
            )
        gate_c = f"gate-C {baseline.id}"
        baseline_files = pattern(home, f"runs/*_{baseline.id}*")
        before = [gate_a2] if run is baseline else [gate_a2, gate_c]
        if run is not baseline and gate_c not in tasks:
            tasks[gate_c] = gate_task("C", gate_c, [baseline_files], [], baseline.name)
        tasks[run.id] = train_task(todo[run.id], before)
        if run is baseline:
            tasks[gate_c] = gate_task("C", gate_c, [baseline_files], [run.id], baseline.name)
        elif run.cfg.arm.intervention != "gt_only" and run.cfg.arm.control == "none":
            files = [baseline_files, pattern(home, f"runs/*_{run.id}*")]
            tasks[f"gate-D {run.id}"] = gate_task("D", f"gate-D {run.id}", files, [run.id], run.name)
    return list(tasks.values())


def tasks_of(work: Submission) -> list[QueuedTask]:
    return gated_tasks(work) if work.options.get("gates") else [train_task(job) for job in work.jobs]


def group_of(options: Mapping[str, Any]) -> str:
    take(options, ("group", "gates"), "[pueue]")
    return str(options.get("group", ""))


def plan(work: Submission) -> list[str]:
    """A shell script that queues what would be queued (all of it, if the queue is empty)."""
    group, ids, lines = group_of(work.options), {}, list(ABOUT)
    lines += [] if shutil.which("pueue") else [f"# {MISSING}"]
    if group:
        lines.append(f"pueue group add {shlex.quote(group)}  # unless it is there")
    if work.limits.jobs:
        lines.append(shlex.join(parallel(work.limits.jobs, group)))
    for number, task in enumerate(tasks_of(work), start=1):
        ids[task.key] = f"$t{number}"
        words = [w if w in ids.values() else shlex.quote(w) for w in task.argv(group, ids)]
        lines.append(f"t{number}=$({' '.join(words)})")
    return lines


def parallel(jobs: int, group: str) -> list[str]:
    return ["pueue", "parallel", str(jobs), *(["--group", group] if group else [])]


def ask(command: Sequence[str]) -> str:
    """Run pueue; returns what it prints. Raises UserError with its last line if it refuses."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout).strip().splitlines() or ["no word"]
        raise UserError(f"{shlex.join(command[:2])} failed: {said[-1]}; does pueued run?") from error


def live_tasks(status: Mapping[str, Any]) -> dict[str, str]:
    """Ids of tasks that are queued or running, by label. A state is a word, or a table with one key."""
    found = {}
    for number, task in status.get("tasks", {}).items():
        state = task.get("status")
        word = state if isinstance(state, str) else next(iter(state or {"": None}))
        if word not in OVER and task.get("label"):
            found[task["label"]] = str(number)
    return found


def start(work: Submission) -> list[JobResult]:
    """Queue what is not in the queue yet, and return; the queue does the rest."""
    if shutil.which("pueue") is None:
        raise UserError(MISSING)
    group = group_of(work.options)
    status = json.loads(ask(["pueue", "status", "--json"]))
    if group and group not in status.get("groups", {}):
        ask(["pueue", "group", "add", group])
    if work.limits.jobs:
        ask(parallel(work.limits.jobs, group))
    live, ids, added = live_tasks(status), {}, 0
    for task in tasks_of(work):
        if task.label in live:
            ids[task.key] = live[task.label]
            continue
        ids[task.key] = ask(task.argv(group, ids)).strip()
        added += 1
    print(f"{added} tasks queued, {len(ids) - added} were in the queue already; `pueue status` shows them")
    return []
