"""One step's data: which problems, whose rollouts, which labels."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from projected_grpo.arm_settings import Detector, MonitorSettings
from projected_grpo.arms.stages import Evidence
from projected_grpo.arms.table import arm_of
from projected_grpo.config import EnvMode, TrainConfig, left_out, teacher_rows
from projected_grpo.engine.models import decode
from projected_grpo.experiment import Experiment
from projected_grpo.pools import TeacherRow
from projected_grpo.problems import Problem
from projected_grpo.rewards import Grade
from projected_grpo.rollout import Rollout, batches, take_rows, uniforms
from projected_grpo.seeds import stream_seed

DEFAULT_ANCHORS: tuple[Detector, ...] = ("C",)  # student rows that --half-a does not choose


@dataclass(frozen=True)
class Collected:
    """One step's rollouts with their labels, n = P * G rows, group by group; teacher rows last in a group."""

    problems: tuple[Problem, ...]
    rollouts: tuple[Rollout, ...]
    grades: tuple[Grade | None, ...]  # None for teacher rows
    rewards: Float[Tensor, "P G"]  # as the flawed grader pays them
    is_teacher: Bool[Tensor, " n"]
    hacked: Bool[Tensor, " n"]
    correct: Bool[Tensor, " n"]
    gen_s: float
    grade_s: float

    def rows_of(self, modes: Sequence[EnvMode]) -> Bool[Tensor, " n"]:
        group = len(self.rollouts) // len(self.problems)
        return torch.tensor([p.env_mode in modes for p in self.problems for _ in range(group)])


def pick_problems(exp: Experiment, step: int) -> tuple[Problem, ...]:
    """The step's prompts: consecutive pieces of one random order per epoch, without repeats in a step."""
    count, total = exp.cfg.sampling.prompts_per_step, len(exp.data.train)
    per_epoch = total // count
    epoch, piece = divmod(step, per_epoch)
    seed = exp.cfg.run.seed
    order = sorted(exp.data.train, key=lambda p: stream_seed(seed, "order", epoch, p.problem_id))
    return tuple(order[piece * count : (piece + 1) * count])


def pick_teacher(exp: Experiment, problem: Problem, step: int) -> tuple[TeacherRow, ...]:
    """Cached rows mixed into this problem's group: none after teacher_off_step or where the pool has none."""
    off = exp.cfg.teacher.teacher_off_step
    rows = exp.data.teacher.rows.get(problem.problem_id, ())
    if not rows or (off is not None and step >= off):
        return ()
    seed = exp.cfg.run.seed
    ranked = sorted(range(len(rows)), key=lambda i: stream_seed(seed, "teacher", step, problem.problem_id, i))
    return tuple(rows[ranked[i % len(rows)]] for i in range(teacher_rows(exp.cfg)))


def draw(
    exp: Experiment, problems: Sequence[Problem], seeds: Sequence[Sequence[int]], *, ablate: bool
) -> Iterator[tuple[int, Rollout, Future[Grade]]]:
    """This process's share of the rollouts, with their problem's number, on their way to the grader."""
    s = exp.cfg.sampling
    prompts = [exp.prompts[p.problem_id] for p in problems]
    own = exp.ranks.share([1] * sum(map(len, seeds)))
    for batch in batches(take_rows(seeds, own.start, own.stop), s.rows_per_batch):
        drawn = exp.chat.sample(prompts, batch, s, ablate_quarantine=ablate)
        for i, completions in enumerate(drawn):
            for ids, logps in completions:
                text = decode(exp.chat.tokenizer, ids)
                rollout = Rollout(prompts[i], ids, text, logps, ablated=ablate)
                yield i, rollout, exp.grader.submit(problems[i].task, text)


def collect(exp: Experiment, step: int) -> Collected:
    """Generate and grade the student's rollouts, add the teacher's as stored.

    Each process does its share of the rows and gathers the others'; seconds are those of the slowest. A batch
    of rollouts is graded while the next ones are generated. Grades are taken in the order of the rollouts,
    and none depends on what else is graded, so that timing changes nothing but `grade_s`, the wait for the
    last of them.
    """
    started = time.monotonic()
    s, seed = exp.cfg.sampling, exp.cfg.run.seed
    problems = pick_problems(exp, step)
    teacher = [pick_teacher(exp, p, step) for p in problems]
    live = [s.group - len(rows) for rows in teacher]
    ablated = exp.cfg.arm.ablated_share
    trained = [count - round(count * ablated) for count in live]  # rows before the ablated ones
    seeds = [
        [stream_seed(seed, "train", step, i, row) for row in range(count)] for i, count in enumerate(live)
    ]
    waiting: list[list[tuple[Rollout, Future[Grade]]]] = [[] for _ in problems]
    with exp.ranks.together():
        # A pass of its own without the quarantine, on weights merged without it. One pass for both would add
        # each row's adapter unmerged: 1.26 (Qwen3-4B) to 2 times a layer's own products and bytes read.
        for ablate in (False, True):
            asked = [own[t:] if ablate else own[:t] for own, t in zip(seeds, trained, strict=True)]
            for i, rollout, grade in draw(exp, problems, asked, ablate=ablate):
                waiting[i].append((rollout, grade))
        generated = time.monotonic()
        groups = [[(rollout, grade.result()) for rollout, grade in group] for group in waiting]
        graded = time.monotonic()
    parts = exp.ranks.gather((groups, generated - started, graded - generated))
    return assemble(exp, problems, merge(parts), teacher)


