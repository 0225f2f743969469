"""Clipping of updates and Gaussian noise on them: the two halves of the Gaussian mechanism on adapters."""

from __future__ import annotations

import secrets

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor

from unfed.aggregation.tree import delta, floats, moved, norm, working_dtype
from unfed.base.types import AdapterState

_FIRST_MARGIN = 2.0**-20
"""How much shorter than the bound the second attempt is, where rounding made the first one too long."""


def clipped(start: AdapterState, update: AdapterState, bound: float) -> tuple[AdapterState, float]:
    """``start + min(1, bound / ||d||) d`` with ``d = update - start``, and the length ``||d||`` before clipping.

    Euclidean over all floating tensors together (flat clipping; McMahan et al. 2018, section 3.2). What comes back is
    at most ``bound`` from ``start`` as it is stored, rounding included: an attempt that rounding made longer is
    shortened again. An update within the bound comes back as it came. Integer and boolean tensors are ``start``'s:
    no clipping bounds what they tell.
    """
    change = delta(update, start)
    length = norm(change)
    if length <= bound:
        same = len(change) == len(update)
        return (update if same else AdapterState({n: update[n] if n in change else start[n] for n in update})), length
    scale, margin = bound / length, _FIRST_MARGIN
    while True:
        attempt = moved(start, change, scale, start)
        if norm(delta(attempt, start)) <= bound:
            return attempt, length
        scale *= max(0.0, 1.0 - margin)  # 0 at last, which is the start itself
        margin *= 2.0


def normal(shape: torch.Size, generator: torch.Generator | None) -> Tensor:
    """Standard normal values in float64. Without a generator they come from the operating system's entropy.

    The second way draws 53-bit uniforms from :mod:`secrets` and inverts the distribution function, so nobody who knows
    the run's seed can draw them again; neither can a resumed run.
    """
    if generator is not None:
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    count = shape.numel()
    raw = np.frombuffer(secrets.token_bytes(8 * count), dtype=np.uint64)
    return torch.from_numpy(ndtri(((raw >> np.uint64(11)) + 0.5) * 2.0**-53)).reshape(shape)


def noise_like(state: AdapterState, std: float, generator: torch.Generator | None) -> AdapterState:
    """Independent ``N(0, std^2)`` for every value of the floating tensors, in float32 (float64 for float64).

    ``generator``: see :func:`normal`. The tensors are drawn in the order of their names.
    """
    return AdapterState(
        {n: (normal(state[n].shape, generator) * std).to(working_dtype(state[n].dtype)) for n in floats(state)}
    )


def plus_noise(state: AdapterState, std: float, generator: torch.Generator | None) -> AdapterState:
    """``state`` with noise of standard deviation ``std`` on every floating value; ``state`` itself where that is 0."""
    if std == 0.0:
        return state
    return moved(state, noise_like(state, std, generator), 1.0, state)
