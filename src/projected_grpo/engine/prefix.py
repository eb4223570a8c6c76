"""Prompts run once for all the completions that follow them, forward and back.

Nothing in a prompt's forward pass depends on what follows it: completions read its keys and values. In the
backward pass all that does is the gradient of these. So the graph is cut there:

    c       = prompt(p; row)                     keys and values of prompt p
    logp_i  = completion(i; c, row)              of rollout i, which reads a copy of its prompt's
    g_i     = d loss / d (the copy of rollout i)
    part k  : d loss / d row through completions i of k, plus d <c, sum over i in k of g_i> / d row

One backward pass through the completions gives every g_i; then one through the prompts for each part that
the fullest prompt has: one if its rollouts are a single part, G if each is a part of its own. Vh x is the
same in all of them and made once.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from projected_grpo.antipasto import Policy
from projected_grpo.engine.batch import SharedBatch, positions
from projected_grpo.engine.logps import chunked_logps, per_token_logps, wide_head
from projected_grpo.engine.tangent import repeated_backward

Leaves = Mapping[str, Float[Tensor, "rows _"]]


def run_prompts(policy: Policy, batch: SharedBatch) -> Any:
    """The cache of every prompt but its last token."""
    base: Any = policy.model.base_model
    return base(
        input_ids=batch.prefix,
        attention_mask=batch.prefix_attention.long(),
        position_ids=positions(batch.prefix_attention),
        use_cache=True,
    ).past_key_values


def run_completions(
    policy: Policy, batch: SharedBatch, cache: Any, chunk: int | None
) -> Float[Tensor, "b T"]:
    """Log-probabilities of completions, nats, 0 on padding, after a cache of each rollout's own prompt."""
    before = batch.prefix_attention[batch.owner]
    tails = batch.tails
    steps = torch.arange(tails.ids.shape[1] - 1, device=before.device)
    inputs = {
        "input_ids": tails.ids[:, :-1],
        # Of the cached prompts' padding alone: nothing real looks ahead at what follows a completion.
        "attention_mask": torch.cat([before, before.new_ones(len(before), len(steps))], dim=1).long(),
        "position_ids": before.sum(1, keepdim=True) + steps,
        "past_key_values": cache,
        "use_cache": True,
    }
    if chunk is not None:
        base: Any = policy.model.base_model
        states = base(**inputs).last_hidden_state
        picked = tails.before_answers(states)
        return tails.spread(chunked_logps(policy.model, picked, tails.answers, chunk))
    with wide_head(policy.model):
        logits = policy.model(**inputs).logits
    return per_token_logps(logits, tails.ids[:, 1:]) * tails.completion


@torch.no_grad()
def shared_logps(policy: Policy, batch: SharedBatch, chunk: int | None = None) -> Float[Tensor, "b T"]:
    """`completion_logps` with each prompt run once, without gradients."""
    cache = run_prompts(policy, batch)
    cache.reorder_cache(batch.owner)
    return run_completions(policy, batch, cache, chunk)


class SharedPass:
    """A pass under `leaves`, of which rollout i uses row `parts[i]`; all rows hold the same values.

    `logp` [b, T] are the completions' log-probabilities.
    """

    def __init__(
        self, policy: Policy, batch: SharedBatch, leaves: Leaves, parts: Sequence[int], chunk: int | None
    ) -> None:
        self.policy, self.owner, self.parts, self.leaves = policy, batch.owner.tolist(), parts, leaves
        prompts = len(batch.prefix)
        self.prompt_leaves = {
            name: leaf.detach()[:1].repeat(prompts, 1).requires_grad_() for name, leaf in leaves.items()
        }
        with policy.bind(self.prompt_leaves):
            cache = run_prompts(policy, batch)
        self.states: list[Tensor] = []  # of the prompts
        self.edges: list[GradientEdge] = []  # of each rollout's copy of them, which is not kept
        owners = {d: batch.owner.to(d) for d in dict.fromkeys(layer.keys.device for layer in cache.layers)}
        for layer in cache.layers:
            layer.keys = self._copied(layer.keys, owners[layer.keys.device])
            layer.values = self._copied(layer.values, owners[layer.values.device])
        with policy.repeat(torch.tensor(parts, device=policy.device)):
            self.logp = run_completions(policy, batch, cache, chunk)

    def _copied(
        self, states: Float[Tensor, "p heads W d"], owner: Int[Tensor, " b"]
    ) -> Float[Tensor, "b heads W d"]:
        copies = states.detach().requires_grad_()[owner]
        if states.requires_grad:  # of a layer after an adapted one
            self.states.append(states)
            self.edges.append(get_gradient_edge(copies))
        return copies

    def gradients(self, value: Float[Tensor, ""]) -> dict[str, Float[Tensor, "rows _"]]:
        """d value / d leaves, where value is a function of `logp`; once."""
        inputs: list[Any] = [*self.leaves.values(), *self.edges]  # torch's types want one kind
        found = torch.autograd.grad(value, inputs)
        out = dict(zip(self.leaves, found, strict=False))
        turns = list(self._turns()) if self.states else []
        for turn in turns:
            last = turn is turns[-1]
            with nullcontext() if last else repeated_backward(self.policy):
                through = self._through_prompts(found[len(out) :], turn, keep_graph=not last)
            pairs = sorted({(self.owner[i], self.parts[i]) for i in turn})
            prompts, rows = torch.tensor(pairs, device=self.policy.device).unbind(1)
            for name, rows_of_prompts in zip(out, through, strict=True):
                if rows_of_prompts is not None:
                    out[name].index_add_(0, rows, rows_of_prompts.index_select(0, prompts))
        return out

    def _through_prompts(
        self, of_copies: Sequence[Tensor], turn: Sequence[int], *, keep_graph: bool
    ) -> tuple[Float[Tensor, "p _"] | None, ...]:
        """Gradients by the prompts' leaves of what these rollouts' copies pass on; None where none comes."""
        index = torch.tensor([(self.owner[i], i) for i in turn])
        there = {device: index.to(device) for device in {states.device for states in self.states}}
        seeds = []
        for states, g in zip(self.states, of_copies, strict=True):
            owner, rows = there[g.device].unbind(1)
            seeds.append(torch.zeros_like(states).index_add_(0, owner, g.index_select(0, rows)))
        # The last layer's leaves but for its keys and values are not used.
        leaves = list(self.prompt_leaves.values())
        return torch.autograd.grad(self.states, leaves, seeds, retain_graph=keep_graph, allow_unused=True)

    def _turns(self) -> Iterator[list[int]]:
        """Rollouts by backward pass through the prompts: of a prompt, those of one part each time."""
        parts_of: dict[int, list[int]] = {}
        for prompt, part in zip(self.owner, self.parts, strict=True):
            if part not in parts_of.setdefault(prompt, []):
                parts_of[prompt].append(part)
        place = [parts_of[p].index(k) for p, k in zip(self.owner, self.parts, strict=True)]
        for turn in range(max(place) + 1):
            yield [i for i, at in enumerate(place) if at == turn]
