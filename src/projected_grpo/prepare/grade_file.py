"""Grading files of completions: in input order, resumable, with a summary per mode."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from loguru import logger
from tabulate import tabulate
from tqdm import tqdm

from projected_grpo.errors import UserError
from projected_grpo.problems import Problem, id_text, read_jsonl
from projected_grpo.rewards import MODES, Grader, Task
from projected_grpo.runlog import append_jsonl, complete_lines

CHUNK = 64  # completions graded between two writes of the part file


@dataclass(frozen=True)
class Item:
    """One completion to grade: what its output line begins with, and the work."""

    head: Mapping[str, Any]
    task: Task
    text: str


def read_completions(path: Path, problems: Sequence[Problem]) -> list[Item]:
    """Completions joined to problems by id or slug. Raises UserError naming the line that does not fit."""
    known = {p.slug: p for p in problems if p.slug} | {p.problem_id: p for p in problems}
    items = []
    for number, row in read_jsonl(path):
        problem = known.get(id_text(row.get("problem_id")))
        if problem is None:
            raise UserError(
                f"{path}:{number}: problem_id {row.get('problem_id')!r} is not among the problems"
            )
        if not isinstance(row.get("completion"), str):
            raise UserError(f"{path}:{number}: completion must be a string")
        mode = row.get("env_mode", problem.env_mode)
        if mode not in tuple(MODES):  # a list is not hashable
            raise UserError(f"{path}:{number}: env_mode {mode!r} is not one of {', '.join(MODES)}")
        head = {"problem_id": row["problem_id"], "env_mode": mode}
        items.append(Item(head, replace(problem, env_mode=mode).task, row["completion"]))
    if not items:
        raise UserError(f"{path}: no completions in it")
    return items


def grade_file(items: Sequence[Item], grader: Grader, out: Path) -> list[dict[str, Any]]:
    """Write one line per item to `out`, which appears when all are there; returns the lines.

    Lines go to `<out>.part` as they come, so that a killed run continues there. Raises UserError if the
    part file belongs to other completions.
    """
    part = out.with_name(out.name + ".part")
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = complete_lines(part)
    begun = [dict(item.head) for item in items[: len(rows)]]
    if [{k: row.get(k) for k in ("problem_id", "env_mode")} for row in rows] != begun:
        raise UserError(f"{part}: left by another grading; delete it to start again")
    if rows:
        logger.info("{}: going on after {} graded completions", part, len(rows))
    with tqdm(total=len(items), initial=len(rows), desc="grading", disable=None) as bar:
        while len(rows) < len(items):
            chunk = items[len(rows) : len(rows) + CHUNK]
            grades = grader.grade_all([(item.task, item.text) for item in chunk])
            new = [{**item.head, **asdict(grade)} for item, grade in zip(chunk, grades, strict=True)]
            append_jsonl(part, new)
            rows += new
            bar.update(len(new))
    part.replace(out)
    return rows


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
