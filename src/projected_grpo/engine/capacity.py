"""How many rows can be generated at once: a row's cache at its full length against a device's free memory."""

from collections import Counter
from typing import Any

import torch
from torch import nn

from projected_grpo.engine.placement import outermost_layers

LEFT_FREE = 0.1  # of what is free: allocators round up
LOGITS = 40  # bytes a row and token of the vocabulary, while one is picked: sorted, with indices, and sums


def layers_on(model: nn.Module) -> Counter[torch.device]:
    """How many layers each device has."""
    return Counter(next(layer.parameters()).device for layer in outermost_layers(model))


def cache_bytes(model: nn.Module) -> int:
    """Of one token's keys and values in one layer."""
    parts: Any = model
    config = parts.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * heads * width * next(model.parameters()).element_size()


def free_bytes(device: torch.device) -> int | None:
    """What a GPU can still give, its allocator's spare blocks included; None for other devices."""
    if device.type != "cuda":
        return None
    spare = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + spare


def rows_that_fit(model: nn.Module, tokens: int, rows: int) -> int:
    """Rows of so many tokens whose caches and logits fit on every device: one at least, `rows` at most."""
    parts: Any = model
    home = next(model.parameters()).device
    per_token = cache_bytes(model)
    for device, layers in layers_on(model).items():
        free = free_bytes(device)
        if free is None:
            continue
        row = layers * tokens * per_token
        if device == home:
            row += LOGITS * parts.config.get_text_config().vocab_size
        rows = min(rows, int(free * (1 - LEFT_FREE)) // row)
    return max(1, rows)
