"""Dr.GRPO with one gradient per rollout.

    A        = r - mean(group)                                  Dr.GRPO; classic: over the group's std too
    ratio    = min(exp(logp - logp_old), cap)                   1 where off-policy text has no logp_old
    L_it     = -min(ratio A, clip(ratio, 1 +- eps) A)           PPO
    L_it     = -ratio A                                         another engine's rollouts, bfloat16: no clip
    L        = sum_it (L_it + beta K3_it) w                     w = 1 / (n T_max): one fixed denominator
    K3       = exp(ref - logp) - (ref - logp) - 1               Schulman's estimate of KL(policy || reference)

cap = RATIO_CAP, a constant for the gradient; under PPO's clip it is twice that where A > 0, so that the clip
is met first. There it bounds what the clip leaves open: a negative advantage on a token that the policy now
finds much likelier than its sampler did.

On-policy, so the ratio should be 1; it differs by rounding only (and, for rollouts sampled without the
quarantine, by what the quarantine does). PPO's clip reads a difference as a policy that has moved, and drops
tokens. A sampler with kernels of its own, and bfloat16, therefore take the truncated ratio alone.

Departures from TRL's GRPO: log-probabilities are at temperature 1 whatever the sampling temperature. The old
ones come from the sampler itself, each rollout's own mode; it runs on the same merged weights as the loss.
Rollouts with advantage 0 (a group without reward variance) are dropped before any forward pass, with their
KL. A teacher row longer than max_new weighs more than max_new tokens.

Sources: Liu et al. 2025 (arXiv:2503.20783), Schulman et al. 2017 (arXiv:1707.06347), Schulman 2020 (K3);
truncated weights: Ionides 2008, and for another engine's rollouts Yao et al. 2025 ("Your Efficient RL
Framework Secretly Brings You Off-Policy RL Training").
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from loguru import logger
from torch import Tensor

from projected_grpo.antipasto import Policy
from projected_grpo.config import LossConfig
from projected_grpo.engine.logps import head_chunk
from projected_grpo.engine.models import checkpointed
from projected_grpo.engine.passes import fixed_logps, forward, microbatches, padded, prompt_numbers
from projected_grpo.engine.tangent import rows
from projected_grpo.errors import UserError
from projected_grpo.rollout import Rollout

STD_FLOOR = 1e-4  # added to the std in classic GRPO, as TRL does
FLAT = 1e-8  # a group whose rewards differ by less has no variance
RATIO_CAP = 3.0  # of importance weights: no token counts more than three times; must exceed 1 + clip


@dataclass(frozen=True)
class RolloutGrads:
    """Adapter gradients of the loss, a row per part, and figures per rollout; NaN where not measured.

    `first` is a rollout of each part, to look up what the part's rollouts have in common. `gap` is the mean
    |logp - logp_old| of a rollout, nats: what rounding changes between sampler and loss.
    """

    rows: Mapping[str, Float[Tensor, "parts r"]]
    first: Int[Tensor, " parts"]
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


def k3(logp: Float[Tensor, "b T"], ref: Float[Tensor, "b T"]) -> Float[Tensor, "b T"]:
    """Schulman's low-variance, non-negative KL estimate per token, nats."""
    difference = ref - logp
    return difference.exp() - difference - 1


def grpo_loss(
    logp: Float[Tensor, "b T"],
    logp_old: Float[Tensor, "b T"],
    ref: Float[Tensor, "b T"] | None,
    advantage: Float[Tensor, " b"],
    completion: Bool[Tensor, "b T"],
    settings: LossConfig,
    n: int,
    max_new: int,
    truncated: bool = False,
) -> Float[Tensor, ""]:
    """Loss of these rollouts by the equations at the top; `n` rollouts and T_max = `max_new` in a step.

    `truncated` leaves PPO's clip out: for rollouts of another engine, and in half precision.
    """
    A = advantage[:, None]
    # A positive advantage must meet PPO's clip before the cap.
    cap = torch.full_like(A, RATIO_CAP) if truncated else RATIO_CAP * (1 + (A > 0).to(logp))
    ratio = torch.minimum((logp.detach() - logp_old).exp(), cap) * (logp - logp.detach()).exp()
    objective = ratio * A
    if not truncated:
        objective = torch.minimum(objective, ratio.clamp(1 - settings.clip, 1 + settings.clip) * A)
    per_token = -objective
    if settings.beta > 0 and ref is not None:
        per_token = per_token + settings.beta * k3(logp, ref)
    lengths = completion.sum(1, keepdim=True).clamp_min(1).to(logp)
    w = 1 / (n * (torch.full_like(lengths, max_new) if settings.unbiased else lengths))
    return (per_token * completion * w).sum()


