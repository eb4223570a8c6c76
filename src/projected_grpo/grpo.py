"""Dr.GRPO with one gradient per rollout.

    A        = r - mean(group)                                  Dr.GRPO; classic: over the group's std too
    ratio    = exp(logp - logp_old)                             1 where off-policy text has no logp_old
    L_it     = -min(ratio A, clip(ratio, 1 +- eps) A)           PPO, with the weight truncated at ratio_cap
    L        = sum_it L_it / (n T_max) + beta K3                unbiased: one fixed denominator
    K3       = exp(ref - logp) - (ref - logp) - 1               Schulman's estimate of KL(policy || reference)

Departures from TRL's GRPO: log-probabilities are taken at temperature 1 whatever the sampling temperature;
the old ones come from the sampler itself (each rollout's own mode), so merged and unmerged weights, or
bfloat16, are corrected by the same ratio; rollouts with advantage 0 (all of a group without reward variance)
are dropped before any forward, with their KL. A teacher row longer than max_new weighs more than max_new
tokens.

Sources: Liu et al. 2025 (arXiv:2503.20783), Schulman et al. 2017 (arXiv:1707.06347), Schulman 2020 (K3).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from projected_grpo.antipasto import Policy
from projected_grpo.config import LossConfig
from projected_grpo.rollout import (
    Rollout,
    can_share,
    collate,
    collate_shared,
    completion_logps,
    shared_logps,
)

STD_FLOOR = 1e-4  # added to the std in classic GRPO, as TRL does
FLAT = 1e-8  # a group whose rewards differ by less has no variance


@dataclass(frozen=True)
class RolloutGrads:
    """Knob gradients of the loss, a row per part, and figures per rollout; NaN where one was not measured.

    `first` is a rollout of each part, to look up what the part's rollouts have in common.
    """

    rows: Mapping[str, Float[Tensor, "parts r"]]
    first: Int[Tensor, " parts"]
    loss: float
    logp: Float[Tensor, " n"]
    ref_logp: Float[Tensor, " n"]
    kl: Float[Tensor, " n"]
    gap: Float[Tensor, " n"]


def advantages(rewards: Float[Tensor, "P G"], unbiased: bool = True) -> Float[Tensor, "P G"]:
    """Rewards relative to their group; exactly 0 for a group without variance."""
    centred = rewards - rewards.mean(1, keepdim=True)
    if not unbiased:
        centred = centred / (rewards.std(1, keepdim=True) + STD_FLOOR)
    spread = rewards.amax(1, keepdim=True) - rewards.amin(1, keepdim=True)
    return torch.where(spread > FLAT, centred, torch.zeros_like(centred))


def surrogate(
    logp: Float[Tensor, "b T"],
    logp_old: Float[Tensor, "b T"],
    advantage: Float[Tensor, " b"],
    clip: float,
    ratio_cap: float,
) -> Float[Tensor, "b T"]:
    """PPO's clipped objective per token (to be maximised).

    The importance weight is truncated at ratio_cap, which bounds the one case PPO's clip leaves open: a
    negative advantage on a token that the policy now finds much likelier than its sampler did.
    """
    weight = (logp.detach() - logp_old).exp().clamp_max(ratio_cap)
    ratio = weight * (logp - logp.detach()).exp()
    A = advantage[:, None]
    return torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)


def k3(logp: Float[Tensor, "b T"], ref: Float[Tensor, "b T"]) -> Float[Tensor, "b T"]:
    """Schulman's low-variance, non-negative KL estimate per token, nats."""
    difference = ref - logp
    return difference.exp() - difference - 1


def microbatches(
    rollouts: Sequence[Rollout], which: Sequence[int], budget: int, parts: Sequence[int] | None = None
) -> Iterator[list[int]]:
    """Split indices into batches of at most `budget` padded tokens (one rollout at least), longest first.

    With `parts` a batch holds the prompt of each part once, and rollouts of a part stay together.
    """
    parts = range(len(rollouts)) if parts is None else parts
    lengths = {i: len(rollouts[i].prompt_ids) + len(rollouts[i].completion_ids) for i in which}
    longest: dict[int, int] = {}
    for i in which:
        longest[parts[i]] = max(lengths[i], longest.get(parts[i], 0))
    batch: list[int] = []
    for i in sorted(which, key=lambda i: (-longest[parts[i]], parts[i], -lengths[i])):
        if batch and _padded_tokens(rollouts, parts, [*batch, i]) > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _padded_tokens(rollouts: Sequence[Rollout], parts: Sequence[int], batch: Sequence[int]) -> int:
    width = max(len(rollouts[i].prompt_ids) for i in batch)
    length = max(len(rollouts[i].completion_ids) for i in batch)
    return width * len({parts[i] for i in batch}) + length * len(batch)


