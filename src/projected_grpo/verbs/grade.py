"""The verbs that grade: anyone's completions, teacher pools, and the grader's own speed."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from projected_grpo.config import EMBEDDED, ProblemConfig, SandboxMode, env_modes
from projected_grpo.experiment import open_grader, read_problems
from projected_grpo.prepare.grade_file import grade_file, mode_table, read_completions
from projected_grpo.problems import Problem, assign_modes


@dataclass(frozen=True)
class GraderOptions:
    """How the grader runs, in every verb that grades."""

    workers: int = 0
    """Grader processes; 0 is one per core."""
    sandbox: SandboxMode = "auto"
    """strict refuses to start unless every layer of containment is in force; auto warns what is missing."""


@dataclass(frozen=True)
class GradeOptions:
    """Grade anyone's completions."""

    completions: Path
    """JSONL with problem_id, completion and optionally env_mode."""
    out: Path
    """JSONL to write, one line per input line, in order: the input's ids and every Grade field."""
    problems: ProblemConfig = field(default_factory=lambda: ProblemConfig(problems=EMBEDDED))
    grader: GraderOptions = field(default_factory=GraderOptions)


def with_modes(cfg: ProblemConfig) -> tuple[Problem, ...]:
    """The file's problems with their modes."""
    return assign_modes(read_problems(cfg), env_modes(cfg.env_mode), {})


def grade_verb(options: GradeOptions) -> int:
    """Grade a JSONL of completions, in input order, resumable, with a summary per mode."""
    items = read_completions(options.completions, with_modes(options.problems))
    with ExitStack() as stack:
        rows = grade_file(
            items, open_grader(options.grader.workers, stack, options.grader.sandbox), options.out
        )
    print(mode_table(rows))
    return 0
