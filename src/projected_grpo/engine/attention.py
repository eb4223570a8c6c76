"""Attention for decoding: one query a row, without a copy of keys and values for every query head.

Query heads that share a key-value head are one product with it: [heads, 1] queries become [kv heads, group].
transformers does so from some release on, and in earlier ones copies keys and values to all heads as soon as
there is a mask; here it is one way for all of them. flash-attn is not for generation: prompts are padded on
the left, for which every layer would gather its keys and values and wait for the host.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED = "projected_grpo_packed"
# What models pass that changes nothing for one query whose mask is given. A window is in the mask.
IN_THE_MASK = frozenset({"sliding_window", "is_causal", "position_ids", "cache_position", "use_cache"})
FLASH = "flash"  # what the names of all its versions have in common


def packed_attention(
    module: nn.Module,
    query: Float[Tensor, "b heads q d"],
    key: Float[Tensor, "b kv t d"],
    value: Float[Tensor, "b kv t dv"],
    attention_mask: Bool[Tensor, "#b #heads q t"] | Float[Tensor, "#b #heads q t"] | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: object,
) -> tuple[Float[Tensor, "b q heads dv"], None]:
    """softmax(q k^T scaling + mask) v of every head; whatever is not plain decoding goes to transformers."""
    rows, heads, queries, width = query.shape
    kv_heads = key.shape[1]
    special = any(value is not None and name not in IN_THE_MASK for name, value in more.items())
    if queries != 1 or kv_heads == heads or dropout or special:
        settings: Any = more
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **settings
        )
    if attention_mask is not None and attention_mask.shape[1] != 1:  # one of its own for every head
        attention_mask = attention_mask.reshape(len(attention_mask), kv_heads, heads // kv_heads, -1)
    out = F.scaled_dot_product_attention(
        query.reshape(rows, kv_heads, heads // kv_heads, width),
        key,
        value,
        attn_mask=attention_mask,
        scale=scaling,
    )
    return out.reshape(rows, 1, heads, -1), None


def packed_mask(**settings: Any) -> Bool[Tensor, "b 1 q t"] | None:
    """sdpa's mask; of one query always made, since looking whether it is needed would wait for the device."""
    places = settings.get("cache_position")  # up to 5.3 or so; then q_length
    queries = settings["q_length"] if places is None else len(places)
    return sdpa_mask(**settings | ({"allow_is_causal_skip": False} if queries == 1 else {}))


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, packed_mask)


def for_decoding(model: nn.Module) -> str | None:
    """The attention to decode with: ours in place of sdpa and of flash-attn, else the model's own.

    A model that sdpa cannot compute (capped scores, say) has eager in flash-attn's place.
    """
    parts: Any = model
    config = parts.config.get_text_config()
    now: str | None = config._attn_implementation
    flash = now is not None and FLASH in now
    if now is None or not (flash or now == "sdpa") or not parts._can_set_attn_implementation():
        return now
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    if flash and (capped or not parts._supports_sdpa):
        return "eager"
    return now if capped else PACKED


@contextmanager
def decoding(model: nn.Module) -> Iterator[bool]:
    """Within it the model attends as `for_decoding` has it; yields whether that is `packed_attention`."""
    parts: Any = model
    config = parts.config.get_text_config()
    outer, own = config._attn_implementation, for_decoding(model)
    config._attn_implementation = own
    try:
        yield own == PACKED
    finally:
        config._attn_implementation = outer
