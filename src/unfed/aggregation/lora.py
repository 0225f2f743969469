"""How far the average of LoRA factors is from the average of what they do.

A client's effective update of one module is ``s B_k A_k``; averaging the factors gives ``s Bbar Abar``, not
``sum_k p_k s B_k A_k`` (the difference is a covariance of the factors over the clients). The error meter
measures the relative Frobenius distance over all modules without forming a matrix of a module's size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from unfed.base.seeding import torch_generator
from unfed.base.types import AdapterState

EXACT_LIMIT = 16
NUM_PROBES = 16
_FACTORS = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))


def lora_pairs(adapter: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Module name -> (name of A, name of B) for each module whose two factors are both in ``adapter``.

    ``A`` is ``(r, n)`` and ``B`` is ``(m, r)`` (a convolution's trailing dimensions count into ``n``).
    """
    pairs: dict[str, tuple[str, str]] = {}
    names = dict.fromkeys(adapter)
    for name in names:
        for a_suffix, b_suffix in _FACTORS:
            module = name.removesuffix(a_suffix)
            if module != name and module + b_suffix in names:
                pairs[module] = (name, module + b_suffix)
    return pairs


@dataclass(frozen=True)
class SquaredNorms:
    """Squared Frobenius norms of the averaged effective update and of what averaging the factors misses."""

    wanted: float = 0.0
    missed: float = 0.0

    def plus(self, other: SquaredNorms, scale: float) -> SquaredNorms:
        """The sum with ``other`` after its matrices are multiplied by ``scale``."""
        return SquaredNorms(self.wanted + scale**2 * other.wanted, self.missed + scale**2 * other.missed)

    def relative(self) -> float:
        """``||missed|| / ||wanted||``; 0/0 is 0 (every ``B`` is still zero)."""
        if self.missed == 0.0:
            return 0.0
        return math.sqrt(self.missed / self.wanted) if self.wanted > 0.0 else math.inf


class _Meter(Protocol):
    def add(self, module: str, a: Tensor, b: Tensor, weight: float) -> None: ...

    def norms(self, module: str, a_mean: Tensor, b_mean: Tensor, total: float) -> SquaredNorms: ...


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.flatten(1)


def _product_norm_sq(left_gram: Tensor, right: Tensor) -> float:
    """``||left @ right||_F^2`` from ``left.T @ left`` ``(k, k)`` and ``right`` ``(k, n)``."""
    return max(0.0, float((left_gram * (right @ right.T)).sum()))


class _Exact:
    """Keeps every client's factors (by reference, no copy) until the mean is known."""

    def __init__(self) -> None:
        self._kept: dict[str, list[tuple[Tensor, Tensor, float]]] = {}

    def add(self, module: str, a: Tensor, b: Tensor, weight: float) -> None:
        self._kept.setdefault(module, []).append((a, b, weight))

    def norms(self, module: str, a_mean: Tensor, b_mean: Tensor, total: float) -> SquaredNorms:
        """Float64. With ``dB = B_k - Bbar`` and ``dA = A_k - Abar``, for whatever ``Abar`` and ``Bbar``:
        ``sum p B A - Bbar Abar = sum p dB dA + (sum p dB) Abar + Bbar (sum p dA)``. The differences are small
        where clients are close, so the Gram matrices lose nothing to cancellation; the last two terms are
        what rounding did to the means."""
        a_mean, b_mean = a_mean.double(), b_mean.double()
        lefts: list[Tensor] = []
        rights: list[Tensor] = []
        a_rest, b_rest = torch.zeros_like(a_mean), torch.zeros_like(b_mean)
        for a, b, weight in self._kept.pop(module):
            d_a, d_b = a.double() - a_mean, (b.double() - b_mean) * (weight / total)
            a_rest.add_(d_a, alpha=weight / total)
            b_rest.add_(d_b)
            lefts.append(d_b)
            rights.append(d_a)
        left = torch.cat([*lefts, b_rest, b_mean], dim=1)
        left_gram = left.T @ left
        missed = _product_norm_sq(left_gram, torch.cat([*rights, a_mean, a_rest]))
        wanted = _product_norm_sq(left_gram, torch.cat([*rights, a_mean, a_rest + a_mean]))
        return SquaredNorms(wanted, missed)


class _Sketch:
    """Multiplies every update by the same Gaussian matrix ``(n, q)``; ``E ||M w||^2 = ||M||_F^2``.

    The squared norms have a relative standard deviation of at most ``sqrt(2/q)`` for a single module of rank
    one, and of ``sqrt(2/(q d))`` where the energy is spread over ``d`` directions of all modules together.
    """

    def __init__(self, probes: int, seed: int) -> None:
        self._probes, self._seed = probes, seed
        self._sums: dict[str, Tensor] = {}

    def _probe(self, module: str, n: int) -> Tensor:
        # Drawn anew for each client: to keep it would cost as much memory as the adapter.
        generator = torch_generator(self._seed, "aggregation-error", module)
        return torch.randn(n, self._probes, generator=generator, dtype=torch.float64)

    def add(self, module: str, a: Tensor, b: Tensor, weight: float) -> None:
        seen = b.double() @ (a.double() @ self._probe(module, a.shape[1]))
        if module in self._sums:
            self._sums[module].add_(seen, alpha=weight)
        else:
            self._sums[module] = seen.mul_(weight)

    def norms(self, module: str, a_mean: Tensor, b_mean: Tensor, total: float) -> SquaredNorms:
        wanted = self._sums.pop(module) / total
        missed = wanted - b_mean.double() @ (a_mean.double() @ self._probe(module, a_mean.shape[1]))
        return SquaredNorms(float(wanted.square().sum()), float(missed.square().sum()))


class AggregationError:
    """Streaming meter of ``||sum p_k s B_k A_k - s Bbar Abar||_F / ||sum p_k s B_k A_k||_F`` over all modules.

    Exact in float64 when at most ``exact_limit`` clients are expected (their factors are held until
    :meth:`result`); beyond that a seeded estimate from ``probes`` Gaussian vectors in constant memory.
    ``scaling``: ``s`` by module name, or one number.
    """

    def __init__(
        self,
        scaling: Mapping[str, float] | float,
        num_clients: int,
        *,
        exact_limit: int = EXACT_LIMIT,
        probes: int = NUM_PROBES,
        seed: int = 0,
    ) -> None:
        self._scaling = scaling
        self.is_estimate = num_clients > exact_limit
        self._meter: _Meter = _Sketch(probes, seed) if self.is_estimate else _Exact()
        self._pairs: dict[str, tuple[str, str]] | None = None
        self._weight = 0.0

    def add(self, adapter: AdapterState, weight: float) -> None:
        """Take in one client's adapter with its (unnormalised) weight."""
        if self._pairs is None:
            self._pairs = lora_pairs(adapter)
        for module, (a_name, b_name) in self._pairs.items():
            self._meter.add(module, _matrix(adapter[a_name]), _matrix(adapter[b_name]), weight)
        self._weight += weight

    def result(self, mean: AdapterState) -> float | None:
        """The error of ``mean``, the average that the server takes; ``None`` without LoRA factors. Once only."""
        if not self._pairs:
            return None
        sums = SquaredNorms()
        for module, (a_name, b_name) in self._pairs.items():
            norms = self._meter.norms(module, _matrix(mean[a_name]), _matrix(mean[b_name]), self._weight)
            scale = self._scaling[module] if isinstance(self._scaling, Mapping) else self._scaling
            sums = sums.plus(norms, scale)
        self._pairs = None
        return sums.relative()
