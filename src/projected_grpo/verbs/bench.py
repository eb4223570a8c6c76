"""The verbs that time training: a whole step, and its parts beside their floors."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from loguru import logger
from tabulate import tabulate

from projected_grpo.bench.grader import CANONICAL_SAMPLE, bench_grader, bench_table, benchmark_work, pool_work
from projected_grpo.bench.growth import bench_growth
from projected_grpo.bench.movement import bench_movement
from projected_grpo.bench.precision import bench_precision
from projected_grpo.bench.step import (
    Rival,
    Work,
    bench_backward,
    bench_extraction,
    bench_generation,
    bench_step,
    bench_svd,
)
from projected_grpo.errors import UserError
from projected_grpo.options.verbs import BenchGraderOptions, BenchOptions, BenchStepOptions
from projected_grpo.pools import teacher_of
from projected_grpo.problems import read_problems
from projected_grpo.ranks import join_ranks
from projected_grpo.runlog import write_json
from projected_grpo.verbs.grade import with_modes


def measure(options: BenchOptions, function: Callable[[Work], dict[str, Any]], *, writes: bool = True) -> int:
    work = options.work
    for name in ("prompts_per_step", "group", "prompt_tokens", "max_new", "steps", "tokens_per_microbatch"):
        if getattr(work, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(work, name)}")
    if work.group < 2:
        raise UserError(f"--group must be at least 2, got {work.group}: a group of one has no advantage")
    if options.threads:
        torch.set_num_threads(options.threads)
    figures = function(work)
    if not writes:
        return 0
    if "points" in figures:
        print(tabulate(figures["points"], headers="keys", floatfmt=".3g"))
    single = {name: value for name, value in figures.items() if name != "points"}
    rows = [[name, f"{value:.4g}" if isinstance(value, float) else value] for name, value in single.items()]
    print(tabulate(rows, disable_numparse=True))
    if options.json is not None:
        write_json(options.json, figures)
    return 0


def rival(name: str) -> Rival | None:
    """The other trainer. Raises UserError if it is not installed."""
    if name == "none":
        return None
    try:
        module = importlib.import_module("projected_grpo.bench.trl")
    except ModuleNotFoundError as error:
        raise UserError(f"--vs {name}: {error.name} is not installed; pip install -e '.[bench]'") from error
    steps: Rival = module.trl_steps
    return steps


def bench_step_verb(options: BenchStepOptions) -> int:
    """Seconds of a whole training step, and TRL's on the same work; in several processes under torchrun."""
    device = options.work.model.device
    if options.vs != "none" and "," in device:
        raise UserError(
            f"--device {device}: the trainer of --vs {options.vs} runs on one; name one, or leave --vs out"
        )
    other, ranks = rival(options.vs), join_ranks(device)
    return measure(options, lambda work: bench_step(work, other, ranks), writes=ranks.first)


def bench_generation_verb(options: BenchOptions) -> int:
    """Tokens per second of our sampling, beside transformers' generate on the base model."""
    return measure(options, bench_generation)


def bench_backward_verb(options: BenchOptions) -> int:
    """The loss's forward and backward, beside those of the frozen base model."""
    return measure(options, bench_backward)


def bench_extraction_verb(options: BenchOptions) -> int:
    """Gradients of pairs, and of their differences alone, beside the frozen base's forward and backward."""
    return measure(options, bench_extraction)


def bench_svd_verb(options: BenchOptions) -> int:
    """The SVDs of all adapted weights, beside a product of each weight with its transpose."""
    return measure(options, bench_svd)


def bench_growth_verb(options: BenchOptions) -> int:
    """Time of a step and memory of the loss against rollouts, completion length, rank and layers."""
    return measure(options, bench_growth)


def bench_precision_verb(options: BenchOptions) -> int:
    """The share of small adapter parameters that survives in sampler, loss and export, in the dtype given."""
    return measure(options, bench_precision)


def bench_movement_verb(options: BenchOptions) -> int:
    """How far adapter parameters of a size move log-probabilities: which learning rate can teach anything."""
    return measure(options, bench_movement)


def bench_grader_verb(options: BenchGraderOptions) -> int:
    """Responses per second of the grader, its latencies, and plain subprocesses on the same work."""
    if options.pool is None:
        work = benchmark_work(read_problems(options.problems), options.limit)
    else:
        problems = with_modes(options.problems)
        teacher = teacher_of(options.pool, problems, options.problems.problems)
        work = pool_work(problems, teacher, options.limit)
    if options.baseline_sample is None:
        options = replace(options, baseline_sample=CANONICAL_SAMPLE if options.pool is None else 0)
    if options.pool is not None and options.baseline_sample:
        logger.warning("plain subprocesses will run programs of this pool without containment")
    report = bench_grader(work, options)
    print(bench_table(report))
    if options.json is not None:
        write_json(options.json, report)
    return 0
