"""Arm route2: whole rollouts train the quarantine, module by module, by a threshold on a cosine.

    c[i, m]       = cos(g[i, m], v_grad[m])               g[i, m]: rollout i's gradient in module m
    flagged[i, m] = c[i, m] > tau[m], or i is a labelled hack
    tau[m]        = (mean c over hack anchors + mean c over clean anchors) / 2     running means (gate.py)
    keep[m]       = sum of g[i, m] over rollouts whose mask is not `route`
    routed[m]     = sum of g[i, m] over rollouts whose mask is not `keep`

The mask of a rollout is --mask-flagged or --mask-unflagged. The quarantine is delta_hack or a block
(--quarantine). Gradient routing, Cloud et al. 2024 (arXiv:2410.04332), per rollout.
Settings: `Route2Settings`. Controls: haar, shuffled, clean_clean, flipped, random_routing, shrink.
"""

from statistics import fmean

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from projected_grpo.arm_settings import Route2Settings
from projected_grpo.arms.controls import shrunk, shuffle_flags
from projected_grpo.arms.gate import Anchors, update_gate
from projected_grpo.arms.stages import Arm, ArmInput, Evidence, Kind, Update
from projected_grpo.proj import row_cosines


def arm_route2(x: ArmInput[Route2Settings]) -> Update:
    """Routing of whole rollouts, module by module, by a threshold calibrated on anchors."""
    if x.anchors is None or x.gate is None:
        raise ValueError("route2 needs anchors and a gate state")
    cosines = {m: row_cosines(x.rows[m], v) for m, v in x.basis.v_grad.items()}
    gate = update_gate(x.gate, cosines, x.anchors)
    flagged = {m: (c > gate.tau(m)) | x.anchors.hack for m, c in cosines.items()}
    flags = {m: flagged.get(m, x.anchors.hack) for m in x.rows}  # forcing needs no direction
    live = x.anchors.advantage_sign != 0
    if x.settings.control == "random_routing":
        flags = {m: shuffle_flags(f, live, x.draws) for m, f in flags.items()}
    routed = {
        m: (x.quarantine_rows[m] * trains_quarantine(f, x.settings)[:, None]).sum(0) for m, f in flags.items()
    }
    keep = {m: (x.rows[m] * trains_delta_s(f, x.settings)[:, None]).sum(0) for m, f in flags.items()}
    residual = [row_cosines(keep[m][None], v)[0] for m, v in x.basis.v_grad.items()]
    stats = {
        "tau": fmean(gate.tau(m) for m in flagged),
        "hkgap": fmean(gate.hack[m] - gate.clean[m] for m in flagged),
        "resid": float(torch.stack(residual).mean()),
        "fired": float(torch.stack([f[live].float().mean() for f in flagged.values()]).mean()),
    }
    return shrunk(x, Update(keep=keep, routed=routed, gate=gate, stats=stats))


def trains_quarantine(flagged: Bool[Tensor, " n"], settings: Route2Settings) -> Bool[Tensor, " n"]:
    """The rollouts whose mask is `route` or `absorb`."""
    return torch.where(flagged, settings.mask_flagged != "keep", settings.mask_unflagged != "keep")


def trains_delta_s(flagged: Bool[Tensor, " n"], settings: Route2Settings) -> Bool[Tensor, " n"]:
    """The rollouts whose mask is `keep` or `absorb`."""
    return torch.where(flagged, settings.mask_flagged != "route", settings.mask_unflagged != "route")


def reads_anchors(settings: Route2Settings) -> frozenset[Kind]:
    """The teacher's stored labels, and weak detectors on student text unless they are switched off."""
    return frozenset({"teacher"} if settings.gate_anchor_teacher_only else {"teacher", "detectors"})


def find_anchors(evidence: Evidence, advantage: Float[Tensor, " n"]) -> Anchors | None:
    """route2's labelled rows: the teacher's by stored label, the student's by weak detectors if allowed."""
    if evidence.taught is None:
        return None
    hacks = evidence.taught if evidence.detected is None else evidence.taught | evidence.detected
    return Anchors(
        hack=hacks.to(advantage.device),
        clean=(evidence.is_teacher & ~evidence.taught).to(advantage.device),
        advantage_sign=advantage.sign(),
    )


ROUTE2 = Arm(reads=reads_anchors, gradient=arm_route2, per_rollout=True)
