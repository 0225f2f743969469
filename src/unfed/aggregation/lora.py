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
NUM_PROBES = 8
AT_ONCE = 16
"""Modules of one shape whose sketches are made by one product."""
_FACTORS = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))


def scale_of(scaling: Mapping[str, float] | float, module: str) -> float:
    """A module's scaling, of those by module or of one for all."""
    return scaling[module] if isinstance(scaling, Mapping) else scaling


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


Factors = Mapping[str, tuple[Tensor, Tensor]]
"""``A`` ``(r, n)`` and ``B`` ``(m, r)`` by module."""


class _Meter(Protocol):
    def add(self, factors: Factors, weight: float) -> None: ...

    def norms(self, means: Factors, total: float) -> dict[str, SquaredNorms]: ...


def _product_norm_sq(left_gram: Tensor, right: Tensor) -> float:
    """``||left @ right||_F^2`` from ``left.T @ left`` ``(k, k)`` and ``right`` ``(k, n)``."""
    return max(0.0, float((left_gram * (right @ right.T)).sum()))


class _Exact:
    """Keeps every client's factors (by reference, no copy) until the mean is known."""

    def __init__(self) -> None:
        self._kept: dict[str, list[tuple[Tensor, Tensor, float]]] = {}

    def add(self, factors: Factors, weight: float) -> None:
        for module, (a, b) in factors.items():
            self._kept.setdefault(module, []).append((a, b, weight))

    def norms(self, means: Factors, total: float) -> dict[str, SquaredNorms]:
        return {module: self._of(module, a, b, total) for module, (a, b) in means.items()}

    def _of(self, module: str, a_mean: Tensor, b_mean: Tensor, total: float) -> SquaredNorms:
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
    """Multiplies every update by a Gaussian matrix ``(n, q)``, the same for all clients; ``E ||M w||^2 = ||M||_F^2``.

    The squared norms have a relative standard deviation of at most ``sqrt(2/q)`` where all energy lies in one direction
    of the input, and of ``sqrt(2/(q d))`` where it is spread evenly over ``d`` directions. Modules of one width have
    their probes in common, which is why they cost nothing to keep; directions count once for all modules of a width
    (they would count for each with probes of their own). In float32 for adapters of up to 32 bits: an error below
    about 1e-6 is rounding. Memory: ``q`` values for each row of every ``B``.
    """

    def __init__(self, probes: int, seed: int) -> None:
        self._probes, self._seed = probes, seed
        self._by_width: dict[tuple[int, torch.dtype], Tensor] = {}
        self._batches: list[list[str]] = []
        self._means: list[Tensor] = []
        self._weight = 0.0

    def _of_width(self, width: int, dtype: torch.dtype) -> Tensor:
        if (width, dtype) not in self._by_width:
            generator = torch_generator(self._seed, "aggregation-error", width)
            self._by_width[width, dtype] = torch.randn(width, self._probes, generator=generator, dtype=dtype)
        return self._by_width[width, dtype]

    def _seen(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        """``B A`` of modules of one shape times the probes of their width, transposed: ``(modules, q, m)``, for with
        the long dimension last the product takes a fifth of the time."""
        dtype = torch.promote_types(pairs[0][1].dtype, torch.float32)
        probes = self._of_width(pairs[0][0].shape[1], dtype)
        ranks = [a.shape[0] for a, _ in pairs]
        inner = (torch.cat([a for a, _ in pairs]).to(dtype) @ probes).split(ranks)
        if len(set(ranks)) == 1:
            left = torch.stack([i.T for i in inner])
            return torch.bmm(left, torch.stack([b for _, b in pairs]).to(dtype).transpose(1, 2))
        return torch.stack([i.T @ b.to(dtype).T for (_, b), i in zip(pairs, inner, strict=True)])

    def add(self, factors: Factors, weight: float) -> None:
        if not self._batches:
            self._batches = _batches(factors)
        self._weight += weight
        for index, modules in enumerate(self._batches):
            seen = self._seen([factors[m] for m in modules])
            if index == len(self._means):
                self._means.append(seen)
            else:  # as in RunningMean: what is equal stays equal, bit for bit
                self._means[index].lerp_(seen, weight / self._weight)

    def norms(self, means: Factors, total: float) -> dict[str, SquaredNorms]:
        del total
        found: dict[str, SquaredNorms] = {}
        for modules, wanted in zip(self._batches, self._means, strict=True):
            missed = wanted - self._seen([means[m] for m in modules])
            squares = (t.double().square().sum(dim=(1, 2)).tolist() for t in (wanted, missed))
            found |= {m: SquaredNorms(*both) for m, *both in zip(modules, *squares, strict=True)}
        return found


def _batches(factors: Factors) -> list[list[str]]:
    """The modules by ``(m, n)``, at most ``AT_ONCE`` together."""
    by_shape: dict[tuple[int, int], list[str]] = {}
    for module, (a, b) in factors.items():
        by_shape.setdefault((b.shape[0], a.shape[1]), []).append(module)
    return [ms[i : i + AT_ONCE] for ms in by_shape.values() for i in range(0, len(ms), AT_ONCE)]


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
        self._meter.add(self._factors(adapter, self._pairs), weight)
        self._weight += weight

    @staticmethod
    def _factors(adapter: AdapterState, pairs: Mapping[str, tuple[str, str]]) -> Factors:
        found = {module: (adapter[a], adapter[b]) for module, (a, b) in pairs.items()}
        if all(a.ndim == 2 == b.ndim for a, b in found.values()):
            return found
        return {module: (a.flatten(1), b.flatten(1)) for module, (a, b) in found.items()}

    def result(self, mean: AdapterState) -> float | None:
        """The error of ``mean``, the average that the server takes; ``None`` without LoRA factors. Once only."""
        if not self._pairs:
            return None
        sums = SquaredNorms()
        for module, norms in self._meter.norms(self._factors(mean, self._pairs), self._weight).items():
            scale = scale_of(self._scaling, module)
            sums = sums.plus(norms, scale)
        self._pairs = None
        return sums.relative()
