"""A quarantine in parameters of its own: a low-rank change H of one Linear's weight, zero at the start.

    H = s (B A - B0 A0)       A = A0 + a [k, d_in],  B = B0 + b [d_out, k],  a = b = 0 at the start
      = s (b A + B0 a)        trained: a and b

So H is exactly zero at the start, weight decay pulls it back there, and deleting it is a = b = 0; yet
dH = s (B0 da + db A0) is not zero there, so the block learns from the first step. With x [t, d_in] and the
gradient g [t, d_out] of a rollout's tokens,

    d loss / da = s B^T g^T x        d loss / db = s g^T (x A^T)

Rows of A0 have norm sqrt(d_in), columns of B0 sqrt(d_out): entries of about 1, against which a learning rate
is small. AdamW steps by the sign of the gradient at first, so a step lowers the loss by lr |gradient|_1, and
a block would learn the faster the more parameters it has. With r = min(d_in, d_out),

    s = r / (k sqrt(2 d_in d_out (d_in + d_out)))

makes that as much as through delta_s, whatever k is, where the weight's gradient has no structure.

Source: low-rank adapters (Hu et al. 2021, arXiv:2106.09685) with their initial product taken off, as PiSSA
does (Meng et al. 2024, arXiv:2404.02948), which also seeds A0 and B0 with leading singular pairs.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from projected_grpo.proj import haar_basis


@dataclass(frozen=True)
class Start:
    """Where the halves of a block begin."""

    A: Float[Tensor, "k d_in"]
    B: Float[Tensor, "d_out k"]


class Block(nn.Module):
    """One Linear's block: its start, frozen, and the trainable displacements of both halves as one vector.

    The start is on `device`, the Linear's; what is trained on `home` (default: the same). Bound without its
    displacement, the policy is the deployed one. A rollout's row has k (d_in + d_out) values: 66 MB
    over all modules of Qwen3-4B at rank 8.
    """

    def __init__(
        self, start: Start, dtype: torch.dtype, device: torch.device, home: torch.device | None = None
    ) -> None:
        super().__init__()
        (k, d_in), d_out = start.A.shape, len(start.B)
        self.A0 = nn.Buffer(torch.empty(k, d_in, dtype=dtype, device=device), persistent=False)
        self.B0 = nn.Buffer(torch.empty(d_out, k, dtype=dtype, device=device), persistent=False)
        home = device if home is None else home
        self.moved = nn.Parameter(torch.empty(k * (d_in + d_out), dtype=dtype, device=home))
        self.scale = min(d_in, d_out) / (k * math.sqrt(2 * d_in * d_out * (d_in + d_out)))
        self.begin(start)

    def fits(self, start: Start) -> bool:
        """Whether this block can begin there."""
        return self.A0.shape == start.A.shape and self.B0.shape == start.B.shape

    @torch.no_grad()
    def begin(self, start: Start) -> None:
        """Begin there, nothing moved."""
        self.A0.copy_(start.A)
        self.B0.copy_(start.B)
        self.moved.zero_()

    def halves(
        self, moved: Float[Tensor, "*n p"]
    ) -> tuple[Float[Tensor, "*n k d_in"], Float[Tensor, "*n d_out k"]]:
        """a and b of a displacement, or of one per rollout; the start is not in them."""
        a, b = moved.to(self.A0.device).split([self.A0.numel(), self.B0.numel()], dim=-1)
        return a.unflatten(-1, self.A0.shape), b.unflatten(-1, self.B0.shape)

    def weight(self, moved: Float[Tensor, " p"]) -> Float[Tensor, "d_out d_in"]:
        """H."""
        a, b = self.halves(moved)
        return self.scale * (b @ (self.A0 + a) + self.B0 @ a)

    def effect(self, x: Float[Tensor, "*b d_in"], moved: Float[Tensor, "*n p"]) -> Float[Tensor, "*b d_out"]:
        """H x, in the dtype of x, without rounding a displacement against its start."""
        a, b = self.halves(moved.to(x.dtype))
        ax = x @ a.mT
        Ax = F.linear(x, self.A0.to(x.dtype)) + ax
        return self.scale * (Ax @ b.mT + F.linear(ax, self.B0.to(x.dtype)))

    def row_gradients(
        self, x: Float[Tensor, "n t d_in"], g: Float[Tensor, "n t d_out"], moved: Float[Tensor, " p"]
    ) -> Float[Tensor, "n p"]:
        """Each rollout's gradient of the displacement, from a Linear's input and its output's gradient."""
        a, b = self.halves(moved)
        grad_a = torch.einsum("ntk,nti->nki", g @ (self.B0 + b).to(g.dtype), x)
        grad_b = torch.einsum("nto,ntk->nok", g, F.linear(x, (self.A0 + a).to(x.dtype)))
        return self.scale * torch.cat([grad_a.flatten(1), grad_b.flatten(1)], dim=1).to(moved.dtype)


def random_start(d_out: int, d_in: int, k: int, generator: torch.Generator) -> Start:
    """Haar-random orthogonal halves."""
    return Start(
        A=math.sqrt(d_in) * haar_basis(k, d_in, generator),
        B=math.sqrt(d_out) * haar_basis(k, d_out, generator).T,
    )


def direction_start(
    U: Float[Tensor, "d_out r"], Vh: Float[Tensor, "r d_in"], V: Float[Tensor, "axes r"], k: int
) -> Start:
    """Halves that have as much as possible of the weight changes U diag(v) Vh, v in V, within a first step.

    That step, b A0 + B0 a, reaches the rows that A0 spans and the columns that B0 spans. U diag(v) Vh is its
    own singular value decomposition; so A0 takes the k input directions with the most energy over the axes of
    V, and B0 the next k output directions: together the best rank 2k of one axis (Eckart and Young 1936).
    """
    order = V.square().sum(0).argsort(descending=True, stable=True)
    inputs, outputs = order[:k], order.roll(-k)[:k]  # the latter begin anew where 2 k > r
    return Start(A=math.sqrt(Vh.shape[1]) * Vh[inputs].float(), B=math.sqrt(len(U)) * U[:, outputs].float())
