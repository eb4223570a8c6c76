"""Per-rollout rows around merged weights: the forward pass costs what the base layer costs.

The rows of `AdaptedLinear` add U (row * Vh x) to the base layer: two products more, forward and backward. All
rows hold the same delta, so that delta is merged once for all microbatches, W' = W + U diag(delta) Vh. With
g [t, d_out] the gradient at a rollout's outputs,

    y              = W' x + b
    d loss / d row = sum over the rollout's tokens of (Vh x) * (U^T g)

which is what the plain path gives at that delta. In half precision the plain path would lose small deltas: it
adds their effect to outputs that are rounded already. W' is what the sampler runs, in which they survive
(antipasto.rounded).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from projected_grpo.antipasto import AdaptedLinear, Deltas, Policy


class _TangentLinear(torch.autograd.Function):
    """y = W' x + b, with the derivative by each rollout's row, which W' holds already."""

    @staticmethod
    def forward(ctx, x, rows, moved, weight, path):  # type: ignore[no-untyped-def]  # torch's own signature
        layer = path.layer
        moved = None if moved is None else moved[0].to(x.device)
        ctx.save_for_backward(x, weight, layer.U, layer.Vh, moved)
        ctx.path, ctx.home, ctx.dtype, ctx.projected = path, rows.device, rows.dtype, None
        return F.linear(x, weight, layer.base.bias)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight, U, Vh, moved = ctx.saved_tensors
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        projected = F.linear(x, Vh) if ctx.projected is None else ctx.projected
        ctx.projected = projected if ctx.path.keep_projection else None
        grad_rows = (projected * (grad @ U)).sum(1, dtype=ctx.dtype)
        grad_moved = None if moved is None else ctx.path.layer.block.row_gradients(x, grad, moved)
        at_home = (None if g is None else g.to(ctx.home) for g in (grad_rows, grad_moved))
        return grad_x, *at_home, None, None


class Tangent:
    """One layer's forward pass around merged weights, while rows are bound to it."""

    def __init__(self, layer: AdaptedLinear) -> None:
        self.layer = layer
        self.keep_projection = False  # Vh x is needed again: another backward pass will come

    def __call__(self, x: Float[Tensor, "n t d_in"]) -> Float[Tensor, "n t d_out"]:
        rows, moved = self.layer.in_use
        y: Tensor = _TangentLinear.apply(x, rows, moved, self.layer.base.weight.data, self)
        return y


@contextmanager
def rows(
    policy: Policy, deltas: Deltas, weights: Mapping[str, Float[Tensor, "d_out d_in"]], n: int
) -> Iterator[dict[str, Float[Tensor, "n _"]]]:
    """Run with `weights`, in which these deltas are merged, and yield leaves [n, r].

    Their gradients are those of single rollouts. They are zero, but for a block's: its gradient depends on
    the displacement that they hold.
    """
    layers = policy.layers.values()
    leaves = {
        name: value.new_zeros(n, len(value)) if name in policy.layers else value.repeat(n, 1)
        for name, value in deltas.items()
    }
    for leaf in leaves.values():
        leaf.requires_grad_()
    try:
        for layer in layers:
            layer.fast = Tangent(layer)
        with policy.using(weights), policy.bind(leaves):
            yield leaves
    finally:
        for layer in layers:
            layer.fast = None


@contextmanager
def repeated_backward(policy: Policy) -> Iterator[None]:
    """Within it a backward pass keeps Vh x for the next one through the same graph."""
    paths = [layer.fast for layer in policy.layers.values() if isinstance(layer.fast, Tangent)]
    for path in paths:
        path.keep_projection = True
    try:
        yield
    finally:
        for path in paths:
            path.keep_projection = False