def per_rollout_grads(
    policy: Policy,
    rollouts: Sequence[Rollout],
    advantage: Float[Tensor, " n"],
    loss: LossConfig,
    max_new: int,
    *,
    deltas: Mapping[str, Float[Tensor, " r"]] | None = None,
    with_reference: bool = False,
    parts: Sequence[int] | None = None,
    truncated: bool = False,
) -> RolloutGrads:
    """Gradient of the loss for every rollout, from one forward pass of each prompt and completion.

    `parts[i]`: the row that rollout i is summed into (default: each its own). A prompt that several rollouts
    follow is run once where the model allows it: all read its cache, which layers under
    `loss.grad_checkpoint` do not take. Rollouts with advantage 0 are not run and add nothing. The gradient is
    taken at `deltas` (default: the policy as trained); no parameter's `.grad` is touched. A microbatch that
    does not fit into memory is run in halves, which changes nothing but rounding; UserError if a single
    rollout does not fit.
    """
    deltas = policy.deltas() if deltas is None else deltas
    n = len(rollouts)
    parts = range(n) if parts is None else parts
    first = torch.tensor([parts.index(part) for part in range(max(parts) + 1)])
    prompts = prompt_numbers(policy.model, rollouts, loss)
    live = [i for i, a in enumerate(advantage.tolist()) if a != 0]
    waiting = list(microbatches(rollouts, live, loss.tokens_per_microbatch, prompts))[::-1]
    chunk = _chunk(policy, [[rollouts[i] for i in index] for index in waiting])
    weights = policy.merged(deltas) if waiting else {}

    def run(index: list[int]) -> tuple[Tensor, Mapping[str, Tensor], Sequence[int], Tensor]:
        """Loss of a microbatch, its gradients with the part of each row, and figures per rollout."""
        group, own = [rollouts[i] for i in index], [parts[i] for i in index]
        shared = len({prompts[i] for i in index}) < len(index)
        row_parts = sorted(set(own)) if shared else own
        batch = padded(policy, group, share_prompts=shared)
        ref = None
        if with_reference or loss.beta > 0:
            with policy.bind(None):
                ref = fixed_logps(policy, batch, chunk)
        with rows(policy, deltas, weights, len(row_parts)) as leaves:
            row_of = [row_parts.index(part) for part in own] if shared else range(len(own))
            done = forward(policy, batch, leaves, row_of, chunk)
            old, A = _old_logps(group, done.logp), advantage[index].to(done.logp)
            value = grpo_loss(done.logp, old, ref, A, batch.completion, loss, n, max_new, truncated)
            gradients = done.gradients(value)
        return value.detach(), gradients, row_parts, _figures(done.logp.detach(), old, ref, batch.completion)

    summed = {m: delta.new_zeros(len(first), len(delta)) for m, delta in deltas.items()}
    figures = torch.full((4, n), float("nan"))
    total = 0.0
    while waiting:
        index = waiting.pop()
        try:
            with checkpointed(policy.model) if loss.grad_checkpoint else nullcontext():
                value, gradients, row_parts, measured = run(index)
        except torch.OutOfMemoryError as error:
            if len(index) == 1:
                raise UserError("one rollout alone does not fit into memory; lower --max-new") from error
            waiting += [index[len(index) // 2 :], index[: len(index) // 2]]
            logger.warning("out of memory: a microbatch of {} rollouts is halved", len(index))
        else:
            places = torch.tensor(row_parts, device=policy.device)
            for m, gradient in gradients.items():
                summed[m].index_add_(0, places, gradient)
            total += float(value)
            figures[:, index] = measured.cpu()
            continue
        torch.cuda.empty_cache()  # outside the handler: its traceback held the tensors
    return RolloutGrads(summed, first, total, *figures)


def _chunk(policy: Policy, batches: Sequence[Sequence[Rollout]]) -> int | None:
    """Tokens whose logits the output layer makes at once, for the largest of these batches."""
    columns = [
        1
        + max(len(r.prompt_ids) + len(r.completion_ids) for r in batch)
        - min(len(r.prompt_ids) for r in batch)
        for batch in batches
    ]
    tokens = max((len(b) * c for b, c in zip(batches, columns, strict=True)), default=0)
    return head_chunk(policy, tokens)


def _old_logps(rollouts: Sequence[Rollout], logp: Float[Tensor, "b T"]) -> Float[Tensor, "b T"]:
    old = logp.detach().clone()
    for i, rollout in enumerate(rollouts):
        if rollout.logp_old is not None:
            old[i, : len(rollout.logp_old)] = rollout.logp_old.to(old)
    return old


def _figures(
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
