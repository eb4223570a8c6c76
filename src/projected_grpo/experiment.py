"""Everything of a run that does not change while it runs: files read, problems split, model wrapped."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from loguru import logger
from torch import nn
from transformers import PreTrainedTokenizerBase

from projected_grpo.arm_settings import ArmSettings
from projected_grpo.arms.table import arm_of
from projected_grpo.config import (
    EnvMode,
    TrainConfig,
    env_modes,
    left_out,
    taught_modes,
    teacher_rows,
)
from projected_grpo.engine.chat import Chat, open_chat, sampler_opener
from projected_grpo.engine.cost import Cost, cost_of, kind_of_device
from projected_grpo.engine.memory import names_its_sizes
from projected_grpo.engine.models import (
    check_there,
    encode_chat,
    load_model,
    outline,
    room_of,
    too_long,
    too_long_ones,
)
from projected_grpo.engine.placement import pick_dtype, refuse_cpu
from projected_grpo.errors import UserError
from projected_grpo.pairs import PairSet, chosen_pairs
from projected_grpo.pools import NO_TEACHER, Teacher, TeacherRow, bake, baked_completions, teacher_of
from projected_grpo.problems import EVAL_IN, Problem, assign_modes, digest, is_eval, read_problems, take
from projected_grpo.ranks import ALONE, Ranks
from projected_grpo.rewards import MODES, Grader, open_grader
from projected_grpo.sandbox.host import Limits

SPLIT_SEED = 0  # problems taken and held out are the same in all seeds of a comparison


@dataclass(frozen=True)
class Data:
    """Problems to train on and to evaluate on (disjoint by id), and the teacher's rows for the former.

    `held_out` while training, `final` at its end.
    """

    train: tuple[Problem, ...]
    held_out: tuple[Problem, ...]
    final: tuple[Problem, ...]
    teacher: Teacher


@dataclass(frozen=True)
class Experiment:
    """The fixed part of a run."""

    cfg: TrainConfig
    chat: Chat
    data: Data
    prompts: dict[str, tuple[int, ...]]  # token ids by problem id
    pairs: PairSet
    grader: Grader
    ranks: Ranks = ALONE


def read_data(cfg: TrainConfig, grader: Grader) -> Data:
    """Problems with modes and teacher rows, split. Raises UserError when a side of the split is empty."""
    problems = read_problems(cfg.problems)
    modes = env_modes(cfg.problems.env_mode)
    folder = cfg.teacher.teacher_pool_dir
    if folder is None and cfg.preset == "smoke" and teacher_rows(cfg) > 0:
        wanted = tuple(p for p in assign_modes(problems, modes, {}) if not is_eval(p))
        wanted = take(wanted, cfg.problems.n_problems, SPLIT_SEED)
        folder = bake_once(wanted, cfg.run.out_dir / "pools", grader) if wanted else None
    teacher = teacher_of(folder, problems, cfg.problems.problems) if folder else NO_TEACHER
    if folder and teacher_rows(cfg) == 0:
        logger.warning(
            "pool {}: only problems and modes are used; --mix-ratio {} of a group of {} is no teacher row",
            *(folder, cfg.teacher.mix_ratio, cfg.sampling.group),
        )
    problems = give_modes(problems, modes, teacher.partition)
    train = [p for p in problems if not is_eval(p)]
    held_out = [p for p in problems if is_eval(p)]
    if teacher.rows and not cfg.teacher.teacher_modes:
        train = [p for p in train if p.problem_id in teacher.rows]
    rows = {
        p.problem_id: teacher.rows[p.problem_id]
        for p in train
        if p.problem_id in teacher.rows and p.env_mode in taught_modes(cfg)
    }
    if cfg.teacher.teacher_modes and not rows:
        raise UserError(f"--teacher-modes {','.join(cfg.teacher.teacher_modes)}: no problem has such a mode")
    check_left_out(cfg, train, teacher)
    if not train or not held_out:
        side = "train on" if not train else "hold out for evaluation"
        more = "more problems, or a pool that covers more of them" if folder else "more problems"
        raise UserError(
            f"{cfg.problems.problems}: no problem left to {side} of {len(problems)}, of which about one in "
            f"{EVAL_IN} is held out, by the hash of its id; give {more}"
        )
    return Data(
        take(train, cfg.problems.n_problems, SPLIT_SEED),
        take(held_out, cfg.evaluation.eval_n_prompts, SPLIT_SEED),
        take(held_out, cfg.evaluation.final_n_prompts or cfg.evaluation.eval_n_prompts, SPLIT_SEED),
        replace(teacher, rows=rows),
    )


def give_modes(
    problems: Sequence[Problem], modes: Sequence[EnvMode], partition: Mapping[str, EnvMode]
) -> tuple[Problem, ...]:
    """A run's modes: a pool's partition where it lists a problem; the others share the modes asked for, or
    those of the partition where only one was."""
    listed = tuple(sorted(set(partition.values())))
    return assign_modes(problems, modes if len(modes) > 1 else listed or modes, partition)


def check_left_out(cfg: TrainConfig, train: Sequence[Problem], teacher: Teacher) -> None:
    """Refuse a --leave-out that leaves out nothing, or a pool that may teach what is left out."""
    hidden = left_out(cfg.basis)
    if hidden and "oracle" in arm_of(cfg.arm).reads(cfg.arm):
        raise UserError(
            f"--leave-out {','.join(hidden)}: {cfg.arm.intervention} reads the oracle, which knows every mode"
        )
    for mode in hidden:
        if train and all(p.env_mode != mode for p in train):
            raise UserError(
                f"--leave-out {mode}: no training problem has that mode; --env-mode gives problems theirs, "
                "and --teacher-modes lets problems train that the pool does not cover"
            )
    unnamed = len(teacher.rows.keys() - teacher.partition.keys()) if teacher_rows(cfg) else 0
    if hidden and unnamed and len({p.env_mode for p in train}) > 1:
        raise UserError(
            f"--leave-out {','.join(hidden)}: the pool does not say which mode {unnamed} of its prompts "
            "are hacked in; give it a partition.json, or train on one --env-mode"
        )


def prompted(data: Data, arm: ArmSettings) -> Data:
    """The arm's prompt stage: it changes what is trained on, never what is evaluated on."""
    return replace(data, train=tuple(arm_of(arm).prompt(p, arm) for p in data.train))


