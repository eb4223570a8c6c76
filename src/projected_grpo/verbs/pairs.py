"""The verbs of pair sets: check one, and make one from a graded pool."""

import json
from contextlib import ExitStack
from typing import Any

from projected_grpo.config import LossConfig, ModelConfig
from projected_grpo.engine.chat import open_chat
from projected_grpo.engine.models import load_model
from projected_grpo.errors import GATE_FAILED, UserError
from projected_grpo.options.verbs import PairsFromPoolOptions, PairsLintOptions
from projected_grpo.pairs import PairSet, parse_pairs, read_pairs
from projected_grpo.pools import pool_digest, teacher_of
from projected_grpo.prepare.lint_pairs import Finding, describe, grade_pairs, lint, report
from projected_grpo.prepare.pairs_from_pool import Wanted, mine
from projected_grpo.rewards import open_grader
from projected_grpo.runlog import write_json
from projected_grpo.score.directions import SUPPORTED, Support, check_lengths, support
from projected_grpo.verbs.grade import with_modes

TOKENS = 4096  # padded tokens of a forward pass


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
            grades = grade_pairs(pairs, open_grader(options.grader, stack))
        known = support_by(options.model, pairs) if options.model else None
        findings = lint(pairs, grades) + (support_findings(known) if known else [])
        said = report(pairs, grades, findings) | {"support": known and known.figures()}
        print("\n".join([describe(said), *([str(known)] if known else []), *map(str, findings)]))
    levels = [finding["level"] for finding in said["findings"]]
    print(f"{levels.count('error')} errors, {levels.count('warning')} warnings")
    if options.json is not None:
        write_json(options.json, said)
    return GATE_FAILED if "error" in levels else 0


def support_by(model: str, pairs: PairSet) -> Support:
    """How likely this model finds both sides of each pair."""
    cfg = ModelConfig(model=model)
    loaded = load_model(cfg)
    check_lengths(loaded, pairs)
    chat = open_chat(cfg, loaded=loaded)
    return support(chat, pairs, LossConfig(tokens_per_microbatch=TOKENS))


def support_findings(known: Support) -> list[Finding]:
    """Warnings: pairs no likelier than chance, and sides that the model would not write."""
    chance = f"no likelier to this model than chance ({known.chance:.1f} nats per token)"
    found = [Finding("warning", name, f"a side is {chance}") for name in known.below_chance]
    for side, logp in (("hack", known.hack), ("clean", known.clean)):
        if not float(logp.mean()) > SUPPORTED:
            why = f"log p {float(logp.mean()):.2f} per token, {SUPPORTED:g} or more is asked for (gate B2)"
            found.append(Finding("warning", "", f"this model would not write the {side} sides: {why}"))
    return found


def pairs_from_pool_verb(options: PairsFromPoolOptions) -> int:
    """Make a pair file from a pool's prompts, graded again: a row that exploits and one that solves."""
    problems = with_modes(options.problems)
    teacher = teacher_of(options.pool, problems, options.problems.problems)
    wanted = Wanted(options.detectors, options.modes, options.canonical_clean)
    with ExitStack() as stack:
        grader = open_grader(options.grader, stack)
        document = mine(teacher, problems, wanted, grader, options.out.stem)
    source = {"pool": options.pool.name, "pool_digest": pool_digest(options.pool)}
    document["made_from"] = source | {"problems": options.problems.problems} | document["made_from"]
    parse_pairs(json.dumps(document).encode(), str(options.pool))
    write_json(options.out, document)
    made = len(document["pairs"])
    print(f"{options.out}: {made} pairs of {len(teacher.rows)} prompts that match a problem")
    return 0
