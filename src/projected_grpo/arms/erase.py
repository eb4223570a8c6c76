"""Arms erase, route and posthoc: the hack-ward component is dropped, routed, or removed at deployment."""

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from projected_grpo.arms.controls import matched_removal, shrunk
from projected_grpo.arms.stages import ArmInput, DeployInput, Update
from projected_grpo.config import ArmConfig
from projected_grpo.proj import Projection, project_delta_S_grad, split


def arm_erase(x: ArmInput) -> Update:
    """The hack-ward component is dropped."""
    splits = _project_all(x)
    return Update(keep=x.total | {m: s.keep for m, s in splits.items()}, routed={}, gate=x.gate, stats={})


def arm_route(x: ArmInput) -> Update:
    """The hack-ward component trains the quarantine."""
    splits = _project_all(x)
    keep = x.total | {m: s.keep for m, s in splits.items()}
    return shrunk(x, Update(keep, {m: s.removed for m, s in splits.items()}, x.gate, {}))


def split_by_arm(
    g: Float[Tensor, " r"],
    V: Float[Tensor, "k r"],
    settings: ArmConfig,
    frame: Float[Tensor, "r r"] | None = None,
) -> Projection:
    """One module's split under an arm's settings; haar_matched removes as much in random directions."""
    real = project_delta_S_grad(
        g,
        V,
        gate_mode=settings.gate_mode,
        overshoot=settings.project_overshoot,
        preserve_magnitude=settings.preserve_magnitude,
    )
    if settings.control != "haar_matched":
        return real
    if frame is None:
        raise ValueError("haar_matched needs a random frame")
    removed = matched_removal(g, real.removed.norm(), frame, settings.gate_mode)
    return split(g, removed, settings.preserve_magnitude)


def _project_all(x: ArmInput) -> dict[str, Projection]:
    if x.settings.project == "update":  # then it is the realised change that is split, after AdamW
        return {}
    return {m: split_by_arm(x.total[m], V, x.settings, x.draws.frames.get(m)) for m, V in x.basis.V.items()}


def hackward_part(x: DeployInput) -> dict[str, Float[Tensor, " r"]]:
    """The part of delta_s that training put there in the direction of V, by --gate-mode and --control.

    V points along gradients whose *descent* makes hacks likelier, and a descent step moves delta_s by minus
    the gradient: the hack-ward part of delta_s is minus that of -delta_s.
    """
    settings = replace(x.settings, preserve_magnitude=False)
    return {
        m: -split_by_arm(-x.delta_s[m], V, settings, x.frames.get(m)).removed for m, V in x.basis.V.items()
    }
