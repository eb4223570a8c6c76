"""Controls: what stands in for the direction, so that a claim about it can fail.

haar, shuffled, clean_clean and flipped replace the basis where it is loaded and refreshed; haar_matched,
random_routing and shrink replace what the arm removes or routes. Draws depend on the seed alone. The logged
shares (cos_pre and so on) are of the basis in use.
"""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from projected_grpo.antipasto import Policy
from projected_grpo.arm_settings import GateMode
from projected_grpo.arms.gate import Draws
from projected_grpo.arms.stages import ArmInput, Update
from projected_grpo.proj import HackBasis, PairGrads, haar_basis, used_coefficients
from projected_grpo.seeds import stream_seed


def matched_removal(
    g: Float[Tensor, " r"],
    size: Float[Tensor, ""],
    frame: Float[Tensor, "r r"],
    gate_mode: GateMode,
) -> Float[Tensor, " r"]:
    """A component of g of norm `size` in a random subspace: the frame's first axes, as many as it takes.

    The control for "it merely removes more gradient". The last axis is taken in part, to meet the norm;
    where the whole frame has less to give, all of it is taken and scaled up.
    """
    used = used_coefficients(frame @ g, gate_mode)
    energy = used.square()
    before = energy.cumsum(0) - energy
    share = ((size.square() - before) / energy.clamp_min(torch.finfo(g.dtype).tiny)).clamp(0, 1)
    removed = (used * share.sqrt()) @ frame
    norm = removed.norm()
    return torch.where(norm > 0, removed * (size / norm), torch.zeros_like(g))  # the frame may have none


def shrunk(x: ArmInput, update: Update) -> Update:
    """Under the control `shrink`: the gradient of none, and the share of each change to route instead.

    AdamW ignores the scale of a gradient, so a gradient that is shrunk would shrink nothing.
    """
    if x.settings.control != "shrink":
        return update
    share = {
        m: routed.norm() / (routed.norm() + update.keep[m].norm()).clamp_min(torch.finfo(routed.dtype).tiny)
        for m, routed in update.routed.items()
    }
    return replace(update, keep=x.total, routed={}, shrink=share)


def shuffle_flags(flags: Bool[Tensor, " n"], live: Bool[Tensor, " n"], draws: Draws) -> Bool[Tensor, " n"]:
    """As many flags among the rows that carry gradient, in the step's random order, alike in all modules."""
    if draws.order is None:
        raise ValueError("random_routing needs an order of the rollouts")
    candidates = draws.order[live[draws.order]]
    dealt = torch.zeros_like(flags)
    dealt[candidates[: int((flags & live).sum())]] = True
    return dealt


def relabelled(grads: PairGrads, control: str, seed: int) -> PairGrads:
    """Pair gradients without the contrast: differences of completions of one kind, either way round.

    `clean_clean` sets every clean completion against another; `shuffled` does so with half of the pairs and
    sets hacks against hacks in the rest. (Labels dealt out at random would not do: differences that keep the
    contrast, with either sign, leave its axis on top of an uncentred SVD.)
    A clean row is a gradient at advantage -1, so one that stands for a hack changes sign.
    """
    n = len(next(iter(grads.hack.values())))
    generator = torch.Generator().manual_seed(stream_seed(seed, control))
    device = next(iter(grads.hack.values())).device
    order = torch.randperm(n, generator=generator).to(device)
    partner = order[(order.argsort() + 1) % n]  # a single cycle, so that nothing meets itself
    side = torch.where(torch.rand(n, 1, generator=generator) < 0.5, -1.0, 1.0)
    side[0] = -side[1]  # all alike, the differences around the cycle would cancel
    hacked = torch.randperm(n, generator=generator)[:, None] < (n // 2 if control == "shuffled" else 0)
    hacks = hacked.to(device)

    def likelier(m: str) -> Float[Tensor, "n r"]:
        return side.to(grads.hack[m]) * torch.where(hacks, grads.hack[m], -grads.clean[m])

    def rival(m: str) -> Float[Tensor, "n r"]:
        own = torch.where(hacks, -grads.hack[m][partner], grads.clean[m][partner])
        return side.to(grads.hack[m]) * own

    return PairGrads({m: likelier(m) for m in grads.hack}, {m: rival(m) for m in grads.hack})


def haar_like(basis: HackBasis, k: int, seed: int) -> HackBasis:
    """Random orthonormal rows of the same shapes, and random unit vectors, the same for the same seed.

    Rows are the first of k, so that a module whose noise floor moves keeps its directions.
    """

    def rows(m: str, V: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(stream_seed(seed, "haar-basis", m))
        return haar_basis(k, V.shape[1], generator)[: len(V)].to(V).contiguous()

    return with_random_v(HackBasis({m: rows(m, V) for m, V in basis.V.items()}, basis.v_grad), seed)


def random_frames(policy: Policy, seed: int) -> dict[str, Float[Tensor, "r r"]]:
    """A whole Haar-random frame per module, for `matched_removal`; the same for the same seed.

    Made on the policy's device: 180 of Qwen3-4B's modules have one of 2560 x 2560. They take 5 GB there.
    """
    return {
        m: haar_basis(r, r, torch.Generator().manual_seed(stream_seed(seed, "frame", m)), policy.device)
        for m, r in policy.ranks.items()
    }


def flipped(basis: HackBasis) -> HackBasis:
    """Every direction reversed: what made hacks likelier now counts as what makes them less likely."""
    return HackBasis({m: -V for m, V in basis.V.items()}, {m: -v for m, v in basis.v_grad.items()})


def with_random_v(basis: HackBasis, seed: int) -> HackBasis:
    """The control of route2: Haar-random unit vectors in place of v_grad, the same for the same seed."""

    def unit(m: str, v: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(stream_seed(seed, "haar", m))
        return haar_basis(1, len(v), generator)[0].to(v)

    return HackBasis(basis.V, {m: unit(m, v) for m, v in basis.v_grad.items()})


def random_order(n: int, seed: int, step: int) -> Int[Tensor, " n"]:
    """A permutation of a step's rollouts, for the controls."""
    return torch.randperm(
        n, generator=torch.Generator().manual_seed(stream_seed(seed, "order-of-rows", step))
    )
