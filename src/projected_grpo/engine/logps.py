"""Log-probabilities of completion tokens, with logits made a chunk at a time where they are large."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from projected_grpo.antipasto import Policy
from projected_grpo.engine.batch import Batch


def per_token_logps(logits: Float[Tensor, "b t v"], ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    """log p(ids) under logits, in nats, at least float32; no second [b, t, v] tensor of log-softmax."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - wide.logsumexp(-1)


@contextmanager
def wide_head(model: nn.Module) -> Iterator[None]:
    """Within it the model's output layer computes in float32 at least, for its sampler and its loss alike.

    bfloat16 logits from 32 to 64 lie on a grid of 1/4. Where two kernels round one to different neighbours,
    the token's importance weight is off by a factor of up to exp(1/4) = 1.28.
    """
    parts: Any = model
    head = parts.get_output_embeddings()
    weight, bias = in_float32(head.weight, head.bias)
    head.forward = lambda x: F.linear(x.to(weight.dtype), weight, bias)
    try:
        yield
    finally:
        del head.forward


def in_float32(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """An output layer's parameters, as they are unless in half precision."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(wide), None if bias is None else bias.to(wide)


# Logits that the loss makes at once: 256 MiB in float32, 441 tokens of Qwen3's vocabulary, which is enough
# for a matrix product to fill a GPU. Small vocabularies never reach it.
CHUNK_LOGITS = 2**26


class _HeadLogps(torch.autograd.Function):
    """log p(ids) of hidden states under an output layer that is not trained, `size` tokens at a time.

    d logp / d state = (onehot(id) - p) W for any loss of logp, so the forward pass makes it while
    it has p, and neither keeps logits for the backward pass nor makes them twice.
    """

    @staticmethod
    def forward(ctx, states, weight, bias, ids, size):  # type: ignore[no-untyped-def]  # torch's own signature
        head, head_bias = in_float32(weight, bias)
        logps = states.new_empty(len(ids), dtype=head.dtype)
        slopes = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        for start in range(0, len(ids), size):
            here = slice(start, start + size)
            out = None if slopes is None else slopes[here]
            logps[here] = _some_logps(states[here], head, head_bias, ids[here, None], weight, out)
        ctx.save_for_backward(slopes)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (slopes,) = ctx.saved_tensors
        return (grad[:, None] * slopes).to(slopes.dtype), None, None, None, None


def _some_logps(
    states: Float[Tensor, "c d"],
    head: Float[Tensor, "v d"],
    bias: Float[Tensor, " v"] | None,
    ids: Int[Tensor, "c 1"],
    weight: Float[Tensor, "v d"],
    slopes: Float[Tensor, "c d"] | None,
) -> Float[Tensor, " c"]:
    """One chunk, by `head`, the weight in float32 at least; writes into `slopes`.

    A function of its own, so that its logits die before the next ones.
    """
    wide = F.linear(states.to(head.dtype), head, bias)
    total = wide.logsumexp(-1, keepdim=True)
    logps = (wide.gather(-1, ids) - total)[:, 0]
    if slopes is not None:
        rest = wide.sub_(total).exp_().neg_()
        rest.scatter_add_(-1, ids, torch.ones_like(total))
        torch.mm(rest.to(weight.dtype), weight, out=slopes)
    return logps


def head_chunk(policy: Policy, tokens: int) -> int | None:
    """Tokens whose logits the loss makes at once; None for all of them, by the model's own forward pass.

    That is where all fit, and for a model that does more to its logits than its output layer does.
    """
    parts: Any = policy.model
    vocabulary = len(parts.get_output_embeddings().weight)
    if tokens * vocabulary <= CHUNK_LOGITS or not policy.has_bare_head:
        return None
    return max(1, CHUNK_LOGITS // vocabulary)


def chunked_logps(
    model: nn.Module, states: Float[Tensor, "tokens d"], ids: Int[Tensor, " tokens"], chunk: int
) -> Float[Tensor, " tokens"]:
    """Log-probability of each id under the last hidden state before it, nats, `chunk` of them at a time.

    Gradients reach the states, or a tangent passes where none are wanted; ValueError for an output layer that
    is trained.
    """
    parts: Any = model
    head = parts.get_output_embeddings()
    if not torch.is_grad_enabled():
        weight, bias = in_float32(head.weight, head.bias)
        pieces = zip(states.split(chunk), ids[:, None].split(chunk), strict=True)
        return torch.cat([_some_logps(x, weight, bias, i, head.weight, None) for x, i in pieces])
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
    with wide_head(model):
        logits = model(input_ids=batch.ids, use_cache=False, logits_to_keep=keep).logits
    picked = batch.before_answers(logits, batch.first)
    return batch.spread(per_token_logps(picked[None], batch.answers[None])[0])


def can_share(model: nn.Module) -> bool:
    """Whether a prompt's cache holds all that its continuations read: full attention in every layer."""
    config: Any = model.config
    kinds = getattr(config.get_text_config(), "layer_types", None) or ("full_attention",)
    return set(kinds) == {"full_attention"}
