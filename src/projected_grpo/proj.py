"""The maths of the hack subspace: pure functions of gradients, no model, no optimiser, no I/O.

For one module of rank r, with g [r] the gradient of the loss and V [k, r] orthonormal rows, each oriented so
that a positive coefficient means "a descent step along this makes hacks likelier":

    c        = V g
    c_use    = relu(c)  one_sided  |  c  no_gate  |  2 c  reverse
    removed  = overshoot * V^T c_use                     in span(V)
    keep     = g - removed                               rescaled to |g| under preserve_magnitude (default)
    share    = |relu(V g)| / |g|                         the hack-ward share: cos_pre of g, cos_post of keep

For a direction drawn at random the root mean square of the share is sqrt(k / 2r), because half of the
coefficients are negative and relu drops them.

The basis of a module, from D [pairs, r], the gradient differences of its pairs (hack minus clean):

    V        = first k right singular vectors of D, each turned so that most pairs have c > 0
    v_grad   = mean(D) / |mean(D)|
    random   = k rows of a Haar-random orthonormal frame, the control

Below them: the cosines of route2's rows, overlaps of bases, the routed share of a step, and a check that rows
are orthonormal. What an arm does with keep and removed is on its page in arms/.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from projected_grpo.arm_settings import GateMode


@dataclass(frozen=True)
class HackBasis:
    """Directions per module. V rows are orthonormal and hack-ward; v_grad is the unit mean difference.

    v_grad has every module, V those with an axis above the noise floor.
    """

    V: Mapping[str, Float[Tensor, "k r"]]
    v_grad: Mapping[str, Float[Tensor, " _"]]  # of r, too; the first module here need not be that of V


@dataclass(frozen=True)
class Projection:
    """One module's split of a gradient: what is kept, and the component that was removed."""

    keep: Float[Tensor, " r"]
    removed: Float[Tensor, " r"]


def used_coefficients(c: Float[Tensor, " k"], gate_mode: GateMode) -> Float[Tensor, " k"]:
    """The part of the coefficients c = V g that is taken out."""
    if gate_mode == "one_sided":
        return c.relu()
    return c if gate_mode == "no_gate" else 2 * c


def hackward_share(g: Float[Tensor, " r"], V: Float[Tensor, "k r"]) -> Float[Tensor, ""]:
    """|relu(V g)| / |g|, the hack-ward share of a gradient, or of minus a parameter change. 0 for g = 0."""
    return (V @ g).relu().norm() / g.norm().clamp_min(torch.finfo(g.dtype).tiny)


def null_share(V: Float[Tensor, "k r"]) -> float:
    """Root mean square of `hackward_share` over random directions: sqrt(k / 2r)."""
    k, r = V.shape
    return math.sqrt(k / (2 * r))


def project_delta_S_grad(
    g: Float[Tensor, " r"],
    V: Float[Tensor, "k r"],
    *,
    gate_mode: GateMode = "one_sided",
    overshoot: float = 1.0,
    preserve_magnitude: bool = False,
) -> Projection:
    """Split one module's delta_s gradient by the hack subspace (equations at the top of this file).

    Without preserve_magnitude, keep + removed = g.
    """
    return split(g, overshoot * (used_coefficients(V @ g, gate_mode) @ V), preserve_magnitude)


def split(g: Float[Tensor, " r"], removed: Float[Tensor, " r"], preserve_magnitude: bool) -> Projection:
    """g without `removed`, rescaled to |g| if asked.

    When nearly all of g is removed there is nothing trustworthy left to scale up, so keep is not rescaled.
    """
    keep = g - removed
    if preserve_magnitude:
        scale = g.norm() / keep.norm().clamp_min(torch.finfo(g.dtype).tiny)
        keep = torch.where(keep.norm() > 1e-3 * g.norm(), keep * scale, keep)
    return Projection(keep, removed)


def row_cosines(rows: Float[Tensor, "n r"], v: Float[Tensor, " r"]) -> Float[Tensor, " n"]:
    """Cosine of each row with the unit vector v; 0 for a zero row."""
    return (rows @ v) / rows.norm(dim=1).clamp_min(torch.finfo(rows.dtype).tiny)


def pooled_cosines(
    rows: Mapping[str, Float[Tensor, "n _"]], v: Mapping[str, Float[Tensor, " _"]]
) -> Float[Tensor, " n"]:
    """Cosine of each row with v, both taken over all modules of v together; 0 for a zero row."""
    dots = torch.stack([rows[m] @ v[m] for m in v]).sum(0)
    norms = torch.stack([rows[m].norm(dim=1) for m in v]).norm(dim=0)
    length = torch.stack([u.norm() for u in v.values()]).norm()
    return dots / (norms * length).clamp_min(torch.finfo(norms.dtype).tiny)


