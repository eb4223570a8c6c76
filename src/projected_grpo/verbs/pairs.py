"""The verbs of pair sets: check one, and make one from a graded pool."""

import json
from contextlib import ExitStack
from typing import Any

from projected_grpo.errors import GATE_FAILED, UserError
from projected_grpo.options.verbs import PairsFromPoolOptions, PairsLintOptions
from projected_grpo.pairs import parse_pairs, read_pairs
from projected_grpo.pools import join, load_pool, pool_digest
from projected_grpo.prepare.lint_pairs import Finding, describe, grade_pairs, lint, report
from projected_grpo.prepare.pairs_from_pool import Wanted, mine
from projected_grpo.rewards import open_grader
from projected_grpo.runlog import write_json
from projected_grpo.verbs.grade import with_modes


def pairs_lint_verb(options: PairsLintOptions) -> int:
    """Check a pair set: schema, lengths, repeats, and both sides under the grader. Exit 1 on an error."""
    raw = read_pairs(options.pairs)
    try:
        pairs = parse_pairs(raw, options.pairs)
    except UserError as error:
        said: dict[str, Any] = {
            "name": options.pairs,
            "findings": [{"level": "error", "pair": "", "message": str(error)}],
        }
        print(Finding("error", "", str(error)))
    else:
        with ExitStack() as stack:
            grades = grade_pairs(pairs, open_grader(options.grader.workers, stack, options.grader.sandbox))
        findings = lint(pairs, grades)
        said = report(pairs, grades, findings)
        print("\n".join([describe(said), *map(str, findings)]))
    levels = [finding["level"] for finding in said["findings"]]
    print(f"{levels.count('error')} errors, {levels.count('warning')} warnings")
    if options.json is not None:
        write_json(options.json, said)
    return GATE_FAILED if "error" in levels else 0


def pairs_from_pool_verb(options: PairsFromPoolOptions) -> int:
    """Make a pair file from a pool's prompts, graded again: a row that exploits and one that solves."""
    problems = with_modes(options.problems)
    teacher = join(load_pool(options.pool), problems)
    if not teacher.rows:
        raise UserError(f"{options.pool}: no overlap with the problems of {options.problems.problems}")
    wanted = Wanted(options.detectors, options.modes, options.canonical_clean)
    with ExitStack() as stack:
        grader = open_grader(options.grader.workers, stack, options.grader.sandbox)
        document = mine(teacher, problems, wanted, grader, options.out.stem)
    source = {"pool": options.pool.name, "pool_digest": pool_digest(options.pool)}
    document["made_from"] = source | {"problems": options.problems.problems} | document["made_from"]
    parse_pairs(json.dumps(document).encode(), str(options.pool))
    write_json(options.out, document)
    made = len(document["pairs"])
    print(f"{options.out}: {made} pairs of {len(teacher.rows)} prompts that match a problem")
    return 0
