"""Gate of route2: running means of its signal over labelled rollouts, and the threshold between them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from projected_grpo.proj import HackBasis, PairGrads, row_cosines

Kind = Literal["teacher", "detectors", "oracle"]
EMA = 0.9  # of the running means over anchors
SCORE = "score"  # the one entry of a gate whose signal is the same in all modules


@dataclass(frozen=True)
class Anchors:
    """What route2 may know of the rollouts: hack, clean, or neither; the sign of A; where labels are from."""

    hack: Bool[Tensor, " n"]
    clean: Bool[Tensor, " n"]
    advantage_sign: Float[Tensor, " n"]
    kinds: frozenset[Kind] = frozenset({"teacher"})

    def labels(self, is_teacher: Bool[Tensor, " n"]) -> set[Kind]:
        """The kinds of labels in it. Student rows that are told apart need a detector, or the oracle."""
        hack, clean = self.hack[~is_teacher], self.clean[~is_teacher]
        told = bool(hack.any()) or bool(clean.any()) and not bool(clean.all())
        return {*self.kinds, "detectors"} if told and "oracle" not in self.kinds else set(self.kinds)


@dataclass(frozen=True)
class GateState:
    """Running means over hack and clean anchors: of the cosine with v_grad per module, or of one score."""

    hack: Mapping[str, float]
    clean: Mapping[str, float]

    def tau(self, module: str) -> float:
        """Threshold of a module: the midpoint of both running means."""
        return (self.hack[module] + self.clean[module]) / 2

    def after(
        self, votes: Mapping[str, Float[Tensor, " n"]], hack: Bool[Tensor, " n"], clean: Bool[Tensor, " n"]
    ) -> "GateState":
        """Both means moved towards this step's votes (EMA 0.9); unchanged where nobody votes."""

        def moved(old: Mapping[str, float], voting: Bool[Tensor, " n"]) -> dict[str, float]:
            if not bool(voting.any()):
                return dict(old)
            means = torch.stack([v[voting].mean() for v in votes.values()]).tolist()
            return {m: EMA * old[m] + (1 - EMA) * mean for m, mean in zip(votes, means, strict=True)}

        return GateState(moved(self.hack, hack), moved(self.clean, clean))


@dataclass(frozen=True)
class Draws:
    """What the controls draw: a Haar-random orthonormal frame per module, and an order of the rollouts."""

    frames: Mapping[str, Float[Tensor, "r r"]] = field(default_factory=dict)
    order: Int[Tensor, " n"] | None = None


def update_gate(gate: GateState, cosines: Mapping[str, Float[Tensor, " n"]], anchors: Anchors) -> GateState:
    """The gate after this step's cosines.

    A row is the gradient of A * log-likelihood, so a hack with A < 0 points away from the hack: the sign of A
    is divided out, which makes every anchor vote for "making this rollout likelier". Rows with A = 0 carry no
    gradient and do not vote.
    """
    votes = {m: c * anchors.advantage_sign for m, c in cosines.items()}
    voting = anchors.advantage_sign != 0
    return gate.after(votes, anchors.hack & voting, anchors.clean & voting)


def initial_gate(basis: HackBasis, grads: PairGrads) -> GateState:
    """route2's running means before any rollout: the pairs' own cosines, so that tau exists at once."""
    return GateState(
        hack={m: float(row_cosines(grads.hack[m].to(v), v).mean()) for m, v in basis.v_grad.items()},
        clean={m: float(row_cosines(-grads.clean[m].to(v), v).mean()) for m, v in basis.v_grad.items()},
    )


def initial_score_gate(z: Float[Tensor, " n"]) -> GateState:
    """The same for a score, from the standardised scores of the pairs' hacks and cleans, in turn."""
    return GateState(hack={SCORE: float(z[0::2].mean())}, clean={SCORE: float(z[1::2].mean())})