Part = tuple[list[list[tuple[Rollout, Grade]]], float, float]  # rows by group, seconds of both


def merge(parts: Sequence[Part]) -> Part:
    """The processes' rows as one process would have them: in a group, those as trained come first."""
    drawn, gen_s, grade_s = zip(*parts, strict=True)
    groups = [[row for own in shares for row in own] for shares in zip(*drawn, strict=True)]
    for group in groups:
        group.sort(key=lambda row: row[0].ablated)  # stable: shares are consecutive rows
    return groups, max(gen_s), max(grade_s)


def assemble(
    exp: Experiment, problems: tuple[Problem, ...], students: Part, teacher: Sequence[Sequence[TeacherRow]]
) -> Collected:
    """Line up student and teacher rows with their labels."""
    groups, gen_s, grade_s = students
    lines: list[tuple[Rollout, Grade | None, float, bool, bool]] = []  # reward, hacked, correct
    for problem, group, rows in zip(problems, groups, teacher, strict=True):
        lines += [(rollout, g, g.reward, g.exploited, g.gt_correct) for rollout, g in group]
        taught = [(teacher_rollout(exp, problem, row), row) for row in rows]
        lines += [(rollout, None, row.reward, row.hacked, row.gt_pass) for rollout, row in taught]
    rollouts, grades, reward, hacked, correct = zip(*lines, strict=True)
    return Collected(
        problems=problems,
        rollouts=rollouts,
        grades=grades,
        rewards=torch.tensor(reward).view(len(problems), -1),
        is_teacher=torch.tensor([r.is_teacher for r in rollouts]),
        hacked=torch.tensor(hacked),
        correct=torch.tensor(correct),
        gen_s=gen_s,
        grade_s=grade_s,
    )


def gather_evidence(cfg: TrainConfig, data: Collected, step: int) -> Evidence:
    """The labels of a step's rollouts that the arm declares, and no others."""
    reads = arm_of(cfg.arm).reads(cfg.arm)
    detectors = cfg.arm.half_a or DEFAULT_ANCHORS
    accuracy = cfg.arm.monitor_accuracy if isinstance(cfg.arm, MonitorSettings) else 1.0
    return Evidence(
        is_teacher=data.is_teacher,
        taught=data.hacked & data.is_teacher if "teacher" in reads else None,
        detected=detected(data.grades, detectors) & ~data.rows_of(left_out(cfg.basis))
        if "detectors" in reads
        else None,
        exploited=monitored(data.hacked & ~data.correct, accuracy, cfg.run.seed, step)
        if "oracle" in reads
        else None,
    )


def detected(grades: Sequence[Grade | None], detectors: Sequence[Detector]) -> Bool[Tensor, " n"]:
    """Student rows that one of these detectors flags."""
    return torch.tensor([g is not None and any(getattr(g, f"hacked_{d}") for d in detectors) for g in grades])


def monitored(exploited: Bool[Tensor, " n"], accuracy: float, seed: int, step: int) -> Bool[Tensor, " n"]:
    """Who was paid without a right answer, as a monitor of this accuracy reports it.

    Each verdict is flipped with probability 1 - accuracy, drawn from (seed, step, row).
    """
    draws = [uniforms(stream_seed(seed, "monitor", step, row), 1) for row in range(len(exploited))]
    return exploited ^ (torch.cat(draws) >= accuracy)


def teacher_rollout(exp: Experiment, problem: Problem, row: TeacherRow) -> Rollout:
    """A cached completion after the live prompt; off-policy, so without old log-probabilities."""
    ids = tuple(exp.chat.tokenizer(row.completion, add_special_tokens=False)["input_ids"])
    return Rollout(exp.prompts[problem.problem_id], (*ids, exp.chat.stop_id), row.completion, is_teacher=True)


def rollout_rows(step: int, data: Collected, group: int) -> list[dict[str, Any]]:
    """The student completions of a step as lines of rollouts.jsonl."""
    rows = []
    for i, (rollout, grade) in enumerate(zip(data.rollouts, data.grades, strict=True)):
        if grade is None:
            continue
        problem = data.problems[i // group]
        where = {"step": step, "p_idx": i // group, "gi": i % group, "problem_id": problem.problem_id}
        text = {"env_mode": problem.env_mode, "prompt": problem.messages[-1]["content"], "text": rollout.text}
        rows.append({**where, **text, **asdict(grade), "ablated": rollout.ablated})
    return rows
