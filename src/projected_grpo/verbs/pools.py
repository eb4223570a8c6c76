"""The verbs of teacher pools: build, sample, report, regrade."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loguru import logger

from projected_grpo.antipasto import weights_digest
from projected_grpo.config import ProblemConfig
from projected_grpo.deploy.trained import file_hash
from projected_grpo.engine.chat import Chat, open_chat, sampler_opener
from projected_grpo.engine.models import encode_chat, load_model
from projected_grpo.engine.placement import pick_devices, pick_dtype
from projected_grpo.errors import UserError, goes_on
from projected_grpo.experiment import SPLIT_SEED
from projected_grpo.options.verbs import (
    PoolBuildOptions,
    PoolRegradeOptions,
    PoolReportOptions,
    PoolSampleOptions,
)
from projected_grpo.pools import bake, building, join, load_pool, pool_report, report_table, teacher_of
from projected_grpo.prepare.grade_file import Comparison, as_line, disagreement_tables
from projected_grpo.prepare.sample_pool import fitting_prompts, sample_pool
from projected_grpo.problems import Problem, digest, is_eval, read_problems, take
from projected_grpo.rewards import open_grader
from projected_grpo.run.checkpoint import load_adapter
from projected_grpo.runlog import write_atomically, write_json
from projected_grpo.verbs.grade import with_modes


def pool_build_verb(options: PoolBuildOptions) -> int:
    """Bake and grade a teacher pool."""
    problems = with_modes(options.problems)[: options.problems.n_problems]
    with ExitStack() as stack:
        stack.enter_context(building(options.out))
        stack.enter_context(goes_on("the same command builds the pool again"))
        counts, wrong = bake(problems, open_grader(options.grader, stack), options.out)
    print(f"{options.out}: {len(problems)} prompts, " + ", ".join(f"{k} {n}" for k, n in counts.items()))
    for name, what in wrong:
        logger.warning("problem {}: {}", name, what)
    return 0


def pool_sample_verb(options: PoolSampleOptions) -> int:
    """Sample a teacher pool from a model, graded, in the form that --teacher-pool-dir takes."""
    _ = options.how.sampler  # bad settings are reported before anything is written
    open_sampler = sampler_opener(options.model)
    if options.problems.n_problems < 1:
        raise UserError(f"--n-problems must be at least 1, got {options.problems.n_problems}")
    problems = [p for p in with_modes(options.problems) if not is_eval(p)]
    problems = list(take(problems, options.problems.n_problems, SPLIT_SEED))
    adapter = adapter_hash(options.adapter)
    with ExitStack() as stack:
        grader = open_grader(options.grader, stack)
        loaded = load_model(options.model)
        fitting = fitting_prompts(loaded, problems, options.how.max_new)
        chat = open_chat(options.model, open_sampler, loaded)
        made_with = sampled_with(options, chat, problems) | {"adapter": adapter}
        if options.adapter is not None:
            load_adapter(options.adapter, chat.policy)
        with goes_on():
            counts = sample_pool(options.out, made_with, chat, grader, fitting, options.how)
    counted = ", ".join(f"{name} {counts[name]}" for name in ("rows", "hacked", "correct"))
    print(f"{options.out}: {len(load_pool(options.out))} prompts; made now: {counted}")
    return 0


def adapter_hash(path: Path | None) -> str | None:
    try:
        return file_hash(path)
    except OSError as error:
        raise UserError(f"--adapter {path}: cannot be read ({error.strerror})") from error


def sampled_with(options: PoolSampleOptions, chat: Chat, problems: Sequence[Problem]) -> dict[str, Any]:
    """What rows and labels of a sampled pool come from, but for the adapter."""
    prompts = [encode_chat(chat.tokenizer, p.messages) for p in problems]
    return {
        "model": options.model.model,
        "weights": weights_digest(chat.policy),
        "dtype": str(pick_dtype(options.model.dtype, pick_devices(options.model.device)[0])),
        "sampler": options.model.sampler,
        **asdict(options.problems),
        "digest_of_problems": digest(problems),
        "digest_of_prompts": hashlib.blake2b(json.dumps(prompts).encode(), digest_size=16).hexdigest(),
        **{name: value for name, value in asdict(options.how).items() if name != "batch"},
        **{name: getattr(options.grader, name) for name in ("cpu_seconds", "wall_seconds")},
    }


def pool_report_verb(options: PoolReportOptions) -> int:
    """Count a pool's stored labels per mode and detector, its prompts, duplicates and lengths."""
    pool = load_pool(options.pool)
    report = pool_report(pool)
    print(report_table(report))
    if options.problems is not None:
        matched = len(join(pool, read_problems(ProblemConfig(problems=options.problems))).rows)
        report["problems_matched"] = matched
        print(f"\n{matched} problems of {options.problems} have a prompt in the pool")
    if options.json is not None:
        write_json(options.json, report)
    return 0


def pool_regrade_verb(options: PoolRegradeOptions) -> int:
    """Grade a teacher pool with today's grader and report where the stored labels disagree."""
    problems = with_modes(options.problems)
    teacher = teacher_of(options.pool, problems, options.problems.problems)
    by_id = {p.problem_id: teacher.posed(p) for p in problems}
    work = [(by_id[name], i, row) for name, rows in teacher.rows.items() for i, row in enumerate(rows)]
    with ExitStack() as stack:
        grader = open_grader(options.grader, stack)
        grades = grader.grade_all([(problem.task, row.completion) for problem, _, row in work])
    compared = [
        Comparison(problem.problem_id, i, row.hacked, row.gt_pass, asdict(grade))
        for (problem, i, row), grade in zip(work, grades, strict=True)
    ]
    print(f"{len(compared)} completions of {len(teacher.rows)} problems\n{disagreement_tables(compared)}")
    if options.out is not None:
        write_atomically(options.out, "".join(map(as_line, compared)).encode())
    return 0
