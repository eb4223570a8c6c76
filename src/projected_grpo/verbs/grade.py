"""The verbs that grade: anyone's completions, teacher pools, and the grader's own speed."""

from contextlib import ExitStack

from projected_grpo.config import ProblemConfig, env_modes
from projected_grpo.options.verbs import GradeOptions
from projected_grpo.prepare.grade_file import grade_file, mode_table, read_completions
from projected_grpo.problems import Problem, assign_modes, read_problems
from projected_grpo.rewards import open_grader


def with_modes(cfg: ProblemConfig) -> tuple[Problem, ...]:
    """The file's problems with their modes."""
    return assign_modes(read_problems(cfg), env_modes(cfg.env_mode), {})


def grade_verb(options: GradeOptions) -> int:
    """Grade a JSONL of completions, in input order, resumable, with a summary per mode."""
    items = read_completions(options.completions, with_modes(options.problems))
    with ExitStack() as stack:
        rows = grade_file(items, open_grader(options.grader, stack, any_fence=True), options.out)
    print(mode_table(rows))
    return 0
