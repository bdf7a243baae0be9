"""Counter-based random numbers: every draw is a function of (seed, purpose, index), never of history.

Philox is a counter-based generator (Salmon et al., SC'11): keyed by a hash of what the numbers are for, two
draws never share a stream, and no draw depends on how many were made before, by whom or in which order.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive_key(seed: int, purpose: str, *index: int | str) -> int:
    """A 128-bit key for (seed, purpose, index...)."""
    text = "\x1f".join([str(seed), purpose, *map(str, index)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def generator(seed: int, purpose: str, *index: int | str) -> np.random.Generator:
    """A fresh numpy generator for (seed, purpose, index...)."""
    return np.random.Generator(np.random.Philox(key=derive_key(seed, purpose, *index)))


def derive_seed(seed: int, purpose: str, *index: int | str) -> int:
    """A non-negative 63-bit seed, e.g. for ``torch.manual_seed``."""
    return derive_key(seed, purpose, *index) & (2**63 - 1)
