"""Checks of a configuration that need no file and no model."""

import dataclasses
import math
import re
from typing import Any

from projected_grpo.config import MAX_SEQUENCE, TrainConfig, env_modes, taught_modes, teacher_rows
from projected_grpo.errors import UserError

MOST_CLIP = 2.0  # PPO's clip lies below the truncation of weights at 3 (RATIO_CAP in grpo.py)
AT_LEAST_ONE = (
    *("--steps", "--prompts-per-step", "--max-new", "--n-problems", "--eval-n-prompts"),
    *("--v-hack-k", "--v-hack-extract-top-k", "--tokens-per-microbatch"),
)
NOT_NEGATIVE = (
    *("--lr", "--beta", "--clip", "--weight-decay", "--top-k", "--rows-per-batch", "--workers"),
    *("--vhack-refresh-every", "--eval-ablate-every", "--cos-pre-split-every", "--save-every"),
    *("--teacher-off-step", "--final-n-prompts"),
)


def validate(cfg: TrainConfig) -> None:
    """Refuse settings that cannot make a run. Raises UserError naming the option and what to change."""
    s, t, o, b = cfg.sampling, cfg.teacher, cfg.optim, cfg.basis
    env_modes(cfg.problems.env_mode)
    taught_modes(cfg)
    for option, value in _options(cfg).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{option} must be a finite number, got {value}")
        if option in AT_LEAST_ONE and value < 1:
            raise UserError(f"{option} must be at least 1, got {value}")
        if option in NOT_NEGATIVE and (value or 0) < 0:
            raise UserError(f"{option} must be >= 0, got {value}")
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
    if not 0 <= b.v_hack_drop_bottom_frac < 1 or not 0 <= b.v_hack_tau_axis <= 1:
        raise UserError("--v-hack-drop-bottom-frac must be in [0, 1) and --v-hack-tau-axis in [0, 1]")
    if s.max_new >= MAX_SEQUENCE:
        raise UserError(f"--max-new must be below {MAX_SEQUENCE}, got {s.max_new}")
    if not (0 <= o.adam_beta1 < 1 and 0 <= o.adam_beta2 < 1 and 0 <= o.warmup_frac <= 1):
        raise UserError("--adam-beta1 and --adam-beta2 must be in [0, 1) and --warmup-frac in [0, 1]")
    if o.grad_clip <= 0 or cfg.loss.clip > MOST_CLIP:
        raise UserError(f"--grad-clip must be > 0 and --clip at most {MOST_CLIP:g}: weights are truncated")
    if cfg.model.sampler != "own" and cfg.arm.ablated_share > 0:
        raise UserError(
            f"--rollout-ablate-frac needs --sampler=own: under {cfg.model.sampler} the weight of ablated "
            "rollouts would be that of another policy, too"
        )
    if cfg.run.keep_token_scores and cfg.arm.ablated_share > 0:
        raise UserError(
            "--keep-token-scores scores every rollout by one model: leave out --rollout-ablate-frac, or it"
        )
    cfg.arm.check()
    cfg.run.check()
    if not re.fullmatch(r"[A-Za-z0-9_.+=-]*", cfg.run.out_tag):
        raise UserError(
            f"--out-tag {cfg.run.out_tag!r}: only letters, digits and _ . + = - fit a folder name"
        )
    if t.teacher_modes and t.teacher_pool_dir is None and cfg.preset != "smoke":
        raise UserError("--teacher-modes needs --teacher-pool-dir")


def _options(cfg: TrainConfig) -> dict[str, Any]:
    groups = [getattr(cfg, f.name) for f in dataclasses.fields(cfg) if f.name != "preset"]
    return {"--" + name.replace("_", "-"): value for group in groups for name, value in vars(group).items()}
