"""Decoding: prompts prefilled once, a key-value cache with room for what comes, rows that leave when done."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from projected_grpo.antipasto import Policy
from projected_grpo.config import SamplingConfig
from projected_grpo.engine.batch import PAD, left_padded, positions
from projected_grpo.engine.logps import per_token_logps, wide_head
from projected_grpo.rollout import Completion, uniforms

COMPACT_AT = 0.125  # share of finished rows at which the batch is made smaller


def pick_tokens(
    logits: Float[Tensor, "b v"],
    u: Float[Tensor, " b"],
    temperature: float,
    top_k: int,
    top_p: float,
) -> Int[Tensor, " b"]:
    """Inverse-CDF sample from the tempered distribution cut to top_k (0: all), then to the top_p nucleus."""
    count = min(top_k, logits.shape[-1]) if top_k > 0 else logits.shape[-1]
    values, order = logits.float().topk(count, dim=-1)
    p = (values / temperature).softmax(-1)
    p = p * (p.cumsum(-1) - p < top_p)
    cdf = p.cumsum(-1)
    drawn = (cdf < u[:, None] * cdf[:, -1:]).sum(-1, keepdim=True)  # a u rounded up to 1 stays in the nucleus
    return order.gather(-1, drawn).squeeze(-1)


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[tuple[int, ...]],
    copies: Sequence[int],
    draws: Float[Tensor, "n T"],
    sampling: SamplingConfig,
    stop: frozenset[int],
) -> list[Completion]:
    """Completions (stop token included) and their log-probabilities at temperature 1, on the CPU.

    Rows are copies[p] of prompt p, adjacent. Each prompt is prefilled once and its cache repeated; finished
    rows leave the batch.
    """
    device = next(model.parameters()).device
    n, max_new = draws.shape
    if sum(copies) != n or len(copies) != len(prompts):
        raise ValueError(f"{n} rows do not match copies {list(copies)} of {len(prompts)} prompts")
    prefix, attention = left_padded(prompts, device)
    out = model(
        input_ids=prefix,
        attention_mask=attention.long(),
        position_ids=positions(attention),
        logits_to_keep=1,
        use_cache=True,
    )
    cache, logits = out.past_key_values, out.logits[:, -1]
    repeat = torch.arange(len(prompts)).repeat_interleave(torch.tensor(copies)).to(device)
    reserve(cache, repeat, max_new - 1)
    attention, logits = attention[repeat], logits[repeat]
    stops = torch.tensor(sorted(stop), device=device)
    draws = draws.to(device, torch.float32)
    tokens = torch.full((n, max_new), PAD, device=device)
    logps = torch.zeros(n, max_new, device=device)
    lengths = torch.zeros(n, dtype=torch.long, device=device)
    row = torch.arange(n, device=device)  # which rollout each row of the batch is
    live = torch.ones(n, dtype=torch.bool, device=device)  # rows of the batch not finished yet
    for t in range(max_new):
        token = pick_tokens(logits, draws[row, t], sampling.temperature, sampling.top_k, sampling.top_p)
        logp = per_token_logps(logits[:, None], token[:, None])[:, 0].float()
        tokens[row[live], t], logps[row[live], t], lengths[row[live]] = token[live], logp[live], t + 1
        live = live & ~torch.isin(token, stops)
        alive = int(live.sum())
        if alive == 0 or t + 1 == max_new:
            break
        if alive <= (1 - COMPACT_AT) * len(live):
            keep = live.nonzero().squeeze(1)
            cache.reorder_cache(keep)
            attention, token, row, live = attention[keep], token[keep], row[keep], live[keep]
        attention = torch.cat([attention, attention.new_ones(len(row), 1)], dim=1)
        out = model(
            input_ids=token[:, None],
            attention_mask=attention.long(),
            position_ids=positions(attention)[:, -1:],
            past_key_values=cache,
            use_cache=True,
        )
        logits = out.logits[:, -1]
    ends = lengths.tolist()
    ids, scores = tokens.tolist(), logps.cpu()
    return [(tuple(ids[i][:end]), scores[i, :end].clone()) for i, end in enumerate(ends)]


def sample(
    policy: Policy,
    prompts: Sequence[tuple[int, ...]],
    seeds: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    stop: frozenset[int],
    *,
    ablate_quarantine: bool = False,
) -> list[list[Completion]]:
    """One completion of prompt p per seed in seeds[p], from the policy as trained or as deployed.

    Decoding runs on merged weights. Prompts without seeds generate nothing.
    """
    asked = [p for p, group in enumerate(seeds) if group]
    if not asked:
        return [[] for _ in prompts]
    copies = [len(seeds[p]) for p in asked]
    draws = torch.stack([uniforms(s, sampling.max_new) for group in seeds for s in group])
    deltas = policy.deltas(ablate_quarantine=ablate_quarantine)
    with policy.merge(deltas), wide_head(policy.model):
        drawn = iter(generate(policy.model, [prompts[p] for p in asked], copies, draws, sampling, stop))
    return [[next(drawn) for _ in group] for group in seeds]


class RoomyLayer(DynamicLayer):
    """Rows of a layer's cache, in tensors that have room for this many more tokens.

    For decoding: tokens are appended and rows chosen, and nothing else is done.

    `keys` and `values` are views of what is written so far. IndexError when the room is used up.
    """

    def __init__(self, layer: DynamicLayer, rows: Int[Tensor, " n"], room: int) -> None:
        super().__init__()
        assert layer.keys is not None and layer.values is not None
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True
        self.length = layer.keys.shape[-2]
        self.capacity = self.length + room
        self.held = (layer.keys, layer.values)
        self.reorder_cache(rows)

    def reorder_cache(self, beam_idx: Int[Tensor, " n"]) -> None:
        """Keep these rows, in this order, once for every time they are named."""
        keys, values = self.held
        self.held = (self._rows(keys, beam_idx), self._rows(values, beam_idx))
        self._show()

    def update(
        self,
        key_states: Float[Tensor, "n heads t d"],
        value_states: Float[Tensor, "n heads t d"],
        *args: object,
        **kwargs: object,
    ) -> tuple[Float[Tensor, "n heads all d"], Float[Tensor, "n heads all d"]]:
        """Append new tokens; returns all."""
        start, self.length = self.length, self.length + key_states.shape[-2]
        if self.length > self.capacity:
            raise IndexError(f"{self.length} tokens for a cache of {self.capacity}")
        for held, new in zip(self.held, (key_states, value_states), strict=True):
            held[:, :, start : self.length] = new
        return self._show()

    def _rows(
        self, states: Float[Tensor, "b heads held d"], rows: Int[Tensor, " n"]
    ) -> Float[Tensor, "n heads {self.capacity} d"]:
        _, heads, _, width = states.shape
        out = states.new_empty(len(rows), heads, self.capacity, width)
        out[:, :, : self.length] = states[rows.to(states.device), :, : self.length]
        return out

    def _show(self) -> tuple[Tensor, Tensor]:
        keys, values = self.held
        self.keys, self.values = keys[:, :, : self.length], values[:, :, : self.length]
        return self.keys, self.values


def reserve(cache: Any, rows: Int[Tensor, " n"], room: int) -> None:
    """Keep these rows of a model's cache, with room for this many tokens in layers that would copy them all.

    Layers of other kinds (a window, a state) hold little, and stay of their kind.
    """
    if not hasattr(cache, "layers"):  # a model's own kind of cache, in early releases of transformers 5
        cache.reorder_cache(rows)
        return
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = RoomyLayer(layer, rows, room)
        else:
            layer.reorder_cache(rows)