def per_rollout_grads(
    policy: Policy,
    rollouts: Sequence[Rollout],
    advantage: Float[Tensor, " n"],
    loss: LossConfig,
    max_new: int,
    pad_id: int,
    *,
    deltas: Mapping[str, Float[Tensor, " r"]] | None = None,
    with_reference: bool = False,
    parts: Sequence[int] | None = None,
) -> RolloutGrads:
    """Gradient of the loss for every rollout, from one forward and one backward per microbatch.

    With `parts`, a number from 0 up for each rollout, there is a row per part instead, the sum over its
    rollouts; their prompt, which must be the same, is then run once where the model allows it. Rollouts with
    advantage 0 are not run and add nothing. The gradient is taken at `deltas` (default: the policy as
    trained); no parameter's `.grad` is touched.
    """
    deltas = policy.deltas() if deltas is None else deltas
    n = len(rollouts)
    parts = range(n) if parts is None else parts
    first = torch.tensor([parts.index(part) for part in range(max(parts) + 1)])
    shared = len(first) < n and can_share(policy.model)
    rows = {m: delta.new_zeros(len(first), len(delta)) for m, delta in deltas.items()}
    figures = torch.full((4, n), float("nan"))
    total = 0.0
    live = [i for i, a in enumerate(advantage.tolist()) if a != 0]
    for index in microbatches(rollouts, live, loss.tokens_per_microbatch, parts if shared else None):
        batch = [rollouts[i] for i in index]
        own = [parts[i] for i in index]
        into = sorted(set(own)) if shared else own  # the part of each row of this forward pass
        logps, completion = _scorer(policy, batch, own, pad_id, shared)
        ref = None
        if with_reference or loss.beta > 0:
            with torch.no_grad(), policy.bind(None):
                ref = logps()
        with policy.rows(deltas, len(into)) as leaves:
            logp = logps()
            old = _old_logps(batch, logp)
            per_token = -surrogate(logp, old, advantage[index].to(logp), loss.clip, loss.ratio_cap)
            if loss.beta > 0 and ref is not None:
                per_token = per_token + loss.beta * k3(logp, ref)
            value = (per_token * completion * _token_weights(completion, loss, n, max_new)).sum()
            gradients = torch.autograd.grad(value, list(leaves.values()))
        for m, gradient in zip(leaves, gradients, strict=True):
            rows[m].index_add_(0, torch.tensor(into, device=gradient.device), gradient)
        total += float(value.detach())
        figures[:, index] = _per_rollout_figures(logp.detach(), old, ref, completion).cpu()
    return RolloutGrads(rows, first, total, *figures)


def _scorer(
    policy: Policy, rollouts: Sequence[Rollout], parts: Sequence[int], pad_id: int, shared: bool
) -> tuple[Callable[[], Float[Tensor, "b T"]], Bool[Tensor, "b T"]]:
    """What gives the completions' log-probabilities under the deltas bound by then, and their mask."""
    if shared:
        once = collate_shared(rollouts, parts, pad_id, policy.device)
        return partial(shared_logps, policy, once), once.completion
    batch = collate(rollouts, pad_id, policy.device)
    return partial(completion_logps, policy.model, batch), batch.completion


def _token_weights(
    completion: Bool[Tensor, "b T"], loss: LossConfig, n: int, max_new: int
) -> Float[Tensor, "b #T"]:
    if loss.unbiased:
        return torch.full((len(completion), 1), 1 / (n * max_new), device=completion.device)
    return 1 / (n * completion.sum(1, keepdim=True).clamp_min(1))


def _old_logps(rollouts: Sequence[Rollout], logp: Float[Tensor, "b T"]) -> Float[Tensor, "b T"]:
    old = logp.detach().clone()
    for i, rollout in enumerate(rollouts):
        if rollout.logp_old is not None:
            old[i, : len(rollout.logp_old)] = rollout.logp_old.to(old)
    return old


def _per_rollout_figures(
    logp: Float[Tensor, "b T"],
    old: Float[Tensor, "b T"],
    ref: Float[Tensor, "b T"] | None,
    completion: Bool[Tensor, "b T"],
) -> Float[Tensor, "4 b"]:
    count = completion.sum(1).clamp_min(1)

    def mean(x: Tensor) -> Tensor:
        return (x * completion).sum(1) / count

    missing = torch.full_like(count, float("nan"), dtype=logp.dtype)
    reference = [missing, missing] if ref is None else [mean(ref), mean(k3(logp, ref))]
    return torch.stack([mean(logp), *reference, mean((logp - old).abs())]).float()
