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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from projected_grpo.antipasto import Policy
from projected_grpo.config import LossConfig
from projected_grpo.rollout import Rollout, collate, completion_logps

STD_FLOOR = 1e-4  # added to the std in classic GRPO, as TRL does
FLAT = 1e-8  # a group whose rewards differ by less has no variance


@dataclass(frozen=True)
class RolloutGrads:
    """Per-rollout knob gradients of the loss, and figures per rollout; NaN where one was not measured."""

    rows: Mapping[str, Float[Tensor, "n r"]]
    loss: float
    logp: Float[Tensor, " n"]
    ref_logp: Float[Tensor, " n"]
    kl: Float[Tensor, " n"]
    gap: Float[Tensor, " n"]


def advantages(
    rewards: Float[Tensor, "P G"], unbiased: bool = True, keep: Bool[Tensor, "P G"] | None = None
) -> Float[Tensor, "P G"]:
    """Rewards relative to their group; exactly 0 for a group without variance.

    Rollouts that are not kept have advantage 0, and their group's mean, std and variance are of the others.
    """
    if keep is not None and not bool(keep.all()):
        out = torch.zeros_like(rewards)
        for i, kept in enumerate(keep):
            if int(kept.sum()) > 1:
                out[i, kept] = advantages(rewards[i : i + 1, kept], unbiased)[0]
        return out
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


def microbatches(rollouts: Sequence[Rollout], which: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Split indices into batches of at most `budget` padded tokens (one rollout at least), by length."""
    batch: list[int] = []
    width = length = 0
    for i in sorted(which, key=lambda i: -len(rollouts[i].prompt_ids) - len(rollouts[i].completion_ids)):
        wider = max(width, len(rollouts[i].prompt_ids))
        longer = max(length, len(rollouts[i].completion_ids))
        if batch and (wider + longer) * (len(batch) + 1) > budget:
            yield batch
            batch, wider, longer = [], len(rollouts[i].prompt_ids), len(rollouts[i].completion_ids)
        batch.append(i)
        width, length = wider, longer
    if batch:
        yield batch


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
) -> RolloutGrads:
    """Gradient of the loss for every rollout, from one forward and one backward per microbatch.

    Rollouts with advantage 0 are not run and have zero rows. The gradient is taken at `deltas` (default: the
    policy as trained); no parameter's `.grad` is touched.
    """
    deltas = policy.deltas() if deltas is None else deltas
    n = len(rollouts)
    names = list(policy.layers)
    rows = {
        m: torch.zeros(n, len(delta), dtype=delta.dtype, device=delta.device) for m, delta in deltas.items()
    }
    figures = torch.full((4, n), float("nan"))
    total = 0.0
    live = [i for i, a in enumerate(advantage.tolist()) if a != 0]
    for index in microbatches(rollouts, live, loss.tokens_per_microbatch):
        part = [rollouts[i] for i in index]
        batch = collate(part, pad_id, policy.device)
        ref = None
        if with_reference or loss.beta > 0:
            with torch.no_grad(), policy.bind(None):
                ref = completion_logps(policy.model, batch)
        with policy.rows(deltas, len(index)) as leaves:
            logp = completion_logps(policy.model, batch)
            old = _old_logps(part, logp)
            A = advantage[index].to(logp)
            per_token = -surrogate(logp, old, A, loss.clip, loss.ratio_cap)
            if loss.beta > 0 and ref is not None:
                per_token = per_token + loss.beta * k3(logp, ref)
            value = (per_token * batch.completion * _token_weights(batch.completion, loss, n, max_new)).sum()
            gradients = torch.autograd.grad(value, [leaves[m] for m in names])
        for m, gradient in zip(names, gradients, strict=True):
            rows[m][index] = gradient
        total += float(value.detach())
        figures[:, index] = _per_rollout_figures(logp.detach(), old, ref, batch.completion).cpu()
    return RolloutGrads(rows, total, *figures)


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
