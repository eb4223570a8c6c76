"""The arms, each seen whole: what it does to prompts, rewards, gradients and at deployment.

An arm is a record of four pure functions, one per stage of the data's way through a run, whose defaults do
nothing:

    prompt    training problem                      -> training problem        before the run
    reward    rewards [P, G], evidence, scores      -> shaped rewards, kept    between grading and advantages
    gradient  per-rollout gradients, basis, anchors -> Update                  between backward and AdamW
    deploy    deployed knobs, basis                 -> what leaves them        at every deployment

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

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from projected_grpo.antipasto import block_name
from projected_grpo.config import ArmConfig, Intervention
from projected_grpo.problems import Problem
from projected_grpo.proj import (
    Anchors,
    ArmInput,
    Draws,
    GateState,
    HackBasis,
    Update,
    arm_absorb,
    arm_erase,
    arm_none,
    arm_route,
    arm_route2,
    measured,
    split_by_arm,
)
from projected_grpo.rewards import FORMAT_REWARD

Kind = Literal["teacher", "detectors", "oracle"]
Labels = Literal["none", "teacher", "detectors", "oracle"]
STD_FLOOR = 0.1  # of advmod's scores, as in its source


class LabelLeak(RuntimeError):
    """An arm was handed labels that it does not declare."""


@dataclass(frozen=True)
class Evidence:
    """Labels of a step's rollouts; None for the kinds that are not handed over. Authorship is no label."""

    is_teacher: Bool[Tensor, " n"]
    taught: Bool[Tensor, " n"] | None = None  # teacher rows that their pool labels as hacks
    detected: Bool[Tensor, " n"] | None = None  # student rows that a weak detector flags
    exploited: Bool[Tensor, " n"] | None = None  # paid without a right answer, as a monitor tells

    def kinds(self) -> set[Kind]:
        """What is in it."""
        given: dict[Kind, Tensor | None] = {
            "teacher": self.taught,
            "detectors": self.detected,
            "oracle": self.exploited,
        }
        return {kind for kind, labels in given.items() if labels is not None}


@dataclass(frozen=True)
class RewardInput:
    """What shaping may look at: rewards as the flawed grader pays them, labels, scores now and before."""

    rewards: Float[Tensor, "P G"]
    evidence: Evidence
    settings: ArmConfig
    scores: Float[Tensor, " n"] | None = None
    past: Float[Tensor, " b"] | None = None


@dataclass(frozen=True)
class Shaped:
    """Rewards to train on; rows not kept have advantage 0 and no part in their group's statistics."""

    rewards: Float[Tensor, "P G"]
    keep: Bool[Tensor, "P G"]
    z: Float[Tensor, " n"] | None = None  # advmod's standardised scores


@dataclass(frozen=True)
class DeployInput:
    """What deployment may look at: the knob to be deployed, the basis, and what the controls draw."""

    delta_s: Mapping[str, Float[Tensor, " r"]]
    basis: HackBasis
    settings: ArmConfig
    frames: Mapping[str, Float[Tensor, "r r"]]


def as_it_is(problem: Problem, settings: ArmConfig) -> Problem:
    """Training prompts are the evaluation's."""
    return problem


def inoculated(problem: Problem, settings: ArmConfig) -> Problem:
    """The training prompt with an instruction before its question."""
    return replace(problem, instruction=settings.inoculation_prompt.strip())


def as_paid(x: RewardInput) -> Shaped:
    """Rewards as the flawed grader pays them."""
    return Shaped(x.rewards, torch.ones_like(x.rewards, dtype=torch.bool))


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


def nothing(x: DeployInput) -> dict[str, Tensor]:
    """Deployment deletes the quarantine and leaves delta_s as trained."""
    return {}


def hackward_part(x: DeployInput) -> dict[str, Float[Tensor, " r"]]:
    """The part of delta_s that training put there in the direction of V, by --gate-mode and --control.

    V points along gradients whose *descent* makes hacks likelier, and a descent step moves delta_s by minus
    the gradient: the hack-ward part of delta_s is minus that of -delta_s.
    """
    settings = replace(x.settings, preserve_magnitude=False)
    return {
        m: -split_by_arm(-x.delta_s[m], V, settings, x.frames.get(m)).removed for m, V in x.basis.V.items()
    }


def reads_nothing(settings: ArmConfig) -> frozenset[Kind]:
    """No label of any rollout."""
    return frozenset()


def reads_oracle(settings: ArmConfig) -> frozenset[Kind]:
    """Ground truth: a skyline."""
    return frozenset({"oracle"})


def reads_anchors(settings: ArmConfig) -> frozenset[Kind]:
    """The teacher's stored labels, and weak detectors on student text unless they are switched off."""
    return frozenset({"teacher"} if settings.gate_anchor_teacher_only else {"teacher", "detectors"})


@dataclass(frozen=True)
class Arm:
    """One arm: its labels and what it does at each stage."""

    reads: Callable[[ArmConfig], frozenset[Kind]] = reads_nothing
    prompt: Callable[[Problem, ArmConfig], Problem] = as_it_is
    reward: Callable[[RewardInput], Shaped] = as_paid
    gradient: Callable[[ArmInput], Update] = arm_none
    deploy: Callable[[DeployInput], dict[str, Tensor]] = nothing
    scored: bool = False  # the reward stage wants each rollout's score by concept.py
    per_rollout: bool = False  # the gradient stage wants a row per rollout, not sums over those of one source


NO_DRAWS = Draws()
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
        raise FloatingPointError("a knob gradient is not finite")
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
