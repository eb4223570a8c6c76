"""Rollouts padded into batches: each with its prompt, or each prompt once."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from projected_grpo.rollout import Rollout

PAD = 0  # any token: padding stands where nothing real attends to it


@dataclass(frozen=True)
class Batch:
    """Rollouts, right-padded; `rows` and `columns` are the places of completion tokens, row after row.

    Attention looks back only, so nothing real ever sees the padding that follows it, and no mask is needed;
    with one, sdpa would copy keys to every head and leave out the kernels that skip what lies ahead. Places
    are made before anything is on a device, which would have to be waited for.
    """

    ids: Int[Tensor, "b L"]
    rows: Int[Tensor, " tokens"]
    columns: Int[Tensor, " tokens"]
    completion: Bool[Tensor, "b T"]
    """What is real of the completions, left-aligned."""
    first: int
    """The first column that predicts a completion token."""

    @property
    def answers(self) -> Int[Tensor, " tokens"]:
        """Completion tokens of all rows, one row after the other."""
        return self.ids[self.rows, self.columns]

    def at_answers(self, states: Float[Tensor, "b C d"]) -> Float[Tensor, "tokens d"]:
        """Of every column's states, those at completion tokens."""
        return states[self.rows, self.columns]

    def before_answers(self, states: Float[Tensor, "b C d"], skipped: int = 0) -> Float[Tensor, "tokens d"]:
        """Of the states (or logits) of columns from `skipped` on, those that predict completion tokens.

        The last column predicts none and may be missing.
        """
        return states[self.rows, self.columns - 1 - skipped]

    def spread(self, values: Float[Tensor, " tokens"]) -> Float[Tensor, "b T"]:
        """Values of the completion tokens at their places, 0 on padding."""
        return values.new_zeros(self.completion.shape).masked_scatter(self.completion, values)


@dataclass(frozen=True)
class SharedBatch:
    """Prompts held once, however many completions follow each.

    `prefix` is every prompt but its last token, left-padded; rollout i continues prompt `owner[i]`; `tails`
    are that last token and the completions.
    """

    prefix: Int[Tensor, "p W"]
    prefix_attention: Bool[Tensor, "p W"]
    owner: Int[Tensor, " b"]
    tails: Batch

    @property
    def completion(self) -> Bool[Tensor, "b T"]:
        """What is real of the completions."""
        return self.tails.completion


def collate(rollouts: Sequence[Rollout], device: torch.device) -> Batch:
    """Pad rollouts into one batch. Raises ValueError for one without a prompt: nothing predicts its start."""
    starts = [len(r.prompt_ids) for r in rollouts]
    counts = [len(r.completion_ids) for r in rollouts]
    if not all(starts):
        raise ValueError("a rollout has no prompt")
    width = max(start + max(1, count) for start, count in zip(starts, counts, strict=True))
    ids = torch.full((len(rollouts), width), PAD)
    completion = torch.zeros(len(rollouts), max(1, *counts), dtype=torch.bool)
    for row, rollout in enumerate(rollouts):
        ids[row, : starts[row] + counts[row]] = torch.tensor(rollout.prompt_ids + rollout.completion_ids)
        completion[row, : counts[row]] = True
    rows, offsets = completion.nonzero(as_tuple=True)
    columns = torch.tensor(starts)[rows] + offsets
    to = partial(torch.Tensor.to, device=device)
    return Batch(to(ids), to(rows), to(columns), to(completion), min(starts) - 1)


def left_padded(
    prompts: Sequence[tuple[int, ...]], device: torch.device
) -> tuple[Int[Tensor, "p W"], Bool[Tensor, "p W"]]:
    """Prompts that end at one column, so that all can be continued there, and which tokens are real."""
    width = max(1, max(map(len, prompts)))
    ids = torch.full((len(prompts), width), PAD)
    attention = torch.zeros_like(ids, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        attention[row, width - len(prompt) :] = True
    return ids.to(device), attention.to(device)


def collate_shared(rollouts: Sequence[Rollout], device: torch.device) -> SharedBatch:
    """Pad rollouts into one batch that holds each prompt once, in the order in which they come."""
    prompts = list(dict.fromkeys(r.prompt_ids for r in rollouts))
    prefix, real = left_padded([prompt[:-1] for prompt in prompts], device)
    tails = collate([Rollout(r.prompt_ids[-1:], r.completion_ids, "") for r in rollouts], device)
    owner = torch.tensor([prompts.index(r.prompt_ids) for r in rollouts], device=device)
    return SharedBatch(prefix, real, owner, tails)


def positions(attention: Bool[Tensor, "b L"]) -> Int[Tensor, "b L"]:
    """Position of each token counted from its row's first real token."""
    return (attention.long().cumsum(1) - 1).clamp_min(0)
