"""Public: problems whose graders can be cheated, pairs, and the grader with its oracle. Needs no torch."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from projected_grpo import pairs as pairs_module
from projected_grpo import problems as problems_module
from projected_grpo import rewards
from projected_grpo.config import EnvMode, GraderConfig
from projected_grpo.errors import UserError
from projected_grpo.pairs import Pair, PairSet
from projected_grpo.problems import Problem, assign_modes, is_eval
from projected_grpo.rewards import MODES, Grade, ModeInfo

__all__ = [
    "MODES",
    "EnvMode",
    "Grade",
    "Grader",
    "ModeInfo",
    "Pair",
    "PairSet",
    "Problem",
    "Problems",
    "UserError",
    "load_pairs",
    "load_problems",
]


@dataclass(frozen=True)
class Problems:
    """Problems to train on and to evaluate on, disjoint by the hash of their ids."""

    train: tuple[Problem, ...]
    held_out: tuple[Problem, ...]


def load_problems(source: str | Path, modes: Sequence[str] = ("run_tests",)) -> Problems:
    """Problems, each with one of these modes: the flaw of its grader, which its prompt states as a fact.

    `source`: `nano`, `embedded`, or a file: the benchmark's jsonl, LeetCodeDataset's jsonl(.gz). Mode and
    side depend on a problem's id alone. Problems that cannot be graded are left out.

    Shapes: a problem has `messages` (the chat prompt, with the hint) and `task` (what the grader takes).
    Units: none.
    Errors: UserError for a file that is missing or malformed (with its line), that has no usable problem, and
    for a mode that does not exist.
    Source: docs/grader.md, docs/howto/own_problems.md.
    """
    known = [mode for mode in MODES if mode in modes]
    unknown = sorted(set(modes) - set(known))
    if unknown or not known:
        raise UserError(f"modes {', '.join(unknown) or 'are none'}; there are {', '.join(MODES)}")
    found = assign_modes(problems_module.load_problems(str(source)).problems, known, {})
    train, held_out = (tuple(p for p in found if is_eval(p) == side) for side in (False, True))
    return Problems(train, held_out)


def load_pairs(source: str | Path = "core") -> PairSet:
    """Contrastive pairs: a chat prompt, a completion that hacks, and one that is honest.

    `source`: a packaged set (`core`, `nano`, `nano-sampled`, ...) or a file, both as docs/pairs.md has them.

    Shapes: `pairs`, a tuple; `split()` gives those to extract from, and two that are held out.
    Units: none; completions are text.
    Errors: UserError for a file that cannot be read or breaks the schema (with the entry), or fewer than 4.
    Source: docs/pairs.md; pairs are written before any rollout is seen.
    """
    return pairs_module.load_pairs(Path(source))


class Grader(rewards.Grader):
    """Grades responses in a sandbox: `with Grader() as grader: grader.grade(problem.task, text)`.

    `reward` is what the flawed grader pays. `gt_correct` comes from an oracle that a response cannot forge:
    the expected values are never in the process that runs it. `workers`: processes, 0 is one per core.
    `strict` refuses to start unless every layer of containment is in force; else what is missing is logged.

    Shapes: a Grade for one response; `grade_all` keeps the order of its items.
    Units: reward is 0, 0.5 (parses), or 3.5 (right, or the loophole pays); limits are seconds.
    Errors: UserError if limits or containment cannot be had. Nothing that a response does raises.
    Source: docs/grader.md.
    """

    def __init__(
        self,
        workers: int = 0,
        *,
        strict: bool = False,
        cpu_seconds: int = 8,
        wall_seconds: float = 10.0,
        any_fence: bool = False,
    ) -> None:
        how = GraderConfig(workers, "strict" if strict else "auto", cpu_seconds, wall_seconds)
        with ExitStack() as stack:
            opened = rewards.open_grader(how, stack, any_fence=any_fence)
            super().__init__(opened.sandbox, opened.remembered, any_fence=any_fence)
            self._open = stack.pop_all()

    def close(self) -> None:
        """Finish what is queued, then end the sandbox's processes."""
        self._open.close()

    def __enter__(self) -> "Grader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, at)
