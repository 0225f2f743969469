"""Seeds derived from what they are for, so that no two clients, rounds or purposes share a stream."""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Derive a 63-bit seed from a run's seed and a path of purposes.

    ``derive_seed(0, "fit", 3, "client_1", "order")`` depends on every part and on nothing else (not on
    the process, nor on what was drawn before), so a resumed run draws what the undisturbed run drew.
    """
    text = "\x1f".join([str(int(seed)), *(str(p) for p in purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def torch_generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator seeded by :func:`derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))


def numpy_generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """A NumPy generator seeded by :func:`derive_seed`."""
    return np.random.default_rng(derive_seed(seed, *purpose))
