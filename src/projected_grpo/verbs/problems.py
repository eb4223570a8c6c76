"""The verb of problem files: check one."""

from contextlib import ExitStack

from projected_grpo.errors import GATE_FAILED
from projected_grpo.options.verbs import ProblemsLintOptions
from projected_grpo.prepare.lint_problems import describe, lint, report
from projected_grpo.problems import read_source
from projected_grpo.rewards import open_grader
from projected_grpo.runlog import write_json


def problems_lint_verb(options: ProblemsLintOptions) -> int:
    """Check a problem file: tests that a lazy answer passes, solutions that are not right. Exit 1 if any."""
    loaded = read_source(options.problems)
    with ExitStack() as stack:
        found = lint(loaded, open_grader(options.grader, stack).sandbox)
    print(describe(options.problems, found))
    if options.json is not None:
        limits = {name: getattr(options.grader, name) for name in ("cpu_seconds", "wall_seconds")}
        write_json(options.json, report(options.problems, found) | limits)
    return GATE_FAILED if any(one.findings for one in found) else 0
