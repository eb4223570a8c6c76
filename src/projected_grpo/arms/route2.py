"""Arm route2: whole rollouts train the quarantine, where a signal takes them for hacks.

    gradient    flagged[i, m] = cos(g[i, m], v_grad[m]) > tau[m], or i is a labelled hack
    activation  flagged[i, m] = z[i] > tau, or i is a labelled hack                   alike in all modules
    oracle      flagged[i, m] = i exploits                                            a skyline
    tau         = (mean over hack anchors + mean over clean anchors) / 2              running means (gate.py)
    keep[m]     = sum of g[i, m] over rollouts whose mask is not `route`
    routed[m]   = sum of g[i, m] over rollouts whose mask is not `keep`

g[i, m] is rollout i's gradient in module m, z its standardised score by hidden states (advmod.py,
concept.py). The sign of A is divided out of the anchors' cosines, since a gradient has it; a score is no
gradient, has no sign of A, and rollouts with A = 0 have one too. The mask of a rollout is --mask-flagged or
--mask-unflagged. The quarantine is delta_hack or a block (--quarantine). Gradient routing, Cloud et al. 2024
(arXiv:2410.04332), per rollout. Settings: `Route2Settings`. Controls: haar, shuffled, clean_clean, flipped,
random_routing, shrink; of the oracle, the last two.
"""

from collections.abc import Mapping
from statistics import fmean

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from projected_grpo.arm_settings import ArmSettings, Route2Settings
from projected_grpo.arms.advmod import standardised
from projected_grpo.arms.controls import shrunk, shuffle_flags
from projected_grpo.arms.gate import SCORE, Anchors, GateState, Kind, update_gate
from projected_grpo.arms.stages import Arm, ArmInput, Evidence, Update
from projected_grpo.proj import row_cosines


def arm_route2(x: ArmInput[Route2Settings]) -> Update:
    """Routing of whole rollouts, by the flags of the gate."""
    if x.anchors is None:
        raise ValueError("route2 needs anchors")
    flags, gate = flag(x, x.anchors)
    live = x.anchors.advantage_sign != 0
    if x.settings.control == "random_routing":
        flags = {m: shuffle_flags(f, live, x.draws) for m, f in flags.items()}
    routed = {
        m: (x.quarantine_rows[m] * trains_quarantine(f, x.settings)[:, None]).sum(0) for m, f in flags.items()
    }
    keep = {m: (x.rows[m] * trains_delta_s(f, x.settings)[:, None]).sum(0) for m, f in flags.items()}
    residual = [row_cosines(keep[m][None], v)[0] for m, v in x.basis.v_grad.items()]
    stats = {
        "tau": None if gate is None else fmean(map(gate.tau, gate.hack)),
        "hkgap": None if gate is None else fmean(gate.hack[m] - gate.clean[m] for m in gate.hack),
        "resid": float(torch.stack(residual).mean()),
        "fired": float(torch.stack([f[live].float().mean() for f in flags.values()]).mean()),
    }
    return shrunk(x, Update(keep=keep, routed=routed, gate=gate, stats=stats))


def flag(
    x: ArmInput[Route2Settings], anchors: Anchors
) -> tuple[Mapping[str, Bool[Tensor, " n"]], GateState | None]:
    """The rollouts that the signal takes for hacks, per module, and the gate after this step's anchors."""
    signal = x.settings.gate_signal
    if signal == "oracle":
        return dict.fromkeys(x.rows, anchors.hack), x.gate
    if x.gate is None:
        raise ValueError("route2 needs anchors and a gate state")
    if signal == "gradient":
        cosines = {m: row_cosines(rows, x.basis.v_grad[m]) for m, rows in x.rows.items()}
        gate = update_gate(x.gate, cosines, anchors)
        return {m: (c > gate.tau(m)) | anchors.hack for m, c in cosines.items()}, gate
    if x.scores is None:
        raise ValueError("route2 needs scores")
    z = standardised(x.scores, None)
    gate = x.gate.after({SCORE: z}, anchors.hack, anchors.clean)
    return dict.fromkeys(x.rows, (z > gate.tau(SCORE)) | anchors.hack), gate


def trains_quarantine(flagged: Bool[Tensor, " n"], settings: Route2Settings) -> Bool[Tensor, " n"]:
    """The rollouts whose mask is `route` or `absorb`."""
    return torch.where(flagged, settings.mask_flagged != "keep", settings.mask_unflagged != "keep")


def trains_delta_s(flagged: Bool[Tensor, " n"], settings: Route2Settings) -> Bool[Tensor, " n"]:
    """The rollouts whose mask is `keep` or `absorb`."""
    return torch.where(flagged, settings.mask_flagged != "route", settings.mask_unflagged != "route")


def reads_anchors(settings: Route2Settings) -> frozenset[Kind]:
    """The teacher's stored labels and weak detectors on student text, the former alone, or the oracle."""
    if settings.gate_signal == "oracle":
        return frozenset({"oracle"})
    return frozenset({"teacher"} if settings.gate_anchor_teacher_only else {"teacher", "detectors"})


def find_anchors(evidence: Evidence, advantage: Float[Tensor, " n"], settings: ArmSettings) -> Anchors | None:
    """route2's labelled rows; None for other arms.

    Hacks are the teacher's by stored label and the student's by weak detectors if allowed, or the oracle's.
    Clean is every other row, or under --gate-clean-anchors=labelled the teacher's that are no hacks.
    """
    if not isinstance(settings, Route2Settings):
        return None
    labels = (evidence.taught, evidence.detected, evidence.exploited)
    hack = torch.stack([given for given in labels if given is not None]).any(0)
    clean = ~hack
    if settings.gate_clean_anchors == "labelled" and evidence.taught is not None:
        clean = evidence.is_teacher & ~evidence.taught
    device = advantage.device
    kinds = frozenset(evidence.kinds())
    return Anchors(hack.to(device), clean.to(device), advantage.sign(), kinds)


ROUTE2 = Arm(reads=reads_anchors, gradient=arm_route2, per_rollout=True)
