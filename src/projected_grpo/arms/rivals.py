"""Arms that leave the gradient alone: they change rewards, prompts, or what is learnt from."""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from projected_grpo.arms.stages import Kind, RewardInput, Shaped, as_paid
from projected_grpo.config import ArmConfig
from projected_grpo.problems import Problem
from projected_grpo.rewards import FORMAT_REWARD

STD_FLOOR = 0.1  # of advmod's scores, as in its source


def inoculated(problem: Problem, settings: ArmConfig) -> Problem:
    """The training prompt with an instruction before its question."""
    return replace(problem, instruction=settings.inoculation_prompt.strip())


def honest_pay(x: RewardInput) -> Shaped:
    """What a grader without a loophole would have paid."""
    exploited = _verdicts(x)
    return replace(as_paid(x), rewards=torch.where(exploited, x.rewards.clamp_max(FORMAT_REWARD), x.rewards))


def penalised(x: RewardInput) -> Shaped:
    """r - penalty where the monitor sees an exploit."""
    return replace(as_paid(x), rewards=x.rewards - x.settings.penalty * _verdicts(x))


def screened(x: RewardInput) -> Shaped:
    """Rollouts in which the monitor sees an exploit are not learnt from."""
    return Shaped(x.rewards, ~_verdicts(x))


def _verdicts(x: RewardInput) -> Bool[Tensor, "P G"]:
    if x.evidence.exploited is None:
        raise ValueError(f"{x.settings.intervention} needs the oracle's verdicts")
    return x.evidence.exploited.view_as(x.rewards)


def advantage_modified(x: RewardInput) -> Shaped:
    """Rewards lowered where a rollout's hidden states lie hack-ward of the others'."""
    if x.scores is None:
        raise ValueError("advmod needs scores")
    z = standardised(x.scores, x.past)
    over = z.clamp_min(0).view_as(x.rewards)
    alpha = x.settings.advmod_alpha
    if x.settings.advmod_form == "additive":
        return replace(as_paid(x), rewards=x.rewards - alpha * over, z=z)
    return replace(as_paid(x), rewards=x.rewards * (1 - alpha * over.sigmoid() * (over > 0)), z=z)


def standardised(scores: Float[Tensor, " n"], past: Float[Tensor, " b"] | None) -> Float[Tensor, " n"]:
    """(s - mean) / max(std, .1), over these scores and past ones. FloatingPointError if one is not finite."""
    if not bool(scores.isfinite().all()):
        raise FloatingPointError("a concept score is not finite")
    seen = scores if past is None else torch.cat([past.to(scores), scores])
    return (scores - seen.mean()) / seen.std(correction=0).clamp_min(STD_FLOOR)


def reads_oracle(settings: ArmConfig) -> frozenset[Kind]:
    """Ground truth: a skyline."""
    return frozenset({"oracle"})
