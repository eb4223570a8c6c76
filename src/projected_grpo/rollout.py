"""Sampling completions and scoring tokens, with seeds by coordinates rather than by history.

A rollout's randomness is a stream of uniforms drawn from (seed, step, prompt, row); each token is the inverse
of the filtered distribution at the next uniform. So what a row samples depends on nothing that happened
before it, and rows may share a batch, leave it early or be resumed; the others change by rounding at most.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from projected_grpo.antipasto import Policy
from projected_grpo.config import SamplingConfig
from projected_grpo.kvcache import reserve
from projected_grpo.proj import per_token_logps
from projected_grpo.seeds import uniforms

Completion = tuple[tuple[int, ...], Float[Tensor, " t"]]  # token ids and their log-probabilities, nats
COMPACT_AT = 0.125  # share of finished rows at which the batch is made smaller
# Logits that the loss makes at once: 256 MiB in float32, 441 tokens of Qwen3's vocabulary, which is enough
# for a matrix product to fill a GPU. Small vocabularies never reach it.
CHUNK_LOGITS = 2**26
PROBED = 8  # tokens that show whether logits are capped or scaled


@dataclass(frozen=True)
class Rollout:
    """One prompt and one completion. logp_old [T] are its log-probabilities when sampled, None off-policy."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    text: str
    logp_old: Float[Tensor, " T"] | None = None
    is_teacher: bool = False
    ablated: bool = False


@dataclass(frozen=True)
class Batch:
    """Rollouts, right-padded; `rows` and `columns` are the places of completion tokens, row after row.

    Attention looks back only, so nothing real ever sees padding that comes behind it, and no mask is needed;
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
        """Completion tokens of all rows, one row behind the other."""
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


def collate(rollouts: Sequence[Rollout], pad_id: int, device: torch.device) -> Batch:
    """Pad rollouts into one batch. Raises ValueError for one without a prompt: nothing predicts its start."""
    starts = [len(r.prompt_ids) for r in rollouts]
    counts = [len(r.completion_ids) for r in rollouts]
    if not all(starts):
        raise ValueError("a rollout has no prompt")
    width = max(start + max(1, count) for start, count in zip(starts, counts, strict=True))
    ids = torch.full((len(rollouts), width), pad_id)
    completion = torch.zeros(len(rollouts), max(1, *counts), dtype=torch.bool)
    for row, rollout in enumerate(rollouts):
        ids[row, : starts[row] + counts[row]] = torch.tensor(rollout.prompt_ids + rollout.completion_ids)
        completion[row, : counts[row]] = True
    rows, offsets = completion.nonzero(as_tuple=True)
    columns = torch.tensor(starts)[rows] + offsets
    to = partial(torch.Tensor.to, device=device)
    return Batch(to(ids), to(rows), to(columns), to(completion), min(starts) - 1)


def left_padded(
    prompts: Sequence[tuple[int, ...]], pad_id: int, device: torch.device
) -> tuple[Int[Tensor, "p W"], Bool[Tensor, "p W"]]:
    """Prompts that end at one column, so that all can be continued there, and which tokens are real."""
    width = max(1, max(map(len, prompts)))
    ids = torch.full((len(prompts), width), pad_id)
    attention = torch.zeros_like(ids, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        attention[row, width - len(prompt) :] = True
    return ids.to(device), attention.to(device)


def collate_shared(rollouts: Sequence[Rollout], pad_id: int, device: torch.device) -> SharedBatch:
    """Pad rollouts into one batch that holds each prompt once, in the order in which they come."""
    prompts = list(dict.fromkeys(r.prompt_ids for r in rollouts))
    prefix, real = left_padded([prompt[:-1] for prompt in prompts], pad_id, device)
    tails = collate([Rollout(r.prompt_ids[-1:], r.completion_ids, "") for r in rollouts], pad_id, device)
    owner = torch.tensor([prompts.index(r.prompt_ids) for r in rollouts], device=device)
    return SharedBatch(prefix, real, owner, tails)


def positions(attention: Bool[Tensor, "b L"]) -> Int[Tensor, "b L"]:
    """Position of each token counted from its row's first real token."""
    return (attention.long().cumsum(1) - 1).clamp_min(0)


class _HeadLogps(torch.autograd.Function):
    """log p(ids) of hidden states under an output layer that is not trained, `size` tokens at a time.

    d logp / d state = (onehot(id) - p) W whatever a loss does with logp, so the forward pass makes it while
    it has p, and neither keeps logits for the backward pass nor makes them twice.
    """

    @staticmethod
    def forward(ctx, states, weight, bias, ids, size):  # type: ignore[no-untyped-def]  # torch's own signature
        logps = states.new_empty(len(ids), dtype=torch.promote_types(states.dtype, torch.float32))
        slopes = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        for start in range(0, len(ids), size):
            here = slice(start, start + size)
            out = None if slopes is None else slopes[here]
            logps[here] = _some_logps(states[here], weight, bias, ids[here, None], out)
        ctx.save_for_backward(slopes)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (slopes,) = ctx.saved_tensors
        return (grad[:, None] * slopes).to(slopes.dtype), None, None, None, None


