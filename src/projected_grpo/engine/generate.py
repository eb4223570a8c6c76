"""Decoding: prompts prefilled once, a key-value cache that grows in blocks, rows that leave when done.

A step of decoding (`Decoding.step`) works on tensors whose shapes are the same until rows leave or the cache
grows, and the host reads none of them. So the device is waited for only where finished rows are looked for,
and within a bucket of (rows, cache length) a step could be captured once and replayed.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from loguru import logger
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import DynamicLayer

from projected_grpo.antipasto import Policy
from projected_grpo.config import SamplingConfig
from projected_grpo.engine.attention import decoding
from projected_grpo.engine.batch import PAD, left_padded, positions
from projected_grpo.engine.capacity import rows_that_fit
from projected_grpo.engine.logps import per_token_logps, wide_head
from projected_grpo.errors import UserError
from projected_grpo.rollout import Completion, uniforms

COMPACT_AT = 0.125  # share of finished rows at which the batch is made smaller
BLOCK = 256  # tokens by which a cache grows
LOOK_EVERY = 16  # tokens between looks for finished rows, each of which waits for the device


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


class Decoding:
    """Rows of a batch on their way, and what they have said, on the model's device.

    Rows are copies[p] of prompt p, adjacent. `packed`: of `attention.decoding`.
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[tuple[int, ...]],
        copies: Sequence[int],
        draws: Float[Tensor, "n T"],
        sampling: SamplingConfig,
        stop: frozenset[int],
        packed: bool,
    ) -> None:
        device = next(model.parameters()).device
        n, max_new = draws.shape
        self.model, self.sampling = model, sampling
        self.stops = torch.tensor(sorted(stop), device=device)
        prefix, attention = left_padded(prompts, device)
        out = model(
            input_ids=prefix,
            attention_mask=attention.long(),
            position_ids=positions(attention),
            logits_to_keep=1,
            use_cache=True,
        )
        self.cache = out.past_key_values
        repeat = torch.arange(len(prompts)).repeat_interleave(torch.tensor(copies)).to(device)
        self.width = prefix.shape[1]
        self.written = self.capacity = self.width  # tokens of the cache, and with its room
        self.seen = attention[repeat]  # which places of the cache a row attends to
        self.places = reserve(self.cache, repeat, self.width)
        # Shapes are, where there is no layer whose cache grows by itself.
        self.fixed = packed and {type(layer) for layer in getattr(self.cache, "layers", ())} == {RoomyLayer}
        self.position = self.seen.sum(1, keepdim=True)
        self.draws = draws.to(device, torch.float32)
        self.t = torch.zeros(1, dtype=torch.long, device=device)
        self.tokens = torch.full((n, max_new), PAD, device=device)
        self.logps = torch.zeros(n, max_new, device=device)
        self.counts = torch.zeros(n, 1, dtype=torch.long, device=device)
        self.row = torch.arange(n, device=device)  # which rollout each row of the batch is
        self.live = torch.ones(n, dtype=torch.bool, device=device)  # rows of the batch not finished yet
        self.token = torch.full((n,), PAD, device=device)
        self.draw(out.logits[:, -1][repeat])

    def step(self) -> None:
        """Run the last tokens and draw the next ones."""
        self.written += 1
        self.seen.index_fill_(1, self.places[self.seen.device], True)
        out = self.model(
            input_ids=self.token[:, None],
            # Ready-made where it can be: else the model makes it, out of lengths that the host counts.
            attention_mask=self.seen[:, None, None] if self.fixed else self.seen[:, : self.written].long(),
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.position += 1
        for place in self.places.values():
            place += 1
        self.draw(out.logits[:, -1])

    def draw(self, logits: Float[Tensor, "b v"]) -> None:
        """Pick every row's next token, and write down those of rows that are not finished."""
        s, t, row, live = self.sampling, self.t, self.row, self.live
        token = pick_tokens(logits, self.draws[row, t], s.temperature, s.top_k, s.top_p)
        logp = per_token_logps(logits[:, None], token[:, None])[:, 0].float()
        self.token.copy_(token)
        self.tokens[row, t] = torch.where(live, token, PAD)
        self.logps[row, t] = torch.where(live, logp, 0.0)
        self.counts[row, 0] += live
        live &= ~(token[:, None] == self.stops).any(1)
        t += 1

    def grow(self) -> None:
        """Room for the next block of tokens."""
        end = self.width + self.draws.shape[1] - 1  # the last token drawn is never run
        room = min(BLOCK, end - self.capacity)
        for layer in getattr(self.cache, "layers", ()):
            if isinstance(layer, RoomyLayer):
                layer.grow(room)
        self.seen = F.pad(self.seen, (0, room))
        self.capacity += room

    def drop_finished(self) -> bool:
        """Fewer rows where enough are finished; False if all are. The device is waited for once."""
        alive = int(self.live.sum())
        if 0 < alive <= (1 - COMPACT_AT) * len(self.live):
            keep = self.live.byte().argsort(descending=True, stable=True)[:alive]  # nonzero would wait again
            self.cache.reorder_cache(keep)
            self.seen, self.position = self.seen[keep], self.position[keep]
            self.token, self.row, self.live = self.token[keep], self.row[keep], self.live[keep]
        return alive > 0

    def completions(self) -> list[Completion]:
        """What every rollout said, on the CPU: one copy, so one wait for the device; floats go as bits."""
        bits = self.logps.view(torch.int32).long()
        found = torch.cat([self.tokens, bits, self.counts], dim=1).cpu()
        ids, bits, counts = found.split([self.tokens.shape[1], bits.shape[1], 1], dim=1)
        logps, rows = bits.int().view(torch.float32), ids.tolist()
        return [(tuple(rows[i][:end]), logps[i, :end].clone()) for i, end in enumerate(counts[:, 0].tolist())]


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[tuple[int, ...]],
    copies: Sequence[int],
    draws: Float[Tensor, "n T"],
    sampling: SamplingConfig,
    stop: frozenset[int],
    look_every: int = LOOK_EVERY,
) -> list[Completion]:
    """Completions (stop token included) and their log-probabilities at temperature 1, on the CPU.

    Rows are copies[p] of prompt p, adjacent. Each prompt is prefilled once and its cache repeated; finished
    rows leave the batch where they are looked for, every so many tokens.
    """
    n, max_new = draws.shape
    if sum(copies) != n or len(copies) != len(prompts):
        raise ValueError(f"{n} rows do not match copies {list(copies)} of {len(prompts)} prompts")
    with decoding(model) as packed:
        rows = Decoding(model, prompts, copies, draws, sampling, stop, packed)
        for t in range(1, max_new):
            if t % look_every == 0 and not rows.drop_finished():
                break
            if rows.written == rows.capacity:
                rows.grow()
            rows.step()
        return rows.completions()


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

    Decoding runs on merged weights, in one batch, or in as few equal ones as fit into memory; one that does
    not fit after all is run in halves. UserError if a single row does not fit.
    """
    rows = [(p, seed) for p, group in enumerate(seeds) for seed in group]
    if not rows:
        return [[] for _ in prompts]
    look_every = 1 if policy.device.type == "cpu" else LOOK_EVERY  # a CPU is not waited for
    deltas = policy.deltas(ablate_quarantine=ablate_quarantine)
    drawn: list[Completion] = []
    with policy.merge(deltas), wide_head(policy.model):
        longest = max(len(prompts[p]) for p, _ in rows) + sampling.max_new
        fit = rows_that_fit(policy.model, longest, len(rows))
        waiting = in_parts(rows, -(-len(rows) // fit))[::-1]
        while waiting:
            part = waiting.pop()
            copies = Counter(p for p, _ in part)
            draws = torch.stack([uniforms(seed, sampling.max_new) for _, seed in part])
            try:
                drawn += generate(
                    policy.model,
                    [prompts[p] for p in copies],
                    [*copies.values()],
                    draws,
                    sampling,
                    stop,
                    look_every,
                )
                continue
            except torch.OutOfMemoryError as error:
                if len(part) == 1:
                    raise UserError("one rollout alone does not fit into memory; lower --max-new") from error
                waiting += in_parts(part, 2)[::-1]
                logger.warning("out of memory: a batch of {} rollouts is generated in halves", len(part))
            torch.cuda.empty_cache()  # outside the handler: its traceback held the tensors
    said = iter(drawn)
    return [[next(said) for _ in group] for group in seeds]


def in_parts(rows: Sequence[tuple[int, int]], count: int) -> list[list[tuple[int, int]]]:
    """Consecutive parts of sizes that differ by one at most, the larger ones first."""
    size, more = divmod(len(rows), count)
    starts = [i * size + min(i, more) for i in range(count + 1)]
    return [list(rows[a:b]) for a, b in zip(starts, starts[1:], strict=False)]


class RoomyLayer(DynamicLayer):
    """Rows of a layer's cache, in tensors of `capacity` tokens of which `length` are written.

    For decoding: a token a row is written at `place`, whoever shares that moves it on; rows are chosen, the
    capacity grows, and nothing else is done. `keys` and `values` are whole: what is not written is zero, and
    for the mask to hide. IndexError when the capacity is used up.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, layer: DynamicLayer, rows: Int[Tensor, " n"], place: Int[Tensor, " 1"]) -> None:
        super().__init__()
        assert layer.keys is not None and layer.values is not None
        self.keys, self.values, self.place = layer.keys, layer.values, place
        self.dtype, self.device, self.is_initialized = self.keys.dtype, self.keys.device, True
        self.length = self.capacity = layer.keys.shape[-2]
        self.reorder_cache(rows)

    def grow(self, room: int) -> None:
        """Room for this many tokens more."""
        self.capacity += room
        self.keys, self.values = (F.pad(held, (0, 0, 0, room)) for held in (self.keys, self.values))

    def reorder_cache(self, beam_idx: Int[Tensor, " n"]) -> None:
        """Keep these rows, in this order, once for every time they are named."""
        rows = beam_idx.to(self.keys.device)
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)

    def update(
        self,
        key_states: Float[Tensor, "n heads 1 d"],
        value_states: Float[Tensor, "n heads 1 dv"],
        *args: object,
        **kwargs: object,
    ) -> tuple[Float[Tensor, "n heads all d"], Float[Tensor, "n heads all dv"]]:
        """Write a token; returns all, with what is not written."""
        self.length += 1
        if self.length > self.capacity:
            raise IndexError(f"{self.length} tokens for a cache of {self.capacity}")
        self.keys.index_copy_(2, self.place, key_states)
        self.values.index_copy_(2, self.place, value_states)
        return self.keys, self.values

    def get_seq_length(self, *args: object) -> int:
        """Tokens that are written."""
        return self.length

    def get_mask_sizes(self, *args: object) -> tuple[int, int]:
        """Of the mask over all of it: its length, and the place it begins at."""
        return self.capacity, 0


def reserve(cache: Any, rows: Int[Tensor, " n"], length: int) -> dict[torch.device, Int[Tensor, " 1"]]:
    """Keep these rows of a model's cache of `length` tokens, in `RoomyLayer`s where it would copy all tokens.

    Returns the place of the next token on each device. Layers of other kinds (a window, a state) hold little,
    and stay of their kind.
    """
    places = {rows.device: torch.tensor([length], device=rows.device)}
    if not hasattr(cache, "layers"):  # a model's own kind of cache, in early releases of transformers 5
        cache.reorder_cache(rows)
        return places
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            assert layer.keys is not None
            device = layer.keys.device
            if device not in places:
                places[device] = torch.tensor([length], device=device)
            cache.layers[i] = RoomyLayer(layer, rows, places[device])
        else:
            layer.reorder_cache(rows)
    return places
