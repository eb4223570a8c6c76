"""Sampling completions and scoring tokens, with seeds by coordinates rather than by history.

A rollout's randomness is a stream of uniforms drawn from (seed, step, prompt, row); each token is the inverse
of the filtered distribution at the next uniform. So what a row samples depends on nothing that happened
before it, and rows may share a batch, leave it early or be resumed; the others change by rounding at most.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from projected_grpo.antipasto import Policy
from projected_grpo.config import SamplingConfig

Completion = tuple[tuple[int, ...], Float[Tensor, " t"]]  # token ids and their log-probabilities, nats


@dataclass(frozen=True)
class Rollout:
    """One prompt and one completion. logp_old [T] are its log-probabilities when sampled, None off-policy."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    text: str
    logp_old: Float[Tensor, " T"] | None = None
    is_teacher: bool = False
    ablated: bool = False


def uniforms(seed: int, count: int) -> Float[Tensor, " count"]:
    """`count` draws in [0, 1) from one stream."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def take_rows(groups: Sequence[Sequence[int]], start: int, stop: int) -> list[list[int]]:
    """The rows from start to before stop, counted through all groups, group by group."""
    flat = [(p, row) for p, group in enumerate(groups) for row in group]
    taken: list[list[int]] = [[] for _ in groups]
    for p, row in flat[start:stop]:
        taken[p].append(row)
    return taken


def batches(seeds: Sequence[Sequence[int]], rows: int) -> Iterator[list[list[int]]]:
    """Each prompt's seeds, for `sample`, in consecutive batches of at most `rows` rollouts (0: one batch)."""
    total = sum(map(len, seeds))
    size = rows or max(1, total)
    for start in range(0, total, size):
        yield take_rows(seeds, start, start + size)


@runtime_checkable  # the shape checker looks at arguments
class Sampler(Protocol):
    """Whatever draws completions: `sample`, or an engine with the same arguments and results."""

    def __call__(
        self,
        policy: Policy,
        prompts: Sequence[tuple[int, ...]],
        seeds: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        stop: frozenset[int],
        *,
        ablate_quarantine: bool = False,
    ) -> list[list[Completion]]:
        """One completion of prompt p per seed in seeds[p], with log-probabilities at temperature 1, nats."""
