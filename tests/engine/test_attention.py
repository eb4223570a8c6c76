"""Attention of one token a row: equal to sdpa, to eager and to a loop, in any release."""

import math

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import DynamicCache

from projected_grpo.config import SamplingConfig
from projected_grpo.engine import attention
from projected_grpo.engine.attention import PACKED, decoding, packed_attention
from projected_grpo.engine.batch import left_padded, positions
from projected_grpo.engine.generate import generate
from projected_grpo.engine.placement import attention_choices
from projected_grpo.errors import UserError

PROMPTS = [(5, 6, 7), (8, 9, 10, 11, 12, 13, 14, 15), (16,), (17, 18, 19, 20, 21)]


def by_hand(query, key, value, mask, scaling):
    """Head by head, row by row."""
    rows, heads, _, width = query.shape
    out = torch.empty(rows, 1, heads, value.shape[-1], dtype=query.dtype)
    for i in range(rows):
        for h in range(heads):
            own = h // (heads // key.shape[1])
            scores = key[i, own] @ query[i, h, 0] * (width**-0.5 if scaling is None else scaling)
            if mask is not None:
                m = mask[i if len(mask) > 1 else 0, h if mask.shape[1] > 1 else 0, 0]
                scores = scores.masked_fill(~m, -math.inf) if m.dtype == torch.bool else scores + m
            out[i, 0, h] = scores.softmax(0) @ value[i, own]
    return out


@given(
    st.integers(0, 99),
    st.sampled_from([(1, 1), (1, 4), (2, 1), (2, 3), (3, 2)]),
    st.sampled_from(["none", "bool", "bias", "bias by head"]),
    st.sampled_from([None, 0.3]),
)
def test_packed_heads_attend_as_each_alone(seed, kv_heads_and_group, kind, scaling):
    kv_heads, group = kv_heads_and_group
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(3, kv_heads * group, 1, 6, dtype=torch.float64, generator=generator)
    key = torch.randn(3, kv_heads, 7, 6, dtype=torch.float64, generator=generator)
    value = torch.randn(3, kv_heads, 7, 5, dtype=torch.float64, generator=generator)
    mask = None
    if kind == "bool":
        mask = torch.rand(3, 1, 1, 7, generator=generator) > 0.4
        mask[..., -1] = True  # the token itself
    elif kind != "none":
        heads = kv_heads * group if kind == "bias by head" else 1
        mask = torch.randn(3, heads, 1, 7, dtype=torch.float64, generator=generator)
    module = nn.Module()
    module.num_key_value_groups = group
    got, _ = packed_attention(module, query, key, value, mask, scaling=scaling)
    torch.testing.assert_close(got, by_hand(query, key, value, mask, scaling), rtol=1e-10, atol=1e-12)


def run_step(model: nn.Module, attended: str, windowed: bool = False) -> tuple[torch.Tensor, list[int]]:
    """Logits of a token after left-padded prompts, and the key heads that the kernel saw."""
    heads: list[int] = []
    real = nn.functional.scaled_dot_product_attention

    def watched(query, key, value, *more, **options):
        heads.append(key.shape[1])
        return real(query, key, value, *more, **options)

    config = model.config.get_text_config()
    config._attn_implementation = attended
    ids, there = left_padded(PROMPTS, torch.device("cpu"))
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        cache = DynamicCache(config=config) if windowed else DynamicCache()
        model(
            input_ids=ids, attention_mask=there.long(), position_ids=positions(there), past_key_values=cache
        )
        patch.setattr(nn.functional, "scaled_dot_product_attention", watched)
        there = torch.cat([there, torch.ones(4, 1, dtype=torch.bool)], dim=1)
        out = model(
            input_ids=torch.tensor([[3], [1], [4], [1]]),
            attention_mask=there.long(),
            position_ids=positions(there)[:, -1:],
            past_key_values=cache,
        )
    return out.logits, heads


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("family", ["qwen3", "llama", "sliding"])
def test_a_model_decodes_the_same_under_it_as_under_sdpa_and_eager(family, groups):
    name = {"qwen3": "Qwen3", "llama": "Llama", "sliding": "Mistral"}[family]
    settings = {
        **{"vocab_size": 48, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 4 // groups, "head_dim": 8},
        **({"sliding_window": 4} if family == "sliding" else {}),
    }
    torch.manual_seed(groups)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**settings))
    model.eval()
    windowed = family == "sliding"
    got, heads = run_step(model, PACKED, windowed)
    for other in ("sdpa", "eager"):
        expected, _ = run_step(model, other, windowed)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert heads == [4 // groups] * 2, "keys are not copied to the query heads"


def test_what_sdpa_treats_specially_is_left_to_it(monkeypatch):
    seen = []

    def theirs(module, query, *_, **more):
        seen.append(more)
        return query.transpose(1, 2), None

    monkeypatch.setattr(attention, "sdpa_attention_forward", theirs)
    q, k = torch.zeros(1, 4, 1, 8), torch.zeros(1, 2, 5, 8)
    special = (
        {"softcap": 30.0},
        {"position_bias": torch.zeros(1)},
        {"s_aux": torch.zeros(4)},
        {"dropout": 0.1},
    )
    for more in special:
        packed_attention(nn.Module(), q, k, k, None, **more)
        assert seen and all(seen[-1][name] is value for name, value in more.items())
    packed_attention(nn.Module(), torch.zeros(1, 4, 3, 8), k, k, None)
    packed_attention(nn.Module(), torch.zeros(1, 2, 1, 8), k, k, None)
    assert len(seen) == len(special) + 2
    packed_attention(
        nn.Module(), q, k, k, None, sliding_window=4, softcap=None, position_ids=torch.zeros(1, 1)
    )
    assert len(seen) == len(special) + 2


def test_generation_never_runs_flash_attention_and_leaves_the_loss_its_own(small_model):
    model = small_model("qwen3", torch.float32)
    config = model.config
    used: list[str] = []
    model.register_forward_pre_hook(lambda *_: used.append(config._attn_implementation))
    draws = torch.rand(8, 6, generator=torch.Generator().manual_seed(0))
    for own, expected in (("flash_attention_2", PACKED), ("sdpa", PACKED), ("eager", "eager")):
        config._attn_implementation = own
        used.clear()
        generate(model, PROMPTS, [2] * 4, draws, SamplingConfig(), frozenset())
        assert set(used) == {expected} and config._attn_implementation == own
    config._attn_implementation = "flash_attention_2"
    config.attn_logit_softcapping = 30.0
    with decoding(model) as packed:
        assert config._attn_implementation == "eager" and not packed
    config._attn_implementation = "sdpa"
    with decoding(model) as packed:
        assert config._attn_implementation == "sdpa" and not packed


def test_flash_attention_is_not_for_float32(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    gpu = torch.device("cuda")
    assert attention_choices("auto", gpu, torch.bfloat16) == ("flash_attention_2", None)
    assert attention_choices("auto", gpu, torch.float32) == (None,)
    with pytest.raises(UserError, match="bfloat16"):
        attention_choices("flash_attention_2", gpu, torch.float32)