def bake_once(problems: Sequence[Problem], pools: Path, grader: Grader) -> Path:
    """A pool of canonical solutions and template hacks for these problems, made unless it is there."""
    folder = pools / baked_name(problems, grader.sandbox.limits)
    if not (folder / "partition.json").exists():
        counts, wrong = bake(problems, grader, folder)
        logger.info(
            "made a teacher pool from templates, {rows} rows ({hacked} hacked, {correct} correct): {folder}",
            **counts,
            folder=folder,
        )
        if wrong:
            name, what = wrong[0]
            logger.warning("{} problems teach less than they could, the first {}: {}", len(wrong), name, what)
    return folder


def baked_name(problems: Sequence[Problem], limits: Limits) -> str:
    """A baked pool's name: the hash of all that its rows and labels come from."""
    content = json.dumps([digest(problems), [baked_completions(p) for p in problems], asdict(limits)])
    return f"baked_{hashlib.blake2b(content.encode(), digest_size=6).hexdigest()}"


def fit_prompts(
    data: Data, tokenizer: PreTrainedTokenizerBase, room: int, max_new: int
) -> tuple[Data, dict[str, tuple[int, ...]]]:
    """Tokenise prompts; drop and count those that leave no room for max_new. Raises UserError if all do.

    `room`: tokens of prompt and completion that training and the model take.
    """
    everything = {p.problem_id: p for p in (*data.train, *data.held_out, *data.final)}
    prompts = {name: encode_chat(tokenizer, p.messages) for name, p in everything.items()}
    skipped = too_long_ones({name: len(ids) for name, ids in prompts.items()}, max_new, room)
    train, held_out, final = (
        tuple(p for p in problems if p.problem_id not in skipped)
        for problems in (data.train, data.held_out, data.final)
    )
    rows, dropped = fit_teacher(data.teacher.rows, tokenizer, prompts, room)
    if dropped:
        logger.warning("{} teacher rows skipped: with their prompt over {} tokens", dropped, room)
    for kept, all_of_them in ((train, data.train), (held_out, data.held_out), (final, data.final)):
        if not kept:
            raise too_long(min(len(prompts[p.problem_id]) for p in all_of_them), max_new, room)
    teacher = replace(data.teacher, rows=rows)
    return replace(data, train=train, held_out=held_out, final=final, teacher=teacher), prompts


