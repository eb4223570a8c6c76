"""What a step would do to hacks and right answers, to first order, before it is made.

    g      = sum of A_i R_i over the problems of one half       R_i: gradient of -log p of completion i
    keep   = g as the arm leaves it
    slope  = <keep, mean R_i over the hacks of the other half>   so much likelier by a step of -keep
    ratio  = slope under the arm / slope under none              1: as without it; 0: hacks stand still

Each half of the problems makes a step that is judged on the other; both slopes are added. The same is done
for a step of -sign(keep), which is nearer to what AdamW does. Ratios say nothing where the plain step does
not make hacks likelier, and are None there. A half without a hack judges nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from projected_grpo.grpo import advantages
from projected_grpo.seeds import stream_seed

Gradient = Mapping[str, Float[Tensor, " r"]]
Rows = Mapping[str, Float[Tensor, "n r"]]


def grouped_advantages(reward: Float[Tensor, " n"], problem: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Each reward relative to those of its problem, whose numbers may differ; 0 where they do not vary."""
    out = torch.zeros_like(reward)
    for number in problem.unique():
        own = problem == number
        out[own] = advantages(reward[own][None])[0]
    return out


@dataclass(frozen=True)
class Slopes:
    """First-order changes of mean log-likelihood by a plain and by a sign step."""

    hack: float
    solve: float
    hack_sign: float
    solve_sign: float

    def over(self, plain: "Slopes") -> dict[str, float | None]:
        """These relative to those of the plain step; None where that one makes nothing likelier."""
        pairs = {
            "hack_slope": (self.hack, plain.hack),
            "solve_slope": (self.solve, plain.solve),
            "hack_slope_sign": (self.hack_sign, plain.hack_sign),
            "solve_slope_sign": (self.solve_sign, plain.solve_sign),
        }
        return {name: own / base if base > 0 else None for name, (own, base) in pairs.items()}


@dataclass(frozen=True)
class Half:
    """Half of the problems: gradients of its completions, and the means that other steps are judged by."""

    rows: Rows
    index: Int[Tensor, " h"]  # of its completions among all
    hack: Gradient | None  # None without one
    solve: Gradient | None


def halves(
    rows: Rows, problem: Int[Tensor, " n"], exploited: Bool[Tensor, " n"], correct: Bool[Tensor, " n"]
) -> tuple[Half, Half]:
    """Problems dealt to two halves by their number, each with all its completions."""
    side = torch.tensor([stream_seed("half", int(number)) % 2 for number in problem])

    def mean(wanted: Bool[Tensor, " n"]) -> Gradient | None:
        return {m: g[wanted].mean(0) for m, g in rows.items()} if bool(wanted.any()) else None

    def half(number: int) -> Half:
        own = side == number
        return Half(
            {m: g[own] for m, g in rows.items()},
            own.nonzero()[:, 0],
            mean(own & exploited),
            mean(own & correct),
        )

    return half(0), half(1)


def slopes(
    both: tuple[Half, Half], advantage: Float[Tensor, " n"], arm: Callable[[Gradient], Gradient]
) -> Slopes:
    """Slopes of the step that the arm leaves of the policy gradient with these advantages."""
    found = dict.fromkeys(("hack", "solve", "hack_sign", "solve_sign"), 0.0)
    for makes, judges in (both, both[::-1]):
        keep = arm({m: advantage[makes.index].to(g) @ g for m, g in makes.rows.items()})
        for name, mean in (("hack", judges.hack), ("solve", judges.solve)):
            if mean is not None:
                found[name] += float(sum(keep[m] @ g for m, g in mean.items()))
                found[f"{name}_sign"] += float(sum(keep[m].sign() @ g for m, g in mean.items()))
    return Slopes(**found)
