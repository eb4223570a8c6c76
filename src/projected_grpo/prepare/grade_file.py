"""Grading files of completions: in input order, resumable, with a summary per mode."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, astuple, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from loguru import logger
from tabulate import tabulate
from tqdm import tqdm

from projected_grpo.errors import UserError, goes_on
from projected_grpo.problems import Problem, id_text, read_jsonl
from projected_grpo.rewards import MODES, Grader, Task
from projected_grpo.runlog import JsonlLog, complete_lines, lock_file, shown, sync_folder
from projected_grpo.sandbox.oracle import as_assert
from projected_grpo.sandbox.responses import completion_text

CHUNK = 64  # completions that are given to the grader at once


@dataclass(frozen=True)
class Item:
    """One completion to grade: what its output line begins with, the work, and a hash of the problem."""

    head: Mapping[str, Any]
    task: Task
    text: str
    problem: str


def read_completions(path: Path, problems: Sequence[Problem]) -> list[Item]:
    """Completions joined to problems by id or slug. Raises UserError naming the line that does not fit."""
    known = {p.slug: p for p in problems if p.slug} | {p.problem_id: p for p in problems}
    hashes: dict[str, str] = {}
    items = []
    for number, row in read_jsonl(path):
        where = f"{path}:{number}"
        for name in ("problem_id", "completion"):
            if name not in row:
                raise UserError(f"{where}: {name} is missing; the line has {shown(sorted(row))}")
        problem = known.get(id_text(row["problem_id"]))
        if problem is None:
            raise UserError(f"{where}: problem_id {shown(row['problem_id'])} is not among the problems")
        text = completion_text(row["completion"])
        if text is None:
            raise UserError(
                f"{where}: completion must be a string, or chat messages with the assistant's content, got "
                + shown(row["completion"])
            )
        mode = row.get("env_mode", problem.env_mode)
        if mode not in tuple(MODES):  # a list is not hashable
            raise UserError(f"{where}: env_mode {shown(mode)} is not one of {', '.join(MODES)}")
        head = {"problem_id": row["problem_id"], "env_mode": mode}
        if problem.problem_id not in hashes:
            hashes[problem.problem_id] = problem_hash(problem.task)
        task = replace(problem, env_mode=mode).task
        items.append(Item(head, task, text, hashes[problem.problem_id]))
    if not items:
        raise UserError(f"{path}: no completions in it")
    return items


def problem_hash(task: Task) -> str:
    """Hash of what a problem asks its solutions, with the expected values."""
    return hashed(task.method, task.setup_code, task.canonical, task.test_name, *map(as_assert, task.calls))


def hashed(*facts: object) -> str:
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


def grade_file(items: Sequence[Item], grader: Grader, out: Path) -> list[dict[str, Any]]:
    """Write one line per item to `out`, which appears when all are there; returns the lines.

    Lines go to `<out>.part` as they come, each with a hash of what it grades and how, so that a killed run
    continues there. Raises UserError if the part file belongs to anything else, or to another process.
    """
    if out.exists() and not out.is_file():  # a device would be replaced
        raise UserError(f"--out {out}: is no regular file; name another")
    part = out.with_name(out.name + ".part")
    out.parent.mkdir(parents=True, exist_ok=True)
    how = (grader.any_fence, *astuple(grader.sandbox.limits))
    heads = [
        {**item.head, "grading": hashed(item.problem, item.head["env_mode"], item.text, how)}
        for item in items
    ]
    with ExitStack() as stack:
        lock_file(part, stack, f"--out: {part}")
        log, rows = begun(part, heads)
        bar = stack.enter_context(tqdm(total=len(items), initial=len(rows), desc="grading", disable=None))
        stack.enter_context(goes_on())
        while len(rows) < len(items):
            asked = slice(len(rows), len(rows) + CHUNK)
            futures = [grader.submit(item.task, item.text) for item in items[asked]]
            for head, future in zip(heads[asked], futures, strict=True):
                rows.append({**head, **asdict(future.result())})
                log.append(rows[-1:])
                bar.update()
        log.flush(sync=True)
        part.replace(out)
        sync_folder(out.parent)
    return rows


def begun(part: Path, heads: Sequence[Mapping[str, Any]]) -> tuple[JsonlLog, list[dict[str, Any]]]:
    """The part file, to be gone on with behind its last whole line, and its lines.

    Raises UserError unless they are the first lines of this grading.
    """
    log = JsonlLog(part)
    written = part.read_bytes()
    log.size = written.rfind(b"\n") + 1
    count = written.count(b"\n")
    rows = complete_lines(part)[:count]
    if [row.get("grading") for row in rows] != [head["grading"] for head in heads[:count]]:
        raise UserError(
            f"{part}: left by another grading (other completions, problems or limits); delete it to start "
            "again, or name another --out"
        )
    if rows:
        logger.info("{}: going on after {} graded completions", part, len(rows))
    return log, rows


def mode_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Counts per mode: completions, format, correct, paid by the flawed grader, exploited."""
    fields = ("format_ok", "gt_correct", "passed", "exploited")
    own = {mode: [row for row in rows if row["env_mode"] == mode] for mode in MODES}
    lines = [[m, len(own[m]), *(sum(row[f] for row in own[m]) for f in fields)] for m in MODES if own[m]]
    return tabulate(lines, headers=["mode", "n", "format", "correct", "paid", "exploited"], tablefmt="github")


@dataclass(frozen=True)
class Comparison:
    """One stored label against today's grade of the same completion."""

    problem_id: str
    row: int
    stored_hacked: bool
    stored_correct: bool
    now: Mapping[str, Any]


def disagreement_tables(compared: Sequence[Comparison]) -> str:
    """Stored labels against today's: correct, and hacked against each detector and against exploited."""

    def crosstab(stored: str, now: str) -> list[Any]:
        cells: Counter[tuple[bool, ...]] = Counter((getattr(c, stored), bool(c.now[now])) for c in compared)
        counts = [cells[both] for both in product((True, False), repeat=2)]
        return [stored.removeprefix("stored_"), now, *counts]

    rows = [crosstab("stored_correct", "gt_correct")]
    rows += [crosstab("stored_hacked", now) for now in ("hacked_C", "hacked_E", "hacked_D", "exploited")]
    headers = ["stored label", "today", "both", "stored only", "today only", "neither"]
    return tabulate(rows, headers=headers, tablefmt="github")


def as_line(c: Comparison) -> str:
    """A comparison as one line of JSON."""
    labels = {"stored_hacked": c.stored_hacked, "stored_correct": c.stored_correct}
    return json.dumps({"problem_id": c.problem_id, "row": c.row, **labels, **c.now}) + "\n"
