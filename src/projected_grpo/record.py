"""The line that a step writes to steps.jsonl."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from projected_grpo.arms.stages import Shaped
from projected_grpo.collect import Collected
from projected_grpo.experiment import Experiment
from projected_grpo.grpo import RolloutGrads
from projected_grpo.rewards import MODES
from projected_grpo.rollout import Rollout
from projected_grpo.state import TrainState, learning_rate

REFERENCE_STEP = 256  # generations in one step of the reference system (16 prompts x 16)


def describe_shaping(data: Collected, shaped: Shaped) -> dict[str, Any]:
    """The parts of a step's line that are about rewards as the arm has them."""
    student, rewards = ~data.is_teacher, shaped.rewards.flatten()
    changed = (shaped.rewards != data.rewards) | ~shaped.keep
    groups = [row[kept] for row, kept in zip(shaped.rewards, shaped.keep, strict=True)]
    z = None if shaped.z is None else shaped.z[student]
    hacked = data.hacked[student]
    mixed = z is not None and bool(hacked.any()) and not bool(hacked.all())
    return {
        "rew": float(rewards.mean()),
        "rew_s": float(rewards[student].mean()) if bool(student.any()) else None,
        "rew_paid": float(data.rewards.mean()),
        "shaped": float(changed.float().mean()),
        "zgap": float(z[hacked].mean() - z[~hacked].mean()) if z is not None and mixed else None,
        "zerovar": sum(len(group) == 0 or bool(group.amax() == group.amin()) for group in groups),
    }


def describe_step(exp: Experiment, state: TrainState, data: Collected, grads: RolloutGrads) -> dict[str, Any]:
    """The parts of a step's line that are counts and means over its rollouts."""
    ablated = torch.tensor([r.ablated for r in data.rollouts])
    student, teacher = ~data.is_teacher, data.is_teacher
    modes = [p.env_mode for p in data.problems for _ in range(exp.cfg.sampling.group)]
    used = {p.env_mode for p in (*exp.data.train, *exp.data.held_out)}

    def pair(flags: Tensor, mask: Tensor) -> list[int] | None:
        return [int((flags & mask).sum()), int(mask.sum())] if bool(mask.any()) else None

    record: dict[str, Any] = {
        "step": state.step,
        "ref_eq": state.generations / REFERENCE_STEP,
        "N": len(data.rollouts),
        "gt_s": pair(data.correct, student),
        "gt_t": pair(data.correct, teacher),
        "hack_s": pair(data.hacked, student),
        "hack_t": pair(data.hacked, teacher),
        "hack_abl": pair(data.hacked, ablated),
        "solve_abl": pair(data.correct, ablated),
        "lp_s": mean_logp(data.rollouts),
        "lp_t": nan_mean(grads.logp[teacher]),
        "lp_ref": nan_mean(grads.ref_logp[student]),
        "kl": nan_mean(grads.kl[student]),
        "gap": nan_mean(grads.gap[student & ~ablated]),
        "lr": learning_rate(state.step, exp.cfg.optim),
        "gen": data.gen_s,
        "t_rew": data.grade_s,
        "peak_gb": peak_gb(exp.chat.policy.devices),
    }
    if len(used) > 1:
        for mode in (m for m in MODES if m != "gt_only"):  # which has no loophole to count
            here = torch.tensor([m == mode for m in modes])
            record[f"hk_{MODES[mode].code}"] = pair(data.hacked, student & here) if mode in used else None
    return record


def mean_logp(rollouts: Sequence[Rollout]) -> float | None:
    """Mean over student rollouts of the per-token log-probability at sampling."""
    means = [float(r.logp_old.mean()) for r in rollouts if r.logp_old is not None and len(r.logp_old)]
    return sum(means) / len(means) if means else None


def nan_mean(values: Float[Tensor, " n"]) -> float | None:
    """Mean of the measured values, None if there are none."""
    measured = values[~values.isnan()]
    return float(measured.mean()) if len(measured) else None


def peak_gb(devices: Sequence[torch.device]) -> float | None:
    """Peak GPU memory allocated so far, GB (1e9 bytes), of the fullest of these; None without a GPU."""
    gpus = [device for device in devices if device.type == "cuda"]
    return max((torch.cuda.max_memory_allocated(gpu) / 1e9 for gpu in gpus), default=None)
