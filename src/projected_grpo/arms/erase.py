"""Arms erase and route: the hack-ward part of the gradient is dropped, or trains the quarantine.

    c       = V g                    V [k, r] orthonormal; descent along a row makes hacks likelier
    removed = V^T relu(c)            one_sided; V^T c under no_gate, twice V^T relu(c) under reverse
    erase:  delta_s gets g - removed (rescaled to |g| under --preserve-magnitude)
    route:  the same, and delta_hack gets removed

Under --project=update the same split is made of the change that AdamW makes (step.py).
Settings: `EraseSettings`, `RouteSettings`. Controls: haar, haar_matched, shuffled, clean_clean, flipped, and
for route shrink.
"""

from jaxtyping import Float
from torch import Tensor

from projected_grpo.arm_settings import EraseSettings, RouteSettings, SplitSettings, StepSettings
from projected_grpo.arms.controls import matched_removal, shrunk
from projected_grpo.arms.stages import Arm, ArmInput, Update
from projected_grpo.proj import Projection, project_delta_S_grad, split


def arm_erase(x: ArmInput[EraseSettings]) -> Update:
    """The hack-ward part is dropped."""
    splits = _project_all(x)
    return Update(keep=x.total | {m: s.keep for m, s in splits.items()}, routed={}, gate=x.gate, stats={})


def arm_route(x: ArmInput[RouteSettings]) -> Update:
    """The hack-ward part trains the quarantine."""
    splits = _project_all(x)
    keep = x.total | {m: s.keep for m, s in splits.items()}
    return shrunk(x, Update(keep, {m: s.removed for m, s in splits.items()}, x.gate, {}))


def split_by_arm(
    g: Float[Tensor, " r"],
    V: Float[Tensor, "k r"],
    settings: SplitSettings,
    frame: Float[Tensor, "r r"] | None = None,
) -> Projection:
    """One module's split under an arm's settings; haar_matched removes as much in random directions."""
    preserve = isinstance(settings, StepSettings) and settings.preserve_magnitude
    mode, overshoot = settings.gate_mode, settings.project_overshoot
    real = project_delta_S_grad(g, V, gate_mode=mode, overshoot=overshoot, preserve_magnitude=preserve)
    if settings.control != "haar_matched":
        return real
    if frame is None:
        raise ValueError("haar_matched needs a random frame")
    return split(g, matched_removal(g, real.removed.norm(), frame, mode), preserve)


def _project_all(x: ArmInput) -> dict[str, Projection]:
    if x.settings.project == "update":  # then it is the realised change that is split, after AdamW
        return {}
    return {m: split_by_arm(x.total[m], V, x.settings, x.draws.frames.get(m)) for m, V in x.basis.V.items()}


ERASE = Arm(gradient=arm_erase)
ROUTE = Arm(gradient=arm_route)
