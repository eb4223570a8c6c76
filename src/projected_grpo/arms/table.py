"""The arms, each seen whole: what it does to prompts, rewards, gradients and at deployment.

An arm is a record of four pure functions, one per stage of the data's way through a run, whose defaults do
nothing:

    prompt    training problem                      -> training problem        before the run
    reward    rewards [P, G], evidence, scores      -> shaped rewards, kept    between grading and advantages
    gradient  per-rollout gradients, basis, anchors -> Update                  between backward and AdamW
    deploy    delta_s, basis                                  -> what leaves it          at every deployment

With r a rollout's reward, z = (s - mean) / max(std, .1) of its score s, and V the hack basis (proj.py has the
equations of erase, route, route2 and absorb):

    gt_only       r' = min(r, 0.5) where exploited                                 what an honest grader pays
    gt_penalty    r' = r - penalty where flagged                                   flagged: exploited, as the
    gt_screening  A = 0 where flagged, and out of its group's mean and std         monitor tells it
    advmod        r' = r (1 - alpha sigmoid(z) [z > 0])  or  r - alpha max(z, 0)
    inoculation   trains behind a prompt that asks for the hack
    posthoc       deploys delta_s + V^T relu(-V delta_s)

An arm declares which labels of rollouts it reads. It is handed those and no others, and being handed more is
an error (`LabelLeak`). docs/arms.md has the sources and the test of each.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from projected_grpo.antipasto import block_name
from projected_grpo.arms.absorb import arm_absorb
from projected_grpo.arms.erase import arm_erase, arm_route, hackward_part
from projected_grpo.arms.gate import Anchors, Draws, GateState
from projected_grpo.arms.rivals import (
    advantage_modified,
    honest_pay,
    inoculated,
    penalised,
    reads_oracle,
    screened,
)
from projected_grpo.arms.route2 import arm_route2, reads_anchors
from projected_grpo.arms.stages import (
    NO_DRAWS,
    Arm,
    ArmInput,
    Kind,
    LabelLeak,
    RewardInput,
    Shaped,
    Update,
    measured,
)
from projected_grpo.config import ArmConfig, Intervention
from projected_grpo.proj import HackBasis

Labels = Literal["none", "teacher", "detectors", "oracle"]
ARMS: Mapping[Intervention, Arm] = {
    "none": Arm(),
    "gt_only": Arm(reads=reads_oracle, reward=honest_pay),
    "gt_penalty": Arm(reads=reads_oracle, reward=penalised),
    "gt_screening": Arm(reads=reads_oracle, reward=screened),
    "inoculation": Arm(prompt=inoculated),
    "advmod": Arm(reward=advantage_modified, scored=True),
    "posthoc": Arm(deploy=hackward_part),
    "erase": Arm(gradient=arm_erase),
    "route": Arm(gradient=arm_route),
    "route2": Arm(reads=reads_anchors, gradient=arm_route2, per_rollout=True),
    "absorb": Arm(gradient=arm_absorb),
}


def strongest_label(settings: ArmConfig) -> Labels:
    """What an arm declares, in one word. Detector D runs the canonical solution: an oracle."""
    reads = ARMS[settings.intervention].reads(settings)
    if "oracle" in reads or ("detectors" in reads and "D" in settings.half_a):
        return "oracle"
    return "detectors" if "detectors" in reads else "teacher" if "teacher" in reads else "none"


def shape(x: RewardInput) -> Shaped:
    """An arm's reward stage. Raises LabelLeak if the evidence holds more than the arm declares."""
    arm = ARMS[x.settings.intervention]
    _refuse(x.evidence.kinds() - arm.reads(x.settings), x.settings)
    return arm.reward(x)


def intervene(
    rows: Mapping[str, Float[Tensor, "n r"]],
    basis: HackBasis,
    settings: ArmConfig,
    is_teacher: Bool[Tensor, " n"],
    anchors: Anchors | None = None,
    gate: GateState | None = None,
    split: bool = True,
    draws: Draws = NO_DRAWS,
) -> Update:
    """An arm's gradient stage, and what it did in figures. Only route2 reads anchors and gate.

    A row is a rollout's gradient; for arms that are not `per_rollout`, it may be a sum over one source. Rows
    of blocks go by `block_name(module)`. Modules without a basis (all axes below the noise floor) pass
    unchanged, but for route2's known hacks, which go where flagged rollouts go in every module. Raises
    FloatingPointError on a gradient that is not finite, LabelLeak on anchors that the arm does not declare.
    """
    arm = ARMS[settings.intervention]
    if anchors is not None:
        of_students = bool((anchors.hack | anchors.clean)[~is_teacher].any())
        given: set[Kind] = {"teacher", "detectors"} if of_students else {"teacher"}
        _refuse(given - arm.reads(settings), settings)
    sums = {name: g.sum(0) for name, g in rows.items()}
    if not bool(torch.stack([g.isfinite().all() for g in sums.values()]).all()):
        raise FloatingPointError("an adapter gradient is not finite")
    block = {m: rows[block_name(m)] for m in rows if block_name(m) in rows}
    own = {m: rows[m] for m in block} or rows
    total = {m: sums[m] for m in own}
    update = arm.gradient(ArmInput(own, total, basis, settings, anchors, gate, draws, block))
    return measured(update, own, total, basis, is_teacher, split)


def _refuse(undeclared: set[Kind], settings: ArmConfig) -> None:
    if undeclared:
        raise LabelLeak(
            f"{settings.intervention} was handed labels it does not declare: {sorted(undeclared)}"
        )
