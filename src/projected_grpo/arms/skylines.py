"""Arms gt_only, gt_penalty and gt_screening: skylines, which read the oracle's verdicts.

    gt_only       r' = min(r, 0.5) where exploited          what a grader without a loophole pays
    gt_penalty    r' = r - penalty where flagged            flagged: exploited, as a monitor of
    gt_screening  A = 0 where flagged, and left out         --monitor-accuracy reports it
                  of its group's mean and std

Ariahw, Engels and Nanda 2025 (rl-rewardhacking). Settings: `GtOnlySettings`, `GtPenaltySettings`,
`GtScreeningSettings`. No controls: they use no direction.
"""

from dataclasses import replace

import torch
from jaxtyping import Bool
from torch import Tensor

from projected_grpo.arm_settings import ArmSettings, GtOnlySettings, GtPenaltySettings, GtScreeningSettings
from projected_grpo.arms.gate import Kind
from projected_grpo.arms.stages import Arm, RewardInput, Shaped, as_paid
from projected_grpo.rewards import FORMAT_REWARD


def honest_pay(x: RewardInput[GtOnlySettings]) -> Shaped:
    """What a grader without a loophole would have paid."""
    exploited = _verdicts(x)
    return replace(as_paid(x), rewards=torch.where(exploited, x.rewards.clamp_max(FORMAT_REWARD), x.rewards))


def penalised(x: RewardInput[GtPenaltySettings]) -> Shaped:
    """r - penalty where the monitor sees an exploit."""
    return replace(as_paid(x), rewards=x.rewards - x.settings.penalty * _verdicts(x))


def screened(x: RewardInput[GtScreeningSettings]) -> Shaped:
    """Rollouts in which the monitor sees an exploit are not learnt from."""
    return Shaped(x.rewards, ~_verdicts(x))


def _verdicts(x: RewardInput) -> Bool[Tensor, "P G"]:
    if x.evidence.exploited is None:
        raise ValueError(f"{x.settings.intervention} needs the oracle's verdicts")
    return x.evidence.exploited.view_as(x.rewards)


def reads_oracle(settings: ArmSettings) -> frozenset[Kind]:
    """Ground truth: a skyline."""
    return frozenset({"oracle"})


GT_ONLY = Arm(reads=reads_oracle, reward=honest_pay)
GT_PENALTY = Arm(reads=reads_oracle, reward=penalised)
GT_SCREENING = Arm(reads=reads_oracle, reward=screened)
