"""Seeds made from coordinates such as (seed, step, prompt, row), so that no random state has to be saved."""

import hashlib

import torch
from jaxtyping import Float
from torch import Tensor


def stream_seed(*coordinates: int | str) -> int:
    """A 63-bit seed from coordinates such as (seed, "train", step, prompt, row)."""
    text = "/".join(str(c) for c in coordinates)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def uniforms(seed: int, count: int) -> Float[Tensor, " count"]:
    """`count` draws in [0, 1) from one stream."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
