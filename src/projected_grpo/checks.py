"""Checks of a configuration that need no file and no model."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from projected_grpo.config import (
    MAX_SEQUENCE,
    ArmConfig,
    Control,
    Intervention,
    LossConfig,
    ModelConfig,
    TrainConfig,
    env_modes,
    has_block,
    taught_modes,
    teacher_rows,
)
from projected_grpo.errors import UserError


def validate(cfg: TrainConfig) -> None:
    """Refuse settings that cannot make a run. Raises UserError naming the option and what to change."""
    s, t, o, b = cfg.sampling, cfg.teacher, cfg.optim, cfg.basis
    env_modes(cfg.problems.env_mode)
    taught_modes(cfg)
    for option, value in _options(cfg).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{option} must be a finite number, got {value}")
    at_least_one = {
        "--steps": o.steps,
        "--prompts-per-step": s.prompts_per_step,
        "--max-new": s.max_new,
        "--n-problems": cfg.problems.n_problems,
        "--v-hack-k": b.v_hack_k,
        "--v-hack-extract-top-k": b.v_hack_extract_top_k,
        "--eval-n-prompts": cfg.evaluation.eval_n_prompts,
        "--tokens-per-microbatch": cfg.loss.tokens_per_microbatch,
        "--keep-states": cfg.run.keep_states,
        "--block-rank": cfg.arm.block_rank,
        "--max-skipped": cfg.run.max_skipped,
    }
    for option, count in at_least_one.items():
        if count < 1:
            raise UserError(f"{option} must be at least 1, got {count}")
    not_negative = {
        "--lr": o.lr,
        "--beta": cfg.loss.beta,
        "--clip": cfg.loss.clip,
        "--weight-decay": o.weight_decay,
        "--project-overshoot": cfg.arm.project_overshoot,
        "--vhack-refresh-every": b.vhack_refresh_every,
        "--eval-ablate-every": cfg.evaluation.eval_ablate_every,
        "--cos-pre-split-every": cfg.evaluation.cos_pre_split_every,
        "--teacher-off-step": t.teacher_off_step or 0,
        "--save-every": cfg.run.save_every,
        "--final-n-prompts": cfg.evaluation.final_n_prompts,
        "--top-k": s.top_k,
        "--rows-per-batch": s.rows_per_batch,
        "--workers": cfg.run.workers,
        "--threads": cfg.run.threads,
        "--ref-every": cfg.loss.ref_every,
        "--advmod-alpha": cfg.arm.advmod_alpha,
        "--advmod-buffer": cfg.arm.advmod_buffer,
        "--penalty": cfg.arm.penalty,
    }
    for option, amount in not_negative.items():
        if amount < 0:
            raise UserError(f"{option} must be >= 0, got {amount}")
    if s.group < 2:
        raise UserError(f"--group must be at least 2 (advantages are relative to the group), got {s.group}")
    if not 0 <= t.mix_ratio < 1:
        raise UserError(f"--mix-ratio must be in [0, 1): some rollouts must be live, got {t.mix_ratio}")
    if teacher_rows(cfg) >= s.group:
        raise UserError(
            f"--mix-ratio {t.mix_ratio} leaves no live rollout in a group of {s.group}; "
            "lower it or raise --group"
        )
    if s.temperature <= 0 or not 0 < s.top_p <= 1:
        raise UserError("--temperature must be > 0 and --top-p in (0, 1]")
    if not 0 <= s.rollout_ablate_frac <= 1:
        raise UserError(f"--rollout-ablate-frac must be in [0, 1], got {s.rollout_ablate_frac}")
    if not 0 <= b.v_hack_drop_bottom_frac < 1 or not 0 <= b.v_hack_tau_axis <= 1:
        raise UserError("--v-hack-drop-bottom-frac must be in [0, 1) and --v-hack-tau-axis in [0, 1]")
    if s.max_new >= MAX_SEQUENCE:
        raise UserError(f"--max-new must be below {MAX_SEQUENCE}, got {s.max_new}")
    if not (0 <= o.adam_beta1 < 1 and 0 <= o.adam_beta2 < 1 and 0 <= o.warmup_frac <= 1):
        raise UserError("--adam-beta1 and --adam-beta2 must be in [0, 1) and --warmup-frac in [0, 1]")
    if o.grad_clip <= 0 or cfg.loss.ratio_cap < 1 + cfg.loss.clip:
        raise UserError("--grad-clip must be > 0 and --ratio-cap at least 1 + --clip")
    if cfg.arm.route2_random_v_seed is not None and cfg.arm.intervention != "route2":
        raise UserError("--route2-random-v-seed needs --intervention=route2")
    _validate_importance(cfg)
    _validate_control(cfg.arm)
    _validate_arm_options(cfg.arm)
    if not re.fullmatch(r"[A-Za-z0-9_.+=-]*", cfg.run.out_tag):
        raise UserError(
            f"--out-tag {cfg.run.out_tag!r}: only letters, digits and _ . + = - fit a folder name"
        )
    if t.teacher_modes and t.teacher_pool_dir is None and cfg.preset != "smoke":
        raise UserError("--teacher-modes needs --teacher-pool-dir")


def validate_sampler(cfg: ModelConfig) -> None:
    """Refuse options of an engine without the engine, and a share of memory that is none."""
    if cfg.sampler != "vllm" and cfg.vllm_memory != ModelConfig().vllm_memory:
        raise UserError("--vllm-memory needs --sampler=vllm")
    if not 0 < cfg.vllm_memory < 1:
        raise UserError(f"--vllm-memory must be in (0, 1), got {cfg.vllm_memory}")


def _validate_importance(cfg: TrainConfig) -> None:
    validate_sampler(cfg.model)
    if cfg.model.sampler != "own" and cfg.loss.importance == "auto" and cfg.sampling.rollout_ablate_frac > 0:
        raise UserError(
            f"--rollout-ablate-frac under --sampler={cfg.model.sampler} needs --importance=clipped or "
            "truncated: the weight of ablated rollouts is also that of another policy"
        )


def resolved_loss(cfg: TrainConfig) -> LossConfig:
    """The loss of a run's rollouts: what `--importance=auto` means beside its sampler."""
    if cfg.loss.importance != "auto":
        return cfg.loss
    return dataclasses.replace(cfg.loss, importance="clipped" if cfg.model.sampler == "own" else "truncated")


