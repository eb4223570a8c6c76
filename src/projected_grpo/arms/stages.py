"""What a stage of an arm is given and returns, and the stages that do nothing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from projected_grpo.arm_settings import ArmSettings
from projected_grpo.arms.gate import Anchors, Draws, GateState, Kind
from projected_grpo.problems import Problem
from projected_grpo.proj import HackBasis, mean_hackward_share, null_share, routed_share

S = TypeVar("S", bound=ArmSettings)  # the settings of the arm whose stage it is


class LabelLeak(RuntimeError):
    """An arm was handed labels that it does not declare."""


@dataclass(frozen=True)
class Evidence:
    """Labels of a step's rollouts; None for the kinds that are not handed over.

    `is_teacher` does not count as a label."""

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
class RewardInput(Generic[S]):
    """What shaping may look at: rewards as the flawed grader pays them, labels, scores now and before."""

    rewards: Float[Tensor, "P G"]
    evidence: Evidence
    settings: S
    scores: Float[Tensor, " n"] | None = None
    past: Float[Tensor, " b"] | None = None


@dataclass(frozen=True)
class Shaped:
    """Rewards to train on; rows not kept have advantage 0 and no part in their group's statistics."""

    rewards: Float[Tensor, "P G"]
    keep: Bool[Tensor, "P G"]
    z: Float[Tensor, " n"] | None = None  # advmod's standardised scores


@dataclass(frozen=True)
class DeployInput(Generic[S]):
    """What deployment may look at: delta_s as trained, the basis, and what the controls draw."""

    delta_s: Mapping[str, Float[Tensor, " r"]]
    basis: HackBasis
    settings: S
    frames: Mapping[str, Float[Tensor, "r r"]]


def as_it_is(problem: Problem, settings: ArmSettings) -> Problem:
    """Training prompts are the evaluation's."""
    return problem


def as_paid(x: RewardInput) -> Shaped:
    """Rewards as the flawed grader pays them."""
    return Shaped(x.rewards, torch.ones_like(x.rewards, dtype=torch.bool))


def nothing(x: DeployInput) -> dict[str, Tensor]:
    """Deployment deletes the quarantine and leaves delta_s as trained."""
    return {}


def reads_nothing(settings: ArmSettings) -> frozenset[Kind]:
    """No label of any rollout."""
    return frozenset()


@dataclass(frozen=True)
class Update:
    """What an arm decided: gradients of delta_s and quarantine, the next gate state, figures for the log."""

    keep: Mapping[str, Float[Tensor, " r"]]
    routed: Mapping[str, Float[Tensor, " q"]]
    gate: GateState | None
    stats: Mapping[str, float | None]
    shrink: Mapping[str, Float[Tensor, ""]] = field(
        default_factory=dict
    )  # share of the realised change to route


@dataclass(frozen=True)
class ArmInput(Generic[S]):
    """All that an arm may look at: per-rollout gradients, their sum, the basis, settings, route2's gate."""

    rows: Mapping[str, Float[Tensor, "n r"]]
    total: dict[str, Float[Tensor, " r"]]
    basis: HackBasis
    settings: S
    anchors: Anchors | None = None
    gate: GateState | None = None
    draws: Draws = Draws()
    scores: Float[Tensor, " n"] | None = None
    block: Mapping[str, Float[Tensor, "n p"]] = field(default_factory=dict)

    @property
    def quarantine_rows(self) -> Mapping[str, Float[Tensor, "n q"]]:
        """Rows of the quarantine: of its blocks, or of delta_hack, which are those of delta_s."""
        return self.block or self.rows


def measured(
    update: Update,
    rows: Mapping[str, Float[Tensor, "n r"]],
    total: Mapping[str, Float[Tensor, " r"]],
    basis: HackBasis,
    is_teacher: Bool[Tensor, " n"],
    split: bool,
) -> Update:
    """The update with the figures that every arm has; `split`: of student and teacher rows apart, too.

    A row is a rollout's gradient, or the sum over rollouts of one source.
    """
    stats = _cosine_stats(total, update.keep, basis)
    if split:
        by_source = {
            "cos_pre_s": {m: rows[m][~is_teacher].sum(0) for m in basis.V},
            "cos_pre_t": {m: rows[m][is_teacher].sum(0) for m in basis.V},
        }
        stats |= {name: mean_hackward_share(g, basis) for name, g in by_source.items()}
    stats |= {"q_egy": routed_share(update.keep, update.routed)}
    return replace(update, stats=stats | dict(update.stats))


def arm_none(x: ArmInput) -> Update:
    """none, and every arm that acts elsewhere: the gradient as it is."""
    return Update(keep=x.total, routed={}, gate=x.gate, stats={})


def _cosine_stats(
    total: Mapping[str, Tensor], keep: Mapping[str, Tensor], basis: HackBasis
) -> dict[str, float | None]:
    if not basis.V:
        return dict.fromkeys(("cos_pre", "cos_post", "cos_null", "fired"))
    fired = [(V @ total[m] > 0).float().mean() for m, V in basis.V.items()]
    return {
        "cos_pre": mean_hackward_share(total, basis),
        "cos_post": mean_hackward_share(keep, basis),
        "cos_null": fmean(null_share(V) for V in basis.V.values()),
        "fired": float(torch.stack(fired).mean()),
    }


@dataclass(frozen=True)
class Arm:
    """One arm: its labels and what it does at each stage."""

    reads: Callable[[Any], frozenset[Kind]] = reads_nothing
    prompt: Callable[[Problem, Any], Problem] = as_it_is
    reward: Callable[[RewardInput[Any]], Shaped] = as_paid
    gradient: Callable[[ArmInput[Any]], Update] = arm_none
    deploy: Callable[[DeployInput[Any]], dict[str, Tensor]] = nothing
    per_rollout: bool = False  # the gradient stage wants a row per rollout, not sums over those of one source


NO_DRAWS = Draws()
