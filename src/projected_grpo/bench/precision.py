"""What the weights' dtype leaves of the adapter, and how far the sampler and the loss are apart.

    rho   = |delta_i| / rms(S)           of every module; signs at random, as AdamW's first steps have them
    e     = U diag(delta) Vh x           in float32, for the input x that a module really had
    share = <y - W x, e> / <e, e>        y: its output, W x: the frozen Linear's; over all modules and tokens

A share of 1 is all that the adapter should do. It is looked for where the adapter is used: while completions
are sampled, in the loss's forward pass over them, and in the exported model.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from projected_grpo.antipasto import AdaptedLinear, Deltas, Policy, unwrap
from projected_grpo.bench.movement import rms_singular, set_adapter
from projected_grpo.bench.step import bench_config, bench_prompt_ids, describe, open_bench_chat
from projected_grpo.config import LossConfig
from projected_grpo.engine.batch import collate
from projected_grpo.engine.chat import Chat
from projected_grpo.engine.logps import completion_logps, head_chunk
from projected_grpo.engine.passes import forward, microbatches, padded, prompt_numbers
from projected_grpo.engine.tangent import rows
from projected_grpo.options.verbs import Work
from projected_grpo.rollout import Rollout
from projected_grpo.seeds import stream_seed

SITES = ("sampler", "loss", "export")
RHOS = (1e-4, 1e-3, 1e-2)
Weights = Mapping[str, Float[Tensor, "d_out d_in"]]


def bench_precision(work: Work) -> dict[str, Any]:
    """For each rho the surviving shares, and of the sampled tokens `gap` and the share outside the clip.

    `gap` is the mean |log-probability by the loss - by the sampler|, nats. All over `steps` draws of signs.
    """
    chat = open_bench_chat(work)
    points = []
    for rho in RHOS:
        sums, gaps = zip(*(one_draw(work, chat, rho, draw) for draw in range(work.steps)), strict=True)
        shares = [float(part / whole) for part, whole in torch.stack(sums).sum(0)]
        gap = torch.cat(gaps)
        clip = bench_config(work, Path()).loss.clip
        outside = float(((gap.exp() - 1).abs() > clip).float().mean())
        found = dict(zip(SITES, shares, strict=True))
        points.append({"rho": rho, **found, "gap": float(gap.abs().mean()), "outside_clip": outside})
    return {"points": points} | describe(work, chat)


def one_draw(
    work: Work, chat: Chat, rho: float, draw: int
) -> tuple[Float[Tensor, "sites 2"], Float[Tensor, " tokens"]]:
    """The sums of `effects` at every site, and log p by the loss - log p by the sampler of every token."""
    policy, cfg, prompts = chat.policy, bench_config(work, Path()), bench_prompt_ids(work, chat.tokenizer)
    frozen = {m: layer.weight.data for m, layer in policy.layers.items()}
    set_adapter(policy, random_deltas(policy, rho, stream_seed(work.seed, draw)))
    seeds = [[stream_seed(work.seed, draw, i, j) for j in range(work.group)] for i in range(len(prompts))]
    with effects(policy, policy.layers, frozen) as sampler:
        drawn = chat.sample(prompts, seeds, cfg.sampling)
    done = [(prompt, *said) for prompt, group in zip(prompts, drawn, strict=True) for said in group]
    rollouts = [Rollout(prompt, ids, "", logps) for prompt, ids, logps in done]
    with effects(policy, policy.layers, frozen) as loss:
        gap = torch.cat(list(log_ratios(policy, rollouts, cfg.loss)))
    with exported(policy, frozen) as plain, effects(policy, plain, frozen) as export, torch.no_grad():
        completion_logps(policy.model, collate(rollouts, policy.device))
    return torch.stack([sampler, loss, export]), gap


def random_deltas(policy: Policy, rho: float, seed: int) -> Deltas:
    """For every module rho times the root mean square of its weight's singular values, signs at random."""
    deltas = {}
    for m, r in policy.ranks.items():
        generator = torch.Generator().manual_seed(stream_seed(seed, "precision", m))
        signs = torch.randn(r, generator=generator).sign().to(policy.device)
        deltas[m] = rho * rms_singular(policy, m) * signs
    return deltas


@contextmanager
def effects(
    policy: Policy, modules: Mapping[str, nn.Module], frozen: Weights
) -> Iterator[Float[Tensor, "2"]]:
    """<y - W x, e> and <e, e>, summed over what these modules do while it is open."""
    sums = torch.zeros(2, dtype=torch.float64)
    watches = [
        module.register_forward_hook(partial(add_effect, sums, policy.layers[m], frozen[m]))
        for m, module in modules.items()
    ]
    try:
        yield sums
    finally:
        for watch in watches:
            watch.remove()


@torch.no_grad()
def add_effect(
    sums: Float[Tensor, "2"],
    layer: AdaptedLinear,
    W: Float[Tensor, "d_out d_in"],
    module: nn.Module,
    args: tuple[Float[Tensor, "*b d_in"]],
    y: Float[Tensor, "*b d_out"],
) -> None:
    """A forward hook: what one output has of the adapter's effect."""
    (x,) = args
    projected = F.linear(x.float(), layer.Vh.float()) * layer.delta_s.to(x.device)
    e = F.linear(projected, layer.U.float())
    moved = y.float() - F.linear(x, W, layer.base.bias).float()
    sums += torch.stack([(part * e).sum(dtype=torch.float64) for part in (moved, e)]).cpu()


def log_ratios(
    policy: Policy, rollouts: Sequence[Rollout], loss: LossConfig
) -> Iterator[Float[Tensor, " tokens"]]:
    """log p by the loss's forward pass - log p by the sampler, of every sampled token."""
    deltas, chunk = policy.deltas(), head_chunk(policy, loss.tokens_per_microbatch)
    weights, prompts = policy.merged(deltas), prompt_numbers(policy.model, rollouts, loss)
    for index in microbatches(rollouts, range(len(rollouts)), loss.tokens_per_microbatch, prompts):
        group = [rollouts[i] for i in index]
        shared = len({prompts[i] for i in index}) < len(index)
        batch = padded(policy, group, share_prompts=shared)
        with rows(policy, deltas, weights, len(group)) as leaves:
            logp = forward(policy, batch, leaves, range(len(group)), chunk).logp.detach()
        old = torch.cat([rollout.logp_old for rollout in group if rollout.logp_old is not None])
        yield logp[batch.completion].cpu() - old


@contextmanager
def exported(policy: Policy, frozen: Weights) -> Iterator[Mapping[str, nn.Module]]:
    """The Linears of the model as `export` writes it; afterwards the policy is whole again."""
    model = unwrap(policy, ablate_quarantine=True)
    try:
        yield {m: model.get_submodule(m) for m in policy.layers}
    finally:
        for m, layer in policy.layers.items():
            layer.base.weight.data = frozen[m]
            model.set_submodule(m, layer)
