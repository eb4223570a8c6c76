"""Scores of tokens: against one gradient per token by plain autograd, and where tokens stand in a text."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from projected_grpo.antipasto import wrap
from projected_grpo.config import LossConfig
from projected_grpo.engine.batch import collate
from projected_grpo.engine.logps import completion_logps
from projected_grpo.engine.models import decode
from projected_grpo.errors import UserError
from projected_grpo.rollout import Rollout
from projected_grpo.run.token_scores import piece_lengths, token_scores

# Of one prompt with two completions, of another with one, and one that says nothing.
IDS = [((5, 9, 2), (7, 30, 4, 11)), ((5, 9, 2), (8, 3)), ((1, 40), (6, 17, 22)), ((1, 40, 3), ())]
ROLLOUTS = [Rollout(prompt, completion, "") for prompt, completion in IDS]


def drawn(policy, scale):
    """Values for every module's delta, from a stream of their own."""
    generator = torch.Generator().manual_seed(3)
    dtype = next(iter(policy.layers.values())).delta_s.dtype
    return {m: scale * torch.randn(r, generator=generator, dtype=dtype) for m, r in policy.ranks.items()}


def one_gradient_per_token(policy, deltas, v):
    """-d logp_t . v / |v| with v over all modules together, by a backward pass for every token."""
    leaves = {m: delta.clone().requires_grad_() for m, delta in deltas.items()}
    length = sum(float((u**2).sum()) for u in v.values()) ** 0.5
    found = []
    for rollout in ROLLOUTS:
        with policy.bind(leaves):
            logp = completion_logps(policy.model, collate([rollout], policy.device))[0]
        row = []
        for t in range(len(rollout.completion_ids)):
            grads = torch.autograd.grad(logp[t], list(leaves.values()), retain_graph=True, allow_unused=True)
            pairs = zip(grads, v.values(), strict=True)
            row.append(-sum(float((g * u).sum()) for g, u in pairs if g is not None) / length)
        found.append(torch.tensor(row))
    return found


@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen3_5"])
@pytest.mark.parametrize("chunk", [None, 3])
def test_each_score_is_that_tokens_own_gradient_along_v(small_model, monkeypatch, family, chunk):
    policy = wrap(small_model(family), None)
    monkeypatch.setattr("projected_grpo.run.token_scores.head_chunk", lambda policy, tokens: chunk)
    deltas, v = drawn(policy, 0.1), {m: u + 1 for m, u in drawn(policy, 1.0).items()}
    before = completion_logps(policy.model, collate(ROLLOUTS, policy.device))
    attention = policy.model.config._attn_implementation
    expected = one_gradient_per_token(policy, deltas, v)
    for tokens in (4096, 1):  # all in a batch, prompts shared where the model can; and each alone
        found = token_scores(policy, ROLLOUTS, v, deltas, LossConfig(tokens_per_microbatch=tokens))
        for own, row in zip(found, expected, strict=True):
            torch.testing.assert_close(own, row, rtol=1e-4, atol=1e-5)
    assert max(float(row.abs().max()) for row in expected if len(row)) > 1e-2, "else nothing is compared"
    assert torch.equal(completion_logps(policy.model, collate(ROLLOUTS, policy.device)), before)
    assert policy.model.config._attn_implementation == attention


class Opaque(torch.autograd.Function):
    """An operation with a backward pass alone, as fused kernels are."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_a_model_that_forward_mode_cannot_follow_is_told_in_one_line(small_model):
    policy = wrap(small_model("qwen3"), None)
    inner = policy.model.model.norm.forward
    policy.model.model.norm.forward = lambda x: Opaque.apply(inner(x))
    deltas = drawn(policy, 0.1)
    with pytest.raises(UserError, match="leave out --keep-token-scores"):
        token_scores(policy, ROLLOUTS, deltas, deltas, LossConfig())
    assert all(layer.bound == (None, None) for layer in policy.layers.values())


@given(st.lists(st.integers(0, 4095), max_size=12))
def test_pieces_fill_the_text_whatever_was_drawn(tiny, ids):
    """Half characters and special tokens among them."""
    tokenizer = tiny[1]
    ids = [i % len(tokenizer) for i in ids]
    text = decode(tokenizer, ids)
    lengths = piece_lengths(tokenizer, ids, text)
    assert len(lengths) == len(ids) and sum(lengths) == len(text) and min(lengths, default=0) >= 0


def test_pieces_are_the_tokens_own_characters(tiny):
    tokenizer = copy.copy(tiny[1])
    ids = tokenizer("return valid\n    x = 12", add_special_tokens=False)["input_ids"]
    text = decode(tokenizer, [*ids, tokenizer.eos_token_id])
    lengths = piece_lengths(tokenizer, [*ids, tokenizer.eos_token_id], text)
    starts = [sum(lengths[:k]) for k in range(len(ids) + 1)]
    assert [text[a:b] for a, b in zip(starts, starts[1:], strict=False)] == [
        decode(tokenizer, [i]) for i in ids
    ]
    assert lengths[-1] == 0  # the end says nothing
    assert piece_lengths(tokenizer, ids, "another text") == []
