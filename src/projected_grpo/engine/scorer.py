"""How rollouts are run for the loss: microbatches, and prompts once or each with its rollout."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from projected_grpo.antipasto import Policy
from projected_grpo.config import LossConfig
from projected_grpo.engine.batch import collate, collate_shared
from projected_grpo.engine.logps import can_share, completion_logps, head_chunk
from projected_grpo.engine.prefix import SharedPass, shared_logps
from projected_grpo.rollout import Rollout


def microbatches(
    rollouts: Sequence[Rollout], which: Sequence[int], budget: int, prompts: Sequence[int] | None = None
) -> Iterator[list[int]]:
    """Split indices into batches of at most `budget` padded tokens (one rollout at least), longest first.

    With `prompts`, a number for each rollout's, a batch holds each prompt once, and those who follow one
    prompt come one after the other.
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


Backward = Callable[[Float[Tensor, ""]], Mapping[str, Float[Tensor, "rows _"]]]


@dataclass(frozen=True)
class Scorer:
    """Two ways to completions' log-probabilities, and the part of each row of the gradients.

    `logps` gives them under what is bound by then, without gradients. `run` takes leaves, a row per entry of
    `parts`, and gives them with what takes a value that was made of them to its gradients by the leaves.
    """

    completion: Bool[Tensor, "b T"]
    parts: Sequence[int]
    logps: Callable[[], Float[Tensor, "b T"]]
    run: Callable[[Mapping[str, Tensor]], tuple[Float[Tensor, "b T"], Backward]]


def scorer_of(
    policy: Policy, rollouts: Sequence[Rollout], parts: Sequence[int], pad_id: int, shared: bool
) -> Scorer:
    """The way to these rollouts' log-probabilities: each prompt once, or each rollout with its own."""
    return (_with_prompts_once if shared else _each_with_its_prompt)(policy, rollouts, parts, pad_id)


def _with_prompts_once(
    policy: Policy, rollouts: Sequence[Rollout], parts: Sequence[int], pad_id: int
) -> Scorer:
    batch = collate_shared(rollouts, pad_id, policy.device)
    chunk = _chunk(policy, batch.completion.numel())
    names = sorted(set(parts))
    own = [names.index(part) for part in parts]

    def run(leaves: Mapping[str, Tensor]) -> tuple[Tensor, Backward]:
        done = SharedPass(policy, batch, leaves, own, chunk)
        return done.logp, done.gradients

    return Scorer(batch.completion, names, partial(shared_logps, policy, batch, chunk), run)


def _each_with_its_prompt(
    policy: Policy, rollouts: Sequence[Rollout], parts: Sequence[int], pad_id: int
) -> Scorer:
    batch = collate(rollouts, pad_id, policy.device)
    chunk = _chunk(policy, len(batch.ids) * (batch.ids.shape[1] - batch.first))
    logps = partial(completion_logps, policy.model, batch, chunk)

    def run(leaves: Mapping[str, Tensor]) -> tuple[Tensor, Backward]:
        def backward(value: Tensor) -> dict[str, Tensor]:
            return dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))

        return logps(), backward

    return Scorer(batch.completion, parts, torch.no_grad()(logps), run)


def _chunk(policy: Policy, tokens: int) -> int | None:
    with policy.bind(None):
        return head_chunk(policy.model, tokens)