def _some_logps(
    states: Float[Tensor, "c d"],
    weight: Float[Tensor, "v d"],
    bias: Float[Tensor, " v"] | None,
    ids: Int[Tensor, "c 1"],
    slopes: Float[Tensor, "c d"] | None,
) -> Float[Tensor, " c"]:
    """One chunk; writes into `slopes`. A function of its own, so that its logits die before the next ones."""
    wide = F.linear(states, weight, bias)
    wide = wide.to(torch.promote_types(wide.dtype, torch.float32))
    total = wide.logsumexp(-1, keepdim=True)
    logps = (wide.gather(-1, ids) - total)[:, 0]
    if slopes is not None:
        rest = wide.sub_(total).exp_().neg_()
        rest.scatter_add_(-1, ids, torch.ones_like(total))
        torch.mm(rest.to(weight.dtype), weight, out=slopes)
    return logps


def head_chunk(model: nn.Module, tokens: int) -> int | None:
    """Tokens whose logits the loss makes at once; None for all of them, by the model's own forward pass.

    That is where all fit, and for a model that does more to its logits than its output layer does.
    """
    parts: Any = model
    vocabulary = len(parts.get_output_embeddings().weight)
    if tokens * vocabulary <= CHUNK_LOGITS or not has_bare_head(model):
        return None
    return max(1, CHUNK_LOGITS // vocabulary)


@torch.no_grad()
def has_bare_head(model: nn.Module) -> bool:
    """Whether logits are the output layer of the last hidden states and no more; a few tokens show it."""
    parts: Any = model
    head = parts.get_output_embeddings()
    seen: dict[str, Tensor] = {}
    watches = (
        parts.base_model.register_forward_hook(lambda _, x, y: seen.update(base=y.last_hidden_state)),
        head.register_forward_hook(lambda _, x, y: seen.update(fed=x[0], said=y)),
    )
    try:
        ids = torch.arange(PROBED, device=head.weight.device)[None] % len(head.weight)
        logits = parts(input_ids=ids, use_cache=False).logits
    finally:
        for watch in watches:
            watch.remove()
    return torch.equal(seen["fed"], seen["base"]) and torch.equal(seen["said"], logits)


def chunked_logps(
    model: nn.Module, states: Float[Tensor, "tokens d"], ids: Int[Tensor, " tokens"], chunk: int
) -> Float[Tensor, " tokens"]:
    """Log-probability of each id under the last hidden state before it, nats, `chunk` of them at a time.

    Gradients reach the states; ValueError for an output layer that is trained itself.
    """
    parts: Any = model
    head = parts.get_output_embeddings()
    if head.weight.requires_grad:
        raise ValueError("the output layer is trained: its gradient needs whole logits")
    logps: Tensor = _HeadLogps.apply(states, head.weight, head.bias, ids, chunk)
    return logps


def completion_logps(model: nn.Module, batch: Batch, chunk: int | None = None) -> Float[Tensor, "b T"]:
    """Log-probability of each completion token, nats, at temperature 1; 0 on padding.

    The output layer runs on the columns from the first completion on (whole-sequence logits were a 4 GiB
    spike on Qwen3-4B), or, `chunk` of them at a time if it is given, on completion tokens only.
    """
    if chunk is not None:
        base: Any = model.base_model
        states = base(input_ids=batch.ids, use_cache=False).last_hidden_state
        return batch.spread(chunked_logps(model, batch.before_answers(states), batch.answers, chunk))
    keep = batch.ids.shape[1] - batch.first
    logits = model(input_ids=batch.ids, use_cache=False, logits_to_keep=keep).logits
    picked = batch.before_answers(logits, batch.first)
    return batch.spread(per_token_logps(picked[None], batch.answers[None])[0])


def can_share(model: nn.Module) -> bool:
    """Whether a prompt's cache holds all that its continuations read: full attention in every layer."""
    config: Any = model.config
    kinds = getattr(config.get_text_config(), "layer_types", None) or ("full_attention",)
    return set(kinds) == {"full_attention"}


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
    pad_id: int,
) -> list[Completion]:
    """Completions (stop token included) and their log-probabilities at temperature 1, on the CPU.

    Rows are copies[p] of prompt p, adjacent. Each prompt is prefilled once and its cache repeated; finished
    rows leave the batch.
    """
    device = next(model.parameters()).device
    n, max_new = draws.shape
    if sum(copies) != n or len(copies) != len(prompts):
        raise ValueError(f"{n} rows do not match copies {list(copies)} of {len(prompts)} prompts")
    prefix, attention = left_padded(prompts, pad_id, device)
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
    tokens = torch.full((n, max_new), pad_id, device=device)
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
        pad_id: int,
        *,
        ablate_quarantine: bool = False,
    ) -> list[list[Completion]]:
        """One completion of prompt p per seed in seeds[p], with log-probabilities at temperature 1, nats."""


def sample(
    policy: Policy,
    prompts: Sequence[tuple[int, ...]],
    seeds: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    stop: frozenset[int],
    pad_id: int,
    *,
    ablate_quarantine: bool = False,
) -> list[list[Completion]]:
    """One completion of prompt p per seed in seeds[p], from the policy as trained or as deployed.

    Decoding runs on merged weights. Prompts without seeds generate nothing.
    """
    asked = [p for p, group in enumerate(seeds) if group]
    out: list[list[Completion]] = [[] for _ in prompts]
    if not asked:
        return out
    copies = [len(seeds[p]) for p in asked]
    draws = torch.stack([uniforms(s, sampling.max_new) for group in seeds for s in group])
    with policy.merge(policy.deltas(ablate_quarantine=ablate_quarantine)):
        flat = generate(policy.model, [prompts[p] for p in asked], copies, draws, sampling, stop, pad_id)
    start = 0
    for p, count in zip(asked, copies, strict=True):
        out[p] = flat[start : start + count]
        start += count
    return out
