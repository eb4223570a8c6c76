"""AntiPaSTO adapter: one trainable diagonal per Linear, in the singular-value basis of its own weight.

    W = U diag(S) Vh     full rank r = min(d_in, d_out), frozen
    y = W x + b + U ((delta_s + delta_hack) * (Vh x))  [+ H x]

delta_s is what is deployed, delta_hack the quarantine that deployment deletes; both start at zero, where the
layer is exactly the base layer. The quarantine may instead be a block of its own, a low-rank H (block.py);
delta_hack then stays zero. Binding nothing at all gives the reference policy without a second model.

The values in use are bound from outside: a vector (as trained or as deployed), a row per rollout, or nothing.
Gradients are taken by the bound values, so no `.grad` is touched. Another training loop, which knows nothing
but parameters and their `.grad`, has the parameters themselves in use (`Policy.use_parameters`).

Per-rollout gradients: bind delta as one row per rollout, `rows [n, r]`. Rollout i then depends on row i only.
After one backward pass the gradient of `rows` holds every rollout's own gradient, also at delta = 0, and its
sum is the gradient of delta. engine/tangent.py has the fast way to the same rows.

A block's displacement is bound together with the delta, under `block_name(module)`, and has rows likewise.

Source: AntiPaSTO's singular-value parametrisation with a diagonal only (compare SVFT, Lingam et al. 2024);
one copy of the parameter per example for per-example gradients.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from projected_grpo.block import Block, Start
from projected_grpo.errors import UserError
from projected_grpo.seeds import stream_seed
from projected_grpo.tensor_files import SVD, load_svd, tensor_hash

TARGETS = frozenset(
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    # Gated delta net (Qwen3-Next and Qwen3.5).
    + ("in_proj_qkv", "in_proj_qkvz", "in_proj_ba", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj")
)
PROBED = 8  # tokens that show whether logits are capped or scaled
SAMPLED = 4096  # values of each weight that tell one model from another
Deltas = Mapping[str, Float[Tensor, "*n r"]]  # by module; a block's displacement by `block_name(module)`
# A delta, and a block's displacement; None: the parameters themselves. In a tuple, so that a Parameter in it
# is not registered a second time.
Bound = tuple[Tensor | None, Tensor | None] | None


def block_name(module: str) -> str:
    """The name under which a module's block is bound."""
    return f"{module}.block"


