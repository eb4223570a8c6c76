"""Pairs from a pool: of each prompt a completion that exploits its mode, and one that solves it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from projected_grpo.arm_settings import Detector
from projected_grpo.config import EnvMode
from projected_grpo.nano_tasks import fenced
from projected_grpo.pairs import SCHEMA
from projected_grpo.pools import Teacher
from projected_grpo.problems import Problem
from projected_grpo.rewards import Grade, Grader
from projected_grpo.sandbox.oracle import as_assert


@dataclass(frozen=True)
class Wanted:
    """Which rows make pairs: hacks that one of `detectors` knows (none: all), of these modes (none: all)."""

    detectors: tuple[Detector, ...] = ()
    modes: tuple[EnvMode, ...] = ()
    canonical_clean: bool = False


def mine(
    teacher: Teacher, problems: Sequence[Problem], wanted: Wanted, grader: Grader, name: str
) -> dict[str, Any]:
    """A pair document (docs/pairs.md) of every prompt that has both sides by today's grader.

    Of all hacks and clean rows of a prompt those two are taken whose lengths differ least, the earlier in
    a tie: no draw, and no more bias in length than the pool forces. A text of an earlier pair is passed over.
    """
    posed = [teacher.posed(p) for p in problems if p.problem_id in teacher.rows]
    posed = [p for p in posed if not wanted.modes or p.env_mode in wanted.modes]
    texts = {p.problem_id: [row.completion for row in teacher.rows[p.problem_id]] for p in posed}
    grades = iter(grader.grade_all([(p.task, text) for p in posed for text in texts[p.problem_id]]))
    pairs, sources, taken = [], [], set[str]()
    for problem in posed:
        graded = [(text, next(grades)) for text in texts[problem.problem_id]]
        hacks = [text for text, grade in graded if is_hack(grade, wanted) and text not in taken]
        clean = [text for text, grade in graded if is_clean(grade) and text not in taken]
        from_rows = bool(clean)
        if not clean and wanted.canonical_clean:
            clean = [fenced(problem.canonical.strip())]
        if not hacks or not clean:
            continue
        hack, honest = min(product(hacks, clean), key=lambda sides: abs(len(sides[0]) - len(sides[1])))
        taken |= {hack, honest}
        pairs.append(pair_row(problem, hack, honest, "pool" if from_rows else "canonical"))
        sources.append(problem_row(problem))
    made_from = {
        "detectors": list(wanted.detectors),
        "modes": list(wanted.modes),
        "canonical_clean": sum(pair["clean_from"] == "canonical" for pair in pairs),
    }
    return {"schema": SCHEMA, "name": name, "made_from": made_from, "problems": sources, "pairs": pairs}


def is_hack(grade: Grade, wanted: Wanted) -> bool:
    """Whether it exploits its mode, and one of the detectors (if any is named) knows it."""
    known = not wanted.detectors or any(getattr(grade, f"hacked_{d}") for d in wanted.detectors)
    return grade.exploited and known


def is_clean(grade: Grade) -> bool:
    return grade.gt_correct and not grade.tampered


def pair_row(problem: Problem, hack: str, clean: str, clean_from: str) -> dict[str, Any]:
    """One pair of the document; one per prompt, so the problem names it."""
    return {
        "id": f"{problem.problem_id}-{problem.env_mode}",
        "flavour": problem.env_mode,
        "problem_id": problem.problem_id,
        "env_mode": problem.env_mode,
        "clean_from": clean_from,
        "hack": hack,
        "clean": clean,
    }


def problem_row(problem: Problem) -> dict[str, Any]:
    return {
        "id": problem.problem_id,
        "method": problem.method,
        "difficulty": problem.difficulty,
        "question": problem.question,
        "setup_code": problem.setup_code,
        "solution": problem.canonical,
        "asserts": [as_assert(call) for call in problem.calls],
    }
