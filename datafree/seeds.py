"""One seed per purpose, derived from the recipe's seed, the same on every machine and in every process."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *names: str) -> int:
    """Seed for the purpose spelt by `names`, in [0, 2**63), so that `torch.Generator.manual_seed` takes it.

    Different names give independent streams: adding a stage never changes the numbers of another one.
    SHA-256 is used because Python's `hash()` differs from process to process.
    """
    text = "\x00".join((str(int(seed)), *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
