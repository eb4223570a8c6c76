"""How rollouts are run for the loss: in microbatches, each prompt once where several rollouts share it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from projected_grpo.antipasto import Policy
from projected_grpo.config import LossConfig
from projected_grpo.engine.batch import Batch, SharedBatch, collate, collate_shared
from projected_grpo.engine.logps import can_share, completion_logps, head_chunk
from projected_grpo.engine.prefix import Leaves, SharedPass, shared_logps
from projected_grpo.rollout import Rollout


def microbatches(
    rollouts: Sequence[Rollout], which: Sequence[int], budget: int, prompts: Sequence[int] | None = None
) -> Iterator[list[int]]:
    """Split indices into batches of at most `budget` padded tokens (one rollout at least), longest first.

    `prompts[i]` numbers the prompt of rollout i: a batch holds each prompt once, and the rollouts of one
    prompt follow each other.
    """
    prompts = range(len(rollouts)) if prompts is None else prompts
    lengths = {i: len(rollouts[i].prompt_ids) + len(rollouts[i].completion_ids) for i in which}
    longest: dict[int, int] = {}
    for i in which:
        longest[prompts[i]] = max(lengths[i], longest.get(prompts[i], 0))
    batch: list[int] = []
    for i in sorted(which, key=lambda i: (-longest[prompts[i]], prompts[i], -lengths[i])):
        if batch and _padded_tokens(rollouts, prompts, [*batch, i]) > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _padded_tokens(rollouts: Sequence[Rollout], prompts: Sequence[int], batch: Sequence[int]) -> int:
    width = max(len(rollouts[i].prompt_ids) for i in batch)
    length = max(len(rollouts[i].completion_ids) for i in batch)
    return width * len({prompts[i] for i in batch}) + length * len(batch)


def prompt_numbers(model: nn.Module, rollouts: Sequence[Rollout], loss: LossConfig) -> Sequence[int]:
    """A number per rollout, the same for those whose prompt the loss runs once."""
    if loss.grad_checkpoint or not can_share(model):
        return range(len(rollouts))
    numbers: dict[tuple[int, ...], int] = {}
    return [numbers.setdefault(r.prompt_ids, len(numbers)) for r in rollouts]


@dataclass(frozen=True)
class PlainPass:
    """A forward pass under `leaves`, each rollout with its prompt. `logp`: log-probabilities, nats."""

    leaves: Leaves
    logp: Float[Tensor, "b T"]

    def gradients(self, value: Float[Tensor, ""]) -> Mapping[str, Float[Tensor, "rows _"]]:
        """d value / d leaves, where value is a function of `logp`."""
        found = torch.autograd.grad(value, list(self.leaves.values()))
        return dict(zip(self.leaves, found, strict=True))


def padded(policy: Policy, rollouts: Sequence[Rollout], *, share_prompts: bool) -> Batch | SharedBatch:
    """The rollouts as one batch on the policy's device."""
    return (collate_shared if share_prompts else collate)(rollouts, policy.device)


def forward(
    policy: Policy, batch: Batch | SharedBatch, leaves: Leaves, rows: Sequence[int], chunk: int | None
) -> PlainPass | SharedPass:
    """Run the policy under bound `leaves`; rollout i uses row rows[i]. `chunk`: as of `head_chunk`."""
    if isinstance(batch, SharedBatch):
        return SharedPass(policy, batch, leaves, rows, chunk)
    return PlainPass(leaves, completion_logps(policy.model, batch, chunk))


@torch.no_grad()
def fixed_logps(policy: Policy, batch: Batch | SharedBatch, chunk: int | None) -> Float[Tensor, "b T"]:
    """The same log-probabilities under what is bound, without gradients."""
    if isinstance(batch, SharedBatch):
        return shared_logps(policy, batch, chunk)
    return completion_logps(policy.model, batch, chunk)


@torch.no_grad()
def rollout_logps(
    policy: Policy, rollouts: Sequence[Rollout], tokens_per_microbatch: int
) -> Float[Tensor, " n"]:
    """Mean log-probability per completion token of each rollout, nats, by the deployed policy."""
    found = torch.empty(len(rollouts))
    chunk = head_chunk(policy, tokens_per_microbatch)
    with policy.merge(policy.deltas(ablate_quarantine=True)):
        for index in microbatches(rollouts, range(len(rollouts)), tokens_per_microbatch):
            batch = collate([rollouts[i] for i in index], policy.device)
            total = (completion_logps(policy.model, batch, chunk) * batch.completion).sum(1)
            found[index] = (total / batch.completion.sum(1)).float().cpu()
    return found