def mean_hackward_share(g: Mapping[str, Tensor], basis: HackBasis) -> float | None:
    """Mean over modules of `hackward_share`; relu acts per module, before this mean. None if all g are 0."""
    shares = [hackward_share(g[m], V) for m, V in basis.V.items()]
    norms = [g[m].norm() for m in basis.V]
    if not shares:
        return None
    share, live = torch.stack(shares), torch.stack(norms) > 0
    return float(share[live].mean()) if bool(live.any()) else None


def routed_share(keep: Mapping[str, Tensor], routed: Mapping[str, Tensor]) -> float:
    """Norm of what is routed over the sum of both norms."""
    if not routed:
        return 0.0
    kept = torch.stack([g.norm() for g in keep.values()]).norm()
    sent = torch.stack([g.norm() for g in routed.values()]).norm()
    both = float(kept + sent)
    return float(sent) / both if both > 0 else 0.0


def svd_basis(
    D: Float[Tensor, "pairs r"], top_k: int, tau_axis: float = 0.0
) -> tuple[Float[Tensor, "k r"], Float[Tensor, " k"]]:
    """Right singular vectors of the pair differences and their singular values, largest first.

    Each row is turned so that most pairs have a positive coefficient (ties: the mean decides). Axes with
    S_i / S_0 < tau_axis, or at rounding level, are left out, so k can be smaller than top_k.
    """
    _, S, Vh = torch.linalg.svd(D, full_matrices=False)
    floor = max(tau_axis, max(D.shape) * torch.finfo(D.dtype).eps)  # as numpy's matrix_rank
    k = min(top_k, int((S >= S[0] * floor).sum())) if float(S[0]) > 0 else 0
    V, S = Vh[:k], S[:k]
    coefficients = D @ V.T
    votes = (coefficients > 0).sum(0) - (coefficients < 0).sum(0)
    lean = torch.where(votes == 0, coefficients.mean(0), votes.to(D.dtype))
    return V * torch.where(lean < 0, -1.0, 1.0)[:, None].to(D.dtype), S


def mean_difference(D: Float[Tensor, "pairs r"]) -> Float[Tensor, " r"]:
    """Unit mean of the pair differences (zero if they cancel)."""
    mean = D.mean(0)
    return mean / mean.norm().clamp_min(torch.finfo(D.dtype).tiny)


def haar_basis(
    k: int, r: int, generator: torch.Generator, device: torch.device | None = None
) -> Float[Tensor, "k r"]:
    """k orthonormal rows, uniform over the Stiefel manifold (QR with the signs of R fixed, Mezzadri 2007).

    Drawn on the CPU, as the generator is, and orthonormalised on `device`.
    """
    Q, R = torch.linalg.qr(torch.randn(r, k, generator=generator, dtype=torch.float64).to(device))
    return (Q * R.diagonal().sign()).T.to(torch.float32).contiguous()


def contrast_gradient(
    differences: Mapping[str, Float[Tensor, "pairs r"]],
) -> dict[str, Float[Tensor, " r"]]:
    """Gradient of the mean over pairs of log p(clean) - log p(hack), nats per token.

    `differences` are of a loss that is a mean over completions, of which a pair has two.
    """
    return {m: 2 * D.sum(0) for m, D in differences.items()}


def reached(gradient: Mapping[str, Float[Tensor, " r"]], size: float) -> float:
    """To first order, how far a function moves if every parameter goes `size` the way of its gradient.

    With the sum of all learning rates for `size`, what AdamW can reach at most: a step of it changes a
    parameter by about the learning rate, whatever the gradient's size.
    """
    return size * sum(float(g.abs().sum()) for g in gradient.values())


def basis_overlap(old: HackBasis, new: HackBasis) -> float | None:
    """Mean over shared modules of |V_old V_new^T|_F^2 / min(k): 1 same subspace, about k/r unrelated."""
    shared = [m for m in new.V if m in old.V]
    if not shared:
        return None
    shares = [(old.V[m] @ new.V[m].T).square().sum() / min(len(old.V[m]), len(new.V[m])) for m in shared]
    return float(torch.stack(shares).mean())


def assert_orthonormal(V: Float[Tensor, "k r"], module: str) -> None:
    """The projection formulas need orthonormal rows. Raises ValueError naming the module."""
    eye = torch.eye(len(V), dtype=V.dtype, device=V.device)
    error = float((V @ V.T - eye).abs().max()) if len(V) else 0.0
    if not error < 1e-4:
        raise ValueError(f"basis of {module} is not orthonormal (largest error {error:.1e})")


@dataclass(frozen=True)
class PairGrads:
    """Per module, each pair's loss gradients with advantage +1 on the hack and -1 on the clean completion."""

    hack: Mapping[str, Float[Tensor, "pairs r"]]
    clean: Mapping[str, Float[Tensor, "pairs r"]]

    def differences(self) -> dict[str, Float[Tensor, "pairs r"]]:
        """grad NLL(hack) - grad NLL(clean) per pair and module."""
        return {m: self.hack[m] + self.clean[m] for m in self.hack}