class AdaptedLinear(nn.Module):
    """A frozen Linear, its SVD basis, delta_s, delta_hack and maybe a block; values are bound from outside.

    Adapter parameters, and values bound, are on the `home` device; the basis is where the weight is.
    `seed` is of the draws that round a merged weight.
    """

    def __init__(self, base: nn.Linear, svd: SVD, home: torch.device | None = None, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        parameter = torch.float64 if base.weight.dtype == torch.float64 else torch.float32
        device, dtype = base.weight.device, base.weight.dtype
        self.base = base
        self.U = nn.Buffer(svd.U.to(device, dtype).contiguous(), persistent=False)
        self.Vh = nn.Buffer(svd.Vh.to(device, dtype).contiguous(), persistent=False)
        home = device if home is None else home
        self.delta_s = nn.Parameter(torch.zeros(len(svd.S), dtype=parameter, device=home))
        self.delta_hack = nn.Parameter(torch.zeros(len(svd.S), dtype=parameter, device=home))
        self.block: Block | None = None
        self.bound: Bound = (None, None)
        self.fast: Callable[[Tensor], Tensor] | None = None  # replaces the forward pass (engine/tangent.py)

    def bind(
        self,
        delta: Float[Tensor, "*n {len(self.delta_s)}"] | None,
        moved: Float[Tensor, "*n p"] | None = None,
    ) -> None:
        """Use this delta and displacement of the block from now on: one, a row per rollout, or none."""
        self.bound = (delta, moved)

    @property
    def in_use(self) -> tuple[Tensor | None, Tensor | None]:
        """The delta and the block's displacement of the forward pass; of the parameters themselves, to be
        differentiated by them."""
        if self.bound is not None:
            return self.bound
        return self.delta_s + self.delta_hack, None if self.block is None else self.block.moved

    @property
    def quarantine(self) -> nn.Parameter:
        """The parameter that takes what is routed: the block where there is one, else delta_hack."""
        return self.delta_hack if self.block is None else self.block.moved

    @property
    def weight(self) -> Tensor:
        """The base weight, for code that asks a Linear for its dtype or device."""
        return self.base.weight

    def forward(self, x: Float[Tensor, "*b d_in"]) -> Float[Tensor, "*b d_out"]:
        delta, moved = self.in_use
        if delta is None:
            return self.base(x)
        per_rollout = delta.ndim == 2
        if per_rollout and (x.ndim != 3 or len(x) != len(delta)):
            raise ValueError(f"rows for {len(delta)} rollouts met an input of shape {tuple(x.shape)}")
        if self.fast is not None:
            return self.fast(x)
        delta = delta.to(x)[:, None, :] if per_rollout else delta.to(x)
        y = self.base(x) + F.linear(F.linear(x, self.Vh) * delta, self.U)
        return y if self.block is None or moved is None else y + self.block.effect(x, moved)


@dataclass(frozen=True)
class Policy:
    """A causal language model with adapted Linears, by module name."""

    model: nn.Module
    layers: Mapping[str, AdaptedLinear]

    @property
    def device(self) -> torch.device:
        """Home: where inputs go, where adapter parameters are, and where outputs and gradients come out."""
        return next(iter(self.layers.values())).delta_s.device

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Home, and every other device that holds layers."""
        return tuple(dict.fromkeys((self.device, *(layer.U.device for layer in self.layers.values()))))

    @property
    def ranks(self) -> dict[str, int]:
        """r of each module."""
        return {m: len(layer.delta_s) for m, layer in self.layers.items()}

    @property
    def blocks(self) -> dict[str, Block]:
        """The block of each module that has one."""
        return {m: layer.block for m, layer in self.layers.items() if layer.block is not None}

    def give_blocks(self, starts: Mapping[str, Start]) -> None:
        """Blocks for these modules and no others, their weight change zero.

        A block that fits its new start stays the same parameter, which an optimizer may hold.
        """
        for m, layer in self.layers.items():
            start = starts.get(m)
            if start is None:
                layer.block = None
            elif layer.block is None or not layer.block.fits(start):
                layer.block = Block(start, layer.delta_s.dtype, layer.U.device, self.device)
            else:
                layer.block.begin(start)

    def deltas(self, *, ablate_quarantine: bool = False) -> dict[str, Float[Tensor, " r"]]:
        """Detached values per module: delta_s as deployed; delta_s + delta_hack, and blocks, as trained."""
        deltas = {
            m: (layer.delta_s if ablate_quarantine else layer.delta_s + layer.delta_hack).detach().clone()
            for m, layer in self.layers.items()
        }
        if not ablate_quarantine:
            deltas |= {block_name(m): block.moved.detach().clone() for m, block in self.blocks.items()}
        return deltas

    @cached_property
    def has_bare_head(self) -> bool:
        """Whether logits are the output layer's and no more, which a pass of a few tokens shows once."""
        with self.bind(None):
            return has_bare_head(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """Of the adapted weights."""
        return next(iter(self.layers.values())).weight.dtype

    @property
    def quarantine_used(self) -> bool:
        """Whether anything is in the quarantine."""
        return any(
            bool(x.any()) for layer in self.layers.values() for x in (layer.delta_hack, layer.quarantine)
        )

    @property
    def quarantine_norm(self) -> float:
        """Frobenius norm over all modules of the weight change in the quarantine: |delta_hack|, or |H|."""
        norms = [layer.delta_hack.detach().norm() for layer in self.layers.values()]
        norms += [block.weight(block.moved.detach()).norm().to(self.device) for block in self.blocks.values()]
        return float(torch.stack(norms).norm())

    def use_parameters(self) -> None:
        """From now on, where nothing is bound, the parameters themselves are in use: autograd fills their
        `.grad`, delta_s and the quarantine each with the gradient by their sum."""
        for layer in self.layers.values():
            layer.bound = None

    def write_gradients(
        self, keep: Mapping[str, Float[Tensor, " r"]], routed: Mapping[str, Float[Tensor, " q"]]
    ) -> None:
        """Set the `.grad` of every delta_s, and of every quarantine; None where nothing is routed."""
        for m, layer in self.layers.items():
            layer.delta_s.grad = keep[m].to(layer.delta_s)
            layer.quarantine.grad = routed[m].to(layer.quarantine) if m in routed else None

    @contextmanager
    def bind(self, deltas: Mapping[str, Tensor | None] | None) -> Iterator[None]:
        """Run forward and backward passes with these deltas ([r], or [n, r] rows); None is the reference.

        A block whose displacement is not among them is not used.
        """
        outer = {m: layer.bound for m, layer in self.layers.items()}
        try:
            for m, layer in self.layers.items():
                if deltas is None:
                    layer.bind(None)
                else:
                    layer.bind(deltas[m], deltas.get(block_name(m)))
            yield
        finally:
            for m, layer in self.layers.items():
                layer.bound = outer[m]

    @contextmanager
    def repeat(self, index: Int[Tensor, " n"]) -> Iterator[None]:
        """Run rollout i with row index[i] of the bound rows; what is bound without rows stays."""
        bound = {m: layer.in_use[0] for m, layer in self.layers.items()}
        bound |= {block_name(m): self.layers[m].in_use[1] for m in self.blocks}
        rows = {m: delta for m, delta in bound.items() if delta is not None and delta.ndim == 2}
        with self.bind({**bound, **{m: delta[index] for m, delta in rows.items()}}):
            yield

    def merged(self, deltas: Deltas) -> dict[str, Float[Tensor, "d_out d_in"]]:
        """The weight of each module with these deltas in it, as of `merged_weight`."""
        return {
            m: merged_weight(layer, deltas[m], deltas.get(block_name(m))) for m, layer in self.layers.items()
        }

    @contextmanager
    def using(self, weights: Mapping[str, Float[Tensor, "d_out d_in"]]) -> Iterator[None]:
        """Run with these in place of W, nothing bound; the originals are put back, not got by subtracting."""
        originals = {m: layer.base.weight.data for m, layer in self.layers.items()}
        try:
            for m, layer in self.layers.items():
                layer.base.weight.data = weights[m]
            with self.bind(None):  # they hold the deltas already
                yield
        finally:
            for m, layer in self.layers.items():
                layer.base.weight.data = originals[m]

    @contextmanager
    def merge(self, deltas: Deltas) -> Iterator[None]:
        """Run with merged weights, so that decoding costs what the base model costs; forward passes only."""
        with self.using(self.merged(deltas)):
            yield


def merged_weight(
    layer: AdaptedLinear,
    delta: Float[Tensor, "{len(layer.delta_s)}"],
    moved: Float[Tensor, " p"] | None = None,
) -> Float[Tensor, "d_out d_in"]:
    """W + U diag(delta) Vh + H, summed in float32 at least; W itself if both changes are zero."""
    W = layer.base.weight.data
    block = layer.block if moved is not None and bool(moved.any()) else None
    if block is None and not bool(delta.any()):
        return W
    merged = W.to(torch.promote_types(W.dtype, torch.float32))
    if bool(delta.any()):
        merged = merged + (layer.U.to(merged.dtype) * delta.to(merged)) @ layer.Vh.to(merged.dtype)
    if block is not None and moved is not None:
        merged = merged + block.weight(moved).to(merged.dtype)
    return rounded(merged, W.dtype, layer.seed)


def rounded(values: Float[Tensor, "*n"], dtype: torch.dtype, seed: int) -> Float[Tensor, "*n"]:
    """In this dtype. bfloat16: up or down by chance, each as likely as `values` is near.

    A change far below the spacing of bfloat16 then moves the weights by itself on average, where rounding to
    nearest would leave all of them as they were. The draws are the seed's, so whoever merges the same deltas
    on the same kind of device has the same weights, and weights that bfloat16 can hold stay as they are.
    """
    if dtype != torch.bfloat16:
        return values.to(dtype)
    generator = torch.Generator(values.device).manual_seed(seed)
    bits = torch.randint(1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    bits += values.view(torch.int32)
    return bits.bitwise_and_(-(1 << 16)).view(torch.float32).to(dtype)


def unwrap(policy: Policy, *, ablate_quarantine: bool) -> nn.Module:
    """The model with plain Linears again, the adapter merged into their weights; the policy is used up."""
    deltas = policy.deltas(ablate_quarantine=ablate_quarantine)
    for name, layer in policy.layers.items():
        layer.base.weight.data = merged_weight(layer, deltas[name], deltas.get(block_name(name)))
        policy.model.set_submodule(name, layer.base)
    return policy.model


@torch.no_grad()
def has_bare_head(model: nn.Module) -> bool:
    """Whether logits are the output layer of the last hidden states and no more; a few tokens show it."""
    parts: Any = model
    head = parts.get_output_embeddings()
    seen: dict[str, Tensor] = {}
    watches = (
        parts.base_model.register_forward_hook(lambda _, x, y: seen.update(base=y.last_hidden_state)),
        head.register_forward_hook(lambda _, x, y: seen.update(fed=x[0], said=y)),
    )
    try:
        ids = torch.arange(PROBED, device=head.weight.device)[None] % len(head.weight)
        logits = parts(input_ids=ids, use_cache=False).logits
    finally:
        for watch in watches:
            watch.remove()
    return torch.equal(seen["fed"], seen["base"]) and torch.equal(seen["said"], logits)


def target_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The Linears that are adapted, by name."""
    return {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear) and name.rpartition(".")[2] in TARGETS
    }


def wrap(
    model: nn.Module, cache_dir: Path | None, on_module: Callable[[str], object] = lambda name: None
) -> Policy:
    """Freeze the model and adapt every target Linear. Raises UserError if it has none.

    Works one module at a time on the weight's own device; `on_module` gets each name when it is
    done. Adapter parameters go where the model's inputs go.
    """
    model.requires_grad_(False)
    linears = target_linears(model)
    if not linears:
        raise UserError(
            f"{type(model).__name__} has no Linear named like {', '.join(sorted(TARGETS))}: "
            "choose a Qwen3, Qwen2, Llama or Qwen3.5 style model"
        )
    layers = {}
    home = next(model.parameters()).device
    for name, base in linears.items():
        svd = load_svd(base.weight.data, cache_dir)
        layers[name] = AdaptedLinear(base, svd, home, stream_seed("rounding", name))
        model.set_submodule(name, layers[name])
        on_module(name)
    return Policy(model, layers)


def weights_digest(policy: Policy) -> str:
    """Hash of an even sample of every adapted weight, for telling models apart at the price of milliseconds.

    At most SAMPLED values of each, in float32 so that a bfloat16 checkpoint is the same model on a GPU and on
    a CPU. Training moves practically every value, so a fine-tuned model differs; an edit of a few need not.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, layer in policy.layers.items():
        W = layer.base.weight.data
        stride = (W.numel() // SAMPLED) | 1  # odd, so that it does not stay in a few columns
        digest.update(f"{name}{tuple(W.shape)}{tensor_hash(W.flatten()[::stride].float())}".encode())
    return digest.hexdigest()