def fit_teacher(
    rows: Mapping[str, Sequence[TeacherRow]],
    tokenizer: PreTrainedTokenizerBase,
    prompts: Mapping[str, tuple[int, ...]],
    room: int,
) -> tuple[dict[str, tuple[TeacherRow, ...]], int]:
    """Teacher rows that fit after their prompt with a stop token, and how many do not."""
    fitting = {
        name: tuple(
            row
            for row in group
            if len(prompts[name]) + len(tokenizer(row.completion, add_special_tokens=False)["input_ids"])
            < room
        )
        for name, group in rows.items()
        if name in prompts
    }
    return fitting, sum(len(rows[name]) - len(group) for name, group in fitting.items())


def prepare(cfg: TrainConfig, stack: ExitStack, ranks: Ranks = ALONE) -> Experiment:
    """Read everything, cheapest checks first: a bad input is reported before a model is loaded, a model that
    cannot take these prompts before its weights are decomposed."""
    if cfg.run.threads:
        torch.set_num_threads(cfg.run.threads)
    refuse_cpu(cfg.preset, cfg.model.device)
    check_there(cfg.model.model)  # before read_data, which may write a pool
    open_sampler = sampler_opener(cfg.model, ranks.size)
    pairs = chosen_pairs(cfg.basis)
    grader = open_grader(replace(cfg.run, workers=cfg.run.workers or ranks.cores), stack)
    data = prompted(read_data(cfg, grader), cfg.arm)
    model, tokenizer = load_model(cfg.model)
    data, prompts = fit_prompts(data, tokenizer, room_of(model), cfg.sampling.max_new)
    if cfg.sampling.prompts_per_step > len(data.train):
        raise UserError(
            f"--prompts-per-step {cfg.sampling.prompts_per_step} but only {len(data.train)} training problems"
        )
    longest = max(len(prompts[p.problem_id]) for p in data.train)
    if (cost := expected(model, cfg, longest, ranks.size)) is not None:
        logger.info("the run takes {}", cost.text())
    chat = open_chat(cfg.model, open_sampler, (model, tokenizer))
    logger.info(
        "{} problems to train on ({}), {} held out, teacher rows for {}",
        len(data.train),
        mode_counts(data.train),
        len({p.problem_id for p in (*data.held_out, *data.final)}),
        len(data.teacher.rows),
    )
    return Experiment(cfg, chat, data, prompts, pairs, grader, ranks)


def expected(
    model: nn.Module, cfg: TrainConfig, prompt_tokens: int, processes: int = 1, runs: Sequence[Path] = ()
) -> Cost | None:
    """What a run of this model takes, None if its settings do not name its sizes as Qwen3's do.

    Earlier runs lie in `runs` and in --out-dir.
    """
    if not names_its_sizes(model):
        return None
    sources = 2 if teacher_rows(cfg) else 1  # arms that sum have a row for each of a group
    each = cfg.sampling.group if arm_of(cfg.arm).per_rollout else sources
    return cost_of(
        model,
        cfg,
        prompt_tokens=prompt_tokens,
        rows_of_gradients=cfg.sampling.prompts_per_step * each,
        processes=processes,
        runs=(*runs, cfg.run.out_dir / "runs"),
    )


def expected_of(cfg: TrainConfig, runs: Sequence[Path] = ()) -> Cost | None:
    """The same before anything is loaded, with prompts as long as they may be; None for an unknown model."""
    model = outline(cfg.model.model, pick_dtype(cfg.model.dtype, torch.device(kind_of_device(cfg))))
    if model is None:
        return None
    return expected(model, cfg, max(1, room_of(model) - cfg.sampling.max_new), runs=runs)


def mode_counts(problems: Sequence[Problem]) -> str:
    counts: Counter[EnvMode] = Counter(p.env_mode for p in problems)
    return ", ".join(f"{mode} {counts[mode]}" for mode in MODES if counts[mode])
