"""Arm advmod: rewards are lowered where a rollout's hidden states lie hack-ward of the others'.

    s  = mean over completion tokens of h . d       d: unit direction from clean to hack (concept.py)
    z  = (s - mean s) / max(std s, .1)              over the step, and --advmod-buffer scores before it
    r' = r (1 - alpha sigmoid(z) [z > 0])           multiplicative
    r' = r - alpha max(z, 0)                        additive

Advantage Modification, Wu and Tang 2026 (arXiv:2604.01476). Settings: `AdvmodSettings`. Controls: haar,
shuffled, clean_clean, flipped.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from projected_grpo.arm_settings import AdvmodSettings
from projected_grpo.arms.stages import Arm, RewardInput, Shaped, as_paid

STD_FLOOR = 0.1  # of the scores, as in the source


def advantage_modified(x: RewardInput[AdvmodSettings]) -> Shaped:
    """Rewards lowered by the standardised score."""
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


ADVMOD = Arm(reward=advantage_modified, scored=True)
