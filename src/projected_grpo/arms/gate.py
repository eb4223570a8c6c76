"""Gate of route2: running mean cosines of labelled rollouts, and the threshold between them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from projected_grpo.proj import HackBasis, PairGrads, row_cosines

EMA = 0.9  # of route2's running anchor cosines


@dataclass(frozen=True)
class Anchors:
    """What route2 may know of the rollouts: labelled hack, labelled clean, or neither, and the sign of A."""

    hack: Bool[Tensor, " n"]
    clean: Bool[Tensor, " n"]
    advantage_sign: Float[Tensor, " n"]


@dataclass(frozen=True)
class GateState:
    """route2's running mean cosine with v_grad over hack and clean anchors, per module of the basis."""

    hack: Mapping[str, float]
    clean: Mapping[str, float]

    def tau(self, module: str) -> float:
        """Threshold of a module: the midpoint of both running means."""
        return (self.hack[module] + self.clean[module]) / 2

    def covering(self, modules: Sequence[str]) -> "GateState":
        """The state for these modules; one that was below the noise floor starts at the others' mean."""

        def fill(known: Mapping[str, float]) -> dict[str, float]:
            mean = fmean(known.values())
            return {m: known.get(m, mean) for m in modules}

        return GateState(fill(self.hack), fill(self.clean))


@dataclass(frozen=True)
class Draws:
    """What the controls draw: a Haar-random orthonormal frame per module, and an order of the rollouts."""

    frames: Mapping[str, Float[Tensor, "r r"]] = field(default_factory=dict)
    order: Int[Tensor, " n"] | None = None


def update_gate(gate: GateState, cosines: Mapping[str, Float[Tensor, " n"]], anchors: Anchors) -> GateState:
    """Move the running means towards this step's anchors (EMA 0.9); unchanged where a kind has no anchor.

    A row is the gradient of A * log-likelihood, so a hack with A < 0 points away from the hack: the sign of A
    is divided out, which makes every anchor vote for "making this rollout likelier". Rows with A = 0 carry no
    gradient and do not vote.
    """

    def moved(old: Mapping[str, float], mask: Bool[Tensor, " n"]) -> dict[str, float]:
        voting = mask & (anchors.advantage_sign != 0)
        if not bool(voting.any()):
            return dict(old)
        means = torch.stack([(c * anchors.advantage_sign)[voting].mean() for c in cosines.values()]).tolist()
        return {m: EMA * old[m] + (1 - EMA) * mean for m, mean in zip(cosines, means, strict=True)}

    return GateState(hack=moved(gate.hack, anchors.hack), clean=moved(gate.clean, anchors.clean))


def initial_gate(basis: HackBasis, grads: PairGrads) -> GateState:
    """route2's running means before any rollout: the pairs' own cosines, so that tau exists at once."""
    return GateState(
        hack={m: float(row_cosines(grads.hack[m].to(v), v).mean()) for m, v in basis.v_grad.items()},
        clean={m: float(row_cosines(-grads.clean[m].to(v), v).mean()) for m, v in basis.v_grad.items()},
    )
