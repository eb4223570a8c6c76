"""Arm posthoc: trains as none does, and deploys without the hack-ward part of what training added.

    leaves = -V^T relu(-V delta_s)   delta_s moves by minus the gradient, so its hack-ward part is minus
                                     that of -delta_s; it is moved to the quarantine, which is deleted

The directional ablation of weights of Arditi et al. 2024 (arXiv:2406.11717), here of delta_s alone. Settings:
`PosthocSettings`. Controls: haar, haar_matched, shuffled, clean_clean, flipped.
"""

from jaxtyping import Float
from torch import Tensor

from projected_grpo.arm_settings import PosthocSettings
from projected_grpo.arms.erase import split_by_arm
from projected_grpo.arms.stages import Arm, DeployInput


def hackward_part(x: DeployInput[PosthocSettings]) -> dict[str, Float[Tensor, " r"]]:
    """The part of delta_s that training put there in the direction of V, by --gate-mode and --control."""
    return {
        m: -split_by_arm(-x.delta_s[m], V, x.settings, x.frames.get(m)).removed for m, V in x.basis.V.items()
    }


POSTHOC = Arm(deploy=hackward_part)
