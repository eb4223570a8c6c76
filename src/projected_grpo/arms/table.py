"""The arms. What one does stands on its page; this table collects them, and runs their stages.

An arm is a record of pure functions, one a stage of the data's way through a run, whose defaults do nothing:

    prompt    training problem                      -> training problem        before the run
    reward    rewards [P, G], evidence, scores      -> shaped rewards, kept    between grading and advantages
    gradient  per-rollout gradients, basis, anchors -> Update                  between backward and AdamW
    deploy    delta_s, basis                        -> what leaves delta_s     at every deployment

An arm declares which labels of rollouts it reads. It is given those and no others, and being given more is an
error (`LabelLeak`). docs/arms.md has the sources and the test of each.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from projected_grpo.antipasto import block_name
from projected_grpo.arm_settings import ArmSettings, read_arm
from projected_grpo.arms.absorb import ABSORB
from projected_grpo.arms.advmod import ADVMOD
from projected_grpo.arms.erase import ERASE, ROUTE
from projected_grpo.arms.gate import Anchors, Draws, GateState, Kind
from projected_grpo.arms.inoculation import INOCULATION
from projected_grpo.arms.posthoc import POSTHOC
from projected_grpo.arms.route2 import ROUTE2
from projected_grpo.arms.skylines import GT_ONLY, GT_PENALTY, GT_SCREENING
from projected_grpo.arms.stages import (
    NO_DRAWS,
    Arm,
    ArmInput,
    LabelLeak,
    RewardInput,
    Shaped,
    Update,
    measured,
)
from projected_grpo.errors import UserError
from projected_grpo.proj import HackBasis

Labels = Literal["none", "teacher", "detectors", "oracle"]
ARMS: Mapping[str, Arm] = {
    "none": Arm(),
    "gt_only": GT_ONLY,
    "gt_penalty": GT_PENALTY,
    "gt_screening": GT_SCREENING,
    "inoculation": INOCULATION,
    "advmod": ADVMOD,
    "posthoc": POSTHOC,
    "erase": ERASE,
    "route": ROUTE,
    "route2": ROUTE2,
    "absorb": ABSORB,
}


def arm_of(settings: ArmSettings) -> Arm:
    """The record of an arm, of the table or of the user's file. Raises UserError if the file has none."""
    if settings.arm_file is None:
        return ARMS[settings.intervention]
    arm = read_arm(settings.arm_file).arm
    if not isinstance(arm, Arm):
        raise UserError(
            f"{settings.arm_file}: ARM must be an Arm (arms/stages.py), not of type {type(arm).__name__}"
        )
    return arm


def strongest_label(settings: ArmSettings) -> Labels:
    """What an arm declares, in one word. Detector D runs the canonical solution: an oracle."""
    reads = arm_of(settings).reads(settings)
    if "oracle" in reads or ("detectors" in reads and "D" in settings.half_a):
        return "oracle"
    return "detectors" if "detectors" in reads else "teacher" if "teacher" in reads else "none"


def shape(x: RewardInput) -> Shaped:
    """An arm's reward stage. Raises LabelLeak if the evidence holds more than the arm declares."""
    arm = arm_of(x.settings)
    _refuse(x.evidence.kinds() - arm.reads(x.settings), x.settings)
    return arm.reward(x)


def intervene(
    rows: Mapping[str, Float[Tensor, "n r"]],
    basis: HackBasis,
    settings: ArmSettings,
    is_teacher: Bool[Tensor, " n"],
    anchors: Anchors | None = None,
    gate: GateState | None = None,
    split: bool = True,
    draws: Draws = NO_DRAWS,
    scores: Float[Tensor, " n"] | None = None,
) -> Update:
    """An arm's gradient stage, and what it did in figures. Only route2 reads anchors, gate and scores.

    A row is a rollout's gradient; for arms that are not `per_rollout`, it may be a sum over one source. Rows
    of blocks go by `block_name(module)`. Where all axes of a module are below the noise floor, erase and
    route leave it as it is; route2 needs none. Raises FloatingPointError on a gradient that is not finite,
    LabelLeak on anchors that the arm does not declare.
    """
    arm = arm_of(settings)
    if anchors is not None:
        _refuse(anchors.labels(is_teacher) - arm.reads(settings), settings)
    sums = {name: g.sum(0) for name, g in rows.items()}
    if not bool(torch.stack([g.isfinite().all() for g in sums.values()]).all()):
        raise FloatingPointError("an adapter gradient is not finite")
    block = {m: rows[block_name(m)] for m in rows if block_name(m) in rows}
    own = {m: rows[m] for m in block} or rows
    total = {m: sums[m] for m in own}
    update = arm.gradient(ArmInput(own, total, basis, settings, anchors, gate, draws, scores, block))
    return measured(update, own, total, basis, is_teacher, split)


def _refuse(undeclared: set[Kind], settings: ArmSettings) -> None:
    if undeclared:
        raise LabelLeak(
            f"{settings.intervention} was handed labels it does not declare: {sorted(undeclared)}"
        )
