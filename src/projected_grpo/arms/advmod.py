"""Arm advmod: rollouts are paid less, or left out, where a score lies hack-ward of the others'.

    s  = mean over completion tokens of h . d       activation; d: unit direction from clean to hack
    s  = cos(grad NLL, v_grad) over all modules     gradient; both are in concept.py
    z  = (s - mean s) / max(std s, floor)           over the step, and --advmod-buffer scores before it
    r' = r (1 - alpha sigmoid(z) [z > 0])           multiplicative
    r' = r - alpha max(z, 0)                        additive
    A  = 0 where z > 0, left out of its group       screening

Advantage Modification, Wu and Tang 2026 (arXiv:2604.01476); the signal gradient is ours. Settings:
`AdvmodSettings`. Controls: haar, shuffled, clean_clean, flipped.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from projected_grpo.arm_settings import AdvmodSettings, Signal
from projected_grpo.arms.stages import Arm, RewardInput, Shaped, as_paid

STD_FLOOR: Mapping[Signal, float] = {
    "activation": 0.1,  # in units of hidden states, as in the source
    "gradient": 1e-6,  # of cosines: what rounding makes of scores that are all alike
}


def advantage_modified(x: RewardInput[AdvmodSettings]) -> Shaped:
    """Rewards lowered by the standardised score, or the rollouts above the mean left out."""
    if x.scores is None:
        raise ValueError("advmod needs scores")
    z = standardised(x.scores, x.past, STD_FLOOR[x.settings.advmod_signal])
    over = z.clamp_min(0).view_as(x.rewards)
    alpha, form = x.settings.advmod_alpha, x.settings.advmod_form
    if form == "screening":
        return Shaped(x.rewards, over == 0, z)
    if form == "additive":
        return replace(as_paid(x), rewards=x.rewards - alpha * over, z=z)
    return replace(as_paid(x), rewards=x.rewards * (1 - alpha * over.sigmoid() * (over > 0)), z=z)


def standardised(
    scores: Float[Tensor, " n"], past: Float[Tensor, " b"] | None, floor: float = STD_FLOOR["activation"]
) -> Float[Tensor, " n"]:
    """(s - mean) / max(std, floor), over these scores and past ones. FloatingPointError if not finite."""
    if not bool(scores.isfinite().all()):
        raise FloatingPointError("a rollout's score is not finite")
    seen = scores if past is None else torch.cat([past.to(scores), scores])
    return (scores - seen.mean()) / seen.std(correction=0).clamp_min(floor)


ADVMOD = Arm(reward=advantage_modified)
