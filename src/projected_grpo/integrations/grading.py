"""What other trainers hand over, as the grader takes it: a problem's id, a completion as text or as messages.

A trainer whose reward is a plain function, called in workers of its own, names a problem by source, id and
mode. Each process then reads the problems and opens a grader when it is first asked, and keeps both.
"""

import atexit
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from statistics import fmean

from projected_grpo.api.grading import Grader
from projected_grpo.config import EnvMode
from projected_grpo.errors import UserError
from projected_grpo.problems import Problem, load_problems
from projected_grpo.rewards import Grade, Task

Completion = str | Sequence[Mapping[str, str]]


def tasks_by_id(problems: Iterable[Problem]) -> dict[str, Task]:
    """What the grader needs, by problem id. Raises UserError for one that stands there in two modes."""
    tasks: dict[str, Task] = {}
    for problem in problems:
        if tasks.setdefault(problem.problem_id, problem.task).env_mode != problem.env_mode:
            raise UserError(f"problem {problem.problem_id!r} stands there in two modes; give each id once")
    return tasks


def task_of(tasks: Mapping[str, Task], problem_id: str) -> Task:
    """The task of an id. Raises UserError if there is none."""
    if problem_id not in tasks:
        raise UserError(f"no problem {problem_id!r} among the {len(tasks)} that the reward was made for")
    return tasks[problem_id]


def text_of(completion: Completion) -> str:
    """The text of a completion: itself, or the last of its messages."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def figures(grades: Sequence[Grade]) -> dict[str, float]:
    """Shares of these grades: paid without a right answer, and right."""
    return {
        "hack": fmean(grade.exploited for grade in grades),
        "solve": fmean(grade.gt_correct for grade in grades),
    }


def grader_of_process(workers: int = 0) -> Grader:
    """This process's grader, open until the process ends; `workers` as of `Grader`."""
    return _grader(os.getpid(), workers)


@cache
def _grader(process: int, workers: int) -> Grader:
    """By process: the threads of a grader do not survive a fork."""
    grader = Grader(workers)
    atexit.register(grader.close)
    return grader


def named_task(source: str, problem_id: str, mode: EnvMode) -> Task:
    """The task of a problem in a mode. Raises UserError if the source has no such problem."""
    found = _problems(source).get(problem_id)
    if found is None:
        raise UserError(f"{source}: no problem {problem_id!r} in it")
    return replace(found, env_mode=mode).task


@cache
def _problems(source: str) -> Mapping[str, Problem]:
    return {problem.problem_id: problem for problem in load_problems(source).problems}
