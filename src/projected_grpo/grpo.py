"""Dr.GRPO with one gradient per rollout.

    A        = r - mean(group)                                  Dr.GRPO; classic: over the group's std too
    ratio    = exp(logp - logp_old)                             1 where off-policy text has no logp_old
    L_it     = -min(ratio A, clip(ratio, 1 +- eps) A)           PPO, with the weight truncated at ratio_cap
    L_it     = -min(ratio, ratio_cap) A                         --importance=truncated: no clip
    L        = sum_it L_it / (n T_max) + beta K3                unbiased: one fixed denominator
    K3       = exp(ref - logp) - (ref - logp) - 1               Schulman's estimate of KL(policy || reference)

Departures from TRL's GRPO: log-probabilities are taken at temperature 1 whatever the sampling temperature;
the old ones come from the sampler itself (each rollout's own mode), so merged and unmerged weights, or
bfloat16, are corrected by the same ratio; rollouts with advantage 0 (all of a group without reward variance)
are dropped before any forward, with their KL. A teacher row longer than max_new weighs more than max_new
tokens.

A step is one update, so the policy is the one that sampled, and the ratio is nothing but what the sampler's
arithmetic and the loss's differ by (of rollouts sampled without the quarantine, also what that does). PPO's
clip takes it for a policy that has moved, and drops tokens; an engine with kernels of its own needs the
truncated weight instead, beside which PPO's own ratio is 1.

Sources: Liu et al. 2025 (arXiv:2503.20783), Schulman et al. 2017 (arXiv:1707.06347), Schulman 2020 (K3);
truncated weights: Ionides 2008; of another engine's rollouts, outside PPO's own ratio: Yao et al. 2025 ("Your
Efficient RL Framework Secretly Brings You Off-Policy RL Training").
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
from projected_grpo.engine.models import checkpointed
from projected_grpo.engine.scorer import Scorer, microbatches, prompt_numbers, scorer_of
from projected_grpo.errors import UserError
from projected_grpo.rollout import Rollout

STD_FLOOR = 1e-4  # added to the std in classic GRPO, as TRL does
FLAT = 1e-8  # a group whose rewards differ by less has no variance


@dataclass(frozen=True)
class RolloutGrads:
    """Adapter gradients of the loss, a row per part, and figures per rollout; NaN where one was not measured.

    `first` is a rollout of each part, to look up what the part's rollouts have in common.
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
    A = advantage[:, None]
    cap = ratio_cap * (1 + (A > 0).to(logp))  # a positive advantage must meet the clip first
    weight = torch.minimum((logp.detach() - logp_old).exp(), cap)
    ratio = weight * (logp - logp.detach()).exp()
    return torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)


def truncated_surrogate(
    logp: Float[Tensor, "b T"],
    logp_old: Float[Tensor, "b T"],
    advantage: Float[Tensor, " b"],
    ratio_cap: float,
) -> Float[Tensor, "b T"]:
    """The policy gradient's objective per token (to be maximised), corrected for who sampled.

    Its gradient is min(p / p_old, ratio_cap) A dlogp: every token counts, none more than ratio_cap times.
    """
    weight = (logp.detach() - logp_old).exp().clamp_max(ratio_cap)
    return weight * (logp - logp.detach()).exp() * advantage[:, None]


def k3(logp: Float[Tensor, "b T"], ref: Float[Tensor, "b T"]) -> Float[Tensor, "b T"]:
    """Schulman's low-variance, non-negative KL estimate per token, nats."""
    difference = ref - logp
    return difference.exp() - difference - 1


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
    """Gradient of the loss for every rollout, from one forward pass of each prompt and completion.

    With `parts`, a number for each rollout from 0 up without gaps, there is a row per part instead, the sum
    over its rollouts. A prompt that several rollouts follow is run once where the model allows it (all read
    its cache, which layers under `loss.grad_checkpoint` do not take; prefix.py). Rollouts with advantage 0
    are not run and add nothing. The gradient is taken at `deltas` (default: the policy as trained); no
    parameter's `.grad` is touched. A microbatch that does not fit into memory is run in halves, which changes
    nothing but rounding; UserError if a single rollout does not fit.
    """
    deltas = policy.deltas() if deltas is None else deltas
    n = len(rollouts)
    parts = range(n) if parts is None else parts
    first = torch.tensor([parts.index(part) for part in range(max(parts) + 1)])
    prompts = prompt_numbers(policy.model, rollouts, loss)
    rows = {m: delta.new_zeros(len(first), len(delta)) for m, delta in deltas.items()}
    figures = torch.full((4, n), float("nan"))
    total = 0.0
    live = [i for i, a in enumerate(advantage.tolist()) if a != 0]
    budget = loss.tokens_per_microbatch
    waiting = list(microbatches(rollouts, live, budget, prompts))[::-1]
    while waiting:
        index = waiting.pop()
        batch, own = [rollouts[i] for i in index], [parts[i] for i in index]
        try:
            scorer = scorer_of(policy, batch, own, pad_id, len({prompts[i] for i in index}) < len(index))
            with checkpointed(policy.model) if loss.grad_checkpoint else nullcontext():
                value, gradients, measured = _microbatch(
                    policy, batch, scorer, advantage[index], loss, n, max_new, deltas, with_reference
                )
        except torch.OutOfMemoryError as error:
            if len(index) == 1:
                raise UserError("one rollout alone does not fit into memory; lower --max-new") from error
            waiting += [index[len(index) // 2 :], index[: len(index) // 2]]
            logger.warning("out of memory: a microbatch of {} rollouts is halved", len(index))
        else:
            for m, gradient in gradients.items():
                rows[m].index_add_(0, torch.tensor(scorer.parts, device=gradient.device), gradient)
            total += value
            figures[:, index] = measured
            continue
        torch.cuda.empty_cache()  # behind the handler: its traceback held the tensors
    return RolloutGrads(rows, first, total, *figures)


def _microbatch(
    policy: Policy,
    rollouts: Sequence[Rollout],
    scorer: Scorer,
    advantage: Float[Tensor, " b"],
    loss: LossConfig,
    n: int,
    max_new: int,
    deltas: Mapping[str, Float[Tensor, " r"]],
    with_reference: bool,
) -> tuple[float, Mapping[str, Float[Tensor, "rows _"]], Float[Tensor, "4 b"]]:
    """These rollouts' share of the loss, its gradient for each row, and figures per rollout."""
    ref = None
    if with_reference or loss.beta > 0:
        with policy.bind(None):
            ref = scorer.logps()
    with policy.rows(deltas, len(scorer.parts)) as leaves:
        logp, backward = scorer.run(leaves)
        old = _old_logps(rollouts, logp)
        per_token = -_objective(logp, old, advantage.to(logp), loss)
        if loss.beta > 0 and ref is not None:
            per_token = per_token + loss.beta * k3(logp, ref)
        weights = _token_weights(scorer.completion, loss, n, max_new)
        value = (per_token * scorer.completion * weights).sum()
        gradients = backward(value)
    figures = _per_rollout_figures(logp.detach(), old, ref, scorer.completion).cpu()
    return float(value.detach()), gradients, figures


def _objective(
    logp: Float[Tensor, "b T"], old: Float[Tensor, "b T"], advantage: Float[Tensor, " b"], loss: LossConfig
) -> Float[Tensor, "b T"]:
    """As `loss.importance` says; `auto` is for a run to resolve (config.resolved_loss), and clipped here."""
    if loss.importance == "truncated":
        return truncated_surrogate(logp, old, advantage, loss.ratio_cap)
    return surrogate(logp, old, advantage, loss.clip, loss.ratio_cap)


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