CONTROLS_OF: Mapping[str, tuple[Control, ...]] = {
    "none": ("none",),
    "gt_only": ("none",),
    "gt_penalty": ("none",),
    "gt_screening": ("none",),
    "inoculation": ("none",),
    "advmod": ("none", "haar", "shuffled", "clean_clean", "flipped"),
    "posthoc": ("none", "haar", "haar_matched", "shuffled", "clean_clean", "flipped"),
    "erase": ("none", "haar", "haar_matched", "shuffled", "clean_clean", "flipped"),
    "route": ("none", "haar", "haar_matched", "shuffled", "clean_clean", "flipped", "shrink"),
    "route2": ("none", "haar", "shuffled", "clean_clean", "flipped", "random_routing", "shrink"),
    "absorb": ("none", "haar", "shuffled", "clean_clean"),
}


def _validate_control(arm: ArmConfig) -> None:
    """An arm takes the controls that mean something for it."""
    possible = CONTROLS_OF[arm.intervention]
    if arm.control not in possible:
        raise UserError(
            f"--control {arm.control} does nothing for --intervention={arm.intervention}; "
            f"it takes {', '.join(possible)}"
        )
    if arm.project != "gradient" and arm.intervention not in ("erase", "route"):
        raise UserError(f"--project {arm.project} needs --intervention=erase or route")
    if arm.project != "gradient" and arm.control in ("haar_matched", "shrink"):
        raise UserError(f"--control {arm.control} matches the gradient's energy; it needs --project gradient")
    if arm.control == "haar" and arm.route2_random_v_seed is not None:
        raise UserError("--control haar and --route2-random-v-seed are the same control; give one")
    if arm.intervention == "absorb" and arm.control != "none" and arm.block_init != "direction":
        raise UserError(
            f"--control {arm.control} does nothing for --intervention=absorb, which uses no direction but "
            "where --block-init=direction"
        )
    if arm.control == "shrink" and has_block(arm):
        raise UserError("--control shrink routes a share of the deployed diagonal; leave --quarantine out")


OPTIONS_OF: Mapping[str, tuple[Intervention, ...]] = {
    "quarantine": ("route2", "absorb"),
    "mask_flagged": ("route2",),
    "mask_unflagged": ("route2",),
    "advmod_form": ("advmod",),
    "advmod_alpha": ("advmod",),
    "advmod_depth": ("advmod",),
    "advmod_buffer": ("advmod",),
    "penalty": ("gt_penalty",),
    "monitor_accuracy": ("gt_penalty", "gt_screening"),
    "inoculation_prompt": ("inoculation",),
}


def _validate_arm_options(arm: ArmConfig) -> None:
    """Options that name one arm's stage are refused in the others, where they would silently do nothing."""
    defaults = ArmConfig()
    for name, arms in OPTIONS_OF.items():
        if arm.intervention not in arms and getattr(arm, name) != getattr(defaults, name):
            raise UserError(f"--{name.replace('_', '-')} needs --intervention={' or '.join(arms)}")
    for name in ("block_rank", "block_init"):
        if not has_block(arm) and getattr(arm, name) != getattr(defaults, name):
            raise UserError(f"--{name.replace('_', '-')} needs --quarantine=block or --intervention=absorb")
    if arm.mask_flagged == arm.mask_unflagged:
        raise UserError(
            f"--mask-flagged and --mask-unflagged are both {arm.mask_flagged}, so the gate decides nothing; "
            "--intervention=absorb has none"
        )
    if not 0 < arm.advmod_depth <= 1:
        raise UserError(f"--advmod-depth must be in (0, 1], got {arm.advmod_depth}")
    if not 0 <= arm.monitor_accuracy <= 1:
        raise UserError(f"--monitor-accuracy must be in [0, 1], got {arm.monitor_accuracy}")
    if not arm.inoculation_prompt.strip():
        raise UserError("--inoculation-prompt is empty; --intervention=none trains without one")


def _options(cfg: TrainConfig) -> dict[str, Any]:
    """Every option as it is typed, with its value."""
    groups = [getattr(cfg, f.name) for f in dataclasses.fields(cfg) if f.name != "preset"]
    return {"--" + name.replace("_", "-"): value for group in groups for name, value in vars(group).items()}
