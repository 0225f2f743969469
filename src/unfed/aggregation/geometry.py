"""Lengths, inner products and distances of clients' steps, as the robust rules ask for them.

A client's step is what its update adds to the adapter that the round began with. Of a LoRA module that is the effective
step ``D = s (B A - B_0 A_0)``; with ``dB = B - B_0`` and ``dA = A - A_0`` it is ``s [dB, B_0] [A; dA]``, a product of
thin matrices, so its inner products come from ``2r x 2r`` Gram matrices and the ``m x n`` matrix is never formed. Where
the clients are close ``dB`` and ``dA`` are small and nothing cancels. All other tensors (biases, ``modules_to_save``,
whole parameters, a factor whose partner is not there) count as they are, entry by entry.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from unfed.aggregation.adapters.base import Scaling
from unfed.aggregation.lora import lora_pairs, scale_of
from unfed.aggregation.tree import floats
from unfed.base.errors import AdapterError
from unfed.base.types import AdapterState

Over = Literal["effective", "factors"]


@dataclass(frozen=True)
class Step:
    """A module's effective step as ``left @ right``: ``(m, 2r)`` and ``(2r, n)``, float64, the scaling in ``left``."""

    left: Tensor
    right: Tensor


@dataclass(frozen=True)
class Ray:
    """``||D(c)||^2 = a c^2 + 2 b c^3 + d c^4``, where ``D(c)`` is the step of an update whose factors went ``c`` times
    as far from the round's adapter: ``c (dB A_0 + B_0 dA) + c^2 dB dA`` in a LoRA module, ``c`` times the difference
    elsewhere."""

    a: float
    b: float
    d: float

    @property
    def norm(self) -> float:
        """The length of the step as it came."""
        return math.sqrt(max(0.0, self.a + 2 * self.b + self.d))

    def reach(self, length: float) -> float:
        """The smallest ``c`` at which the step is ``length`` long; infinity for a step of length 0."""
        if length <= 0.0:
            return 0.0
        if self.a <= 0.0:
            return math.sqrt(length / math.sqrt(self.d)) if self.d > 0.0 else math.inf
        unit = length / math.sqrt(self.a)
        roots = np.roots([self.d * unit**2 / self.a, 2 * self.b * unit / self.a, 1.0, 0.0, -1.0])
        real = roots.real[(np.abs(roots.imag) <= 1e-9 * np.maximum(1.0, np.abs(roots.real))) & (roots.real > 0.0)]
        return float(real.min()) * unit if real.size else math.inf


@dataclass(frozen=True)
class Space:
    """Where the steps of one round are compared: ``pairs`` by module, and the other floating tensors as they are."""

    start: AdapterState
    scaling: Scaling
    pairs: Mapping[str, tuple[str, str]]
    plain: tuple[str, ...]

    @classmethod
    def of(cls, start: AdapterState, scaling: Scaling, over: Over) -> Space:
        """``effective``: what the factors of a module do together; ``factors``: every tensor by itself."""
        pairs = lora_pairs(start) if over == "effective" else {}
        paired = {name for pair in pairs.values() for name in pair}
        return cls(start, scaling, pairs, tuple(n for n in floats(start) if n not in paired))

    def step(self, update: AdapterState, module: str) -> Step:
        """A module's effective step. ``AdapterError`` for factors of another shape than the round's."""
        (a, b), (a_0, b_0) = self.factors(update, module), self.factors(self.start, module)
        if a.shape != a_0.shape or b.shape != b_0.shape:
            raise AdapterError(f"{module}: a step of another rank cannot be told from here")
        left = torch.cat([b - b_0, b_0], dim=1).mul_(scale_of(self.scaling, module))
        return Step(left, torch.cat([a, a - a_0]))

    def factors(self, update: AdapterState, module: str) -> tuple[Tensor, Tensor]:
        """``A`` ``(r, n)`` and ``B`` ``(m, r)`` of a module in float64."""
        a, b = self.pairs[module]
        return update[a].flatten(1).double(), update[b].flatten(1).double()

    def difference(self, update: AdapterState, name: str) -> Tensor:
        """One tensor's step as a vector, in float64."""
        return (update[name].double() - self.start[name].double()).flatten()

    def gram(self, updates: Sequence[AdapterState]) -> Tensor:
        """``(k, k)``: inner products of the steps of ``k`` updates, float64. One module's factors of all updates are
        held in float64 at a time; cost ``(2 r k)^2 (m + n)`` for each module."""
        total = torch.zeros(len(updates), len(updates), dtype=torch.float64)
        for module in self.pairs:
            steps = [self.step(u, module) for u in updates]
            lefts, rights = torch.cat([s.left for s in steps], dim=1), torch.cat([s.right for s in steps])
            for i, own in enumerate(steps):
                products = (own.left.T @ lefts) * (own.right @ rights.T)
                total[i] += products.reshape(own.left.shape[1], len(updates), -1).sum(dim=(0, 2))
        for name in self.plain:
            flat = torch.stack([self.difference(u, name) for u in updates])
            total += flat @ flat.T
        return (total + total.T) / 2

    def ray(self, update: AdapterState) -> Ray:
        """How the length of an update's step goes with the distance of its factors. Nothing else is held."""
        a = b = d = 0.0
        for module in self.pairs:
            (a_k, b_k), (a_0, b_0) = self.factors(update, module), self.factors(self.start, module)
            if a_k.shape != a_0.shape or b_k.shape != b_0.shape:
                raise AdapterError(f"{module}: a step of another rank cannot be told from here")
            d_a, left = a_k - a_0, torch.cat([b_k - b_0, b_0], dim=1)
            gram = scale_of(self.scaling, module) ** 2 * (left.T @ left)
            first, second = torch.cat([a_0, d_a]), torch.cat([d_a, torch.zeros_like(d_a)])
            a += float((gram * (first @ first.T)).sum())
            b += float((gram * (first @ second.T)).sum())
            d += float((gram * (second @ second.T)).sum())
        for name in self.plain:
            a += float(self.difference(update, name).square().sum())
        return Ray(max(a, 0.0), b, max(d, 0.0))

    def norm(self, update: AdapterState) -> float:
        """The length of an update's step."""
        return self.ray(update).norm


def distances(gram: Tensor) -> Tensor:
    """Squared distances ``(k, k)`` between steps, from their inner products; rounding is not let below 0."""
    own = gram.diagonal()
    return (own[:, None] + own[None, :] - 2 * gram).clamp_(min=0.0).fill_diagonal_(0.0)
