"""Seeds made from coordinates such as (seed, step, prompt, row), so that no random state has to be saved."""

import hashlib


def stream_seed(*coordinates: int | str) -> int:
    """A 63-bit seed from coordinates such as (seed, "train", step, prompt, row)."""
    text = "/".join(str(c) for c in coordinates)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
