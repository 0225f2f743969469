"""Rules whose average is that of the effective updates: what the averaged factors miss lies beneath the adapter.

The wanted update of a module is ``sum_k p_k s B_k A_k``. FLoRA puts all of it beneath and begins a fresh adapter;
FedEx-LoRA keeps the averaged factors and puts the rest beneath. "Beneath" is a residual, LoRA factors of scaling 1 that
do not train (:mod:`unfed.models.residual`), where the papers write into the base's weights: the base never changes
here, so it may be quantised, and the residual can be taken out again. It is kept in the fewest factors that give it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from unfed.aggregation.adapters.base import AdapterRule, Collector, Merged, Steps
from unfed.aggregation.adapters.low_rank import Products
from unfed.aggregation.lora import lora_pairs, scale_of
from unfed.aggregation.tree import RunningMean
from unfed.base.errors import AdapterError
from unfed.base.params import choice
from unfed.base.seeding import torch_generator
from unfed.base.types import AdapterState, ServerState


class _Held:
    """Holds every client's adapter (by reference) until all are there; the mean of all tensors runs beside.

    The rule says what a round adds beneath, and which factors come next.
    """

    def __init__(self, rule: _Exact, state: ServerState) -> None:
        self._rule, self._state = rule, state
        self._mean = RunningMean()
        self._held: list[tuple[AdapterState, float]] = []

    def add(self, adapter: AdapterState, weight: float) -> None:
        """See :class:`Collector`."""
        self._mean.add(adapter, weight)
        self._held.append((adapter, weight))

    def result(self) -> Merged:
        """See :class:`Collector`."""
        mean = self._mean.result()
        pairs = lora_pairs(mean)
        if not pairs:
            raise AdapterError(f"aggregator.adapter={self._rule.name}: there are no LoRA factors; use adapter=fedit")
        before = self._state.base_residual or AdapterState({})
        adapter, residual = dict(mean), {}
        missed = wanted = 0.0
        for module, (a, b) in pairs.items():
            s = scale_of(self._rule.scaling, module)
            there = [(before[b], before[a])] if a in before else []
            target = Products.of([*there, *self._parts(a, b, s)])
            new_b, new_a = self._rule.next_factors(module, mean[b], mean[a], self._state.round)
            beneath = Products.of([*there, *self._rule.beneath(self._shares(a, b), (mean[b], mean[a]), s)]).smallest()
            residual[b], residual[a] = beneath.left.float(), beneath.right.float()
            adapter[b], adapter[a] = new_b, new_a
            now = Products.of([(residual[b], residual[a]), (s * new_b.double(), new_a)])
            wanted += target.norm() ** 2
            missed += now.plus(target, -1.0).norm() ** 2
        error = 0.0 if missed == 0.0 else math.sqrt(missed / wanted) if wanted > 0 else math.inf
        return Merged(AdapterState(adapter), error, residual=AdapterState(residual))

    def _shares(self, a: str, b: str) -> list[tuple[Tensor, Tensor, float]]:
        total = sum(w for _, w in self._held)
        return [(adapter[b].double(), adapter[a].double(), w / total) for adapter, w in self._held]

    def _parts(self, a: str, b: str, s: float) -> list[tuple[Tensor, Tensor]]:
        return [(s * p * b_k, a_k) for b_k, a_k, p in self._shares(a, b)]


@dataclass(frozen=True)
class _Exact(AdapterRule):
    exact: ClassVar[bool] = True
    steps: ClassVar[Steps] = "mean"

    def collector(self, state: ServerState, num_clients: int) -> Collector:
        """See :meth:`AdapterRule.collector`. Memory: every client's adapter, as the rule needs them all."""
        del num_clients
        return _Held(self, state)

    def beneath(
        self, shares: list[tuple[Tensor, Tensor, float]], mean: tuple[Tensor, Tensor], s: float
    ) -> list[tuple[Tensor, Tensor]]:
        """What a round adds beneath a module, as products ``(m, k) (k, n)``; ``shares``: ``(B_k, A_k, p_k)``."""
        raise NotImplementedError

    def next_factors(self, module: str, b: Tensor, a: Tensor, round_: int) -> tuple[Tensor, Tensor]:
        """The factors ``(B, A)`` that the next round begins with, from the averaged ones."""
        raise NotImplementedError


@dataclass(frozen=True)
class FLoRA(_Exact):
    """Stacking (Wang et al. 2024, arXiv 2409.05976): ``[p_1 B_1 .. p_K B_K][A_1; ..; A_K]`` goes beneath, and every
    round begins a fresh adapter with B = 0.

    ``init``: how its A is drawn: ``kaiming`` (PEFT's own, uniform within 1/sqrt(n)) or ``gaussian`` (PEFT's, standard
    deviation 1/r); the paper says random. Departures: what lies beneath is an adapter, not the base's weights, in the
    fewest factors (after a few rounds they are as many as the smaller side of the matrix); clients are sent all of it,
    not the last round's stack, so that one which was left out of a round needs no other.
    """

    title: ClassVar[str] = "flora"
    unequal_ranks: ClassVar[bool] = True
    init: Literal["kaiming", "gaussian"] = choice("kaiming", ("kaiming", "gaussian"))

    def beneath(
        self, shares: list[tuple[Tensor, Tensor, float]], mean: tuple[Tensor, Tensor], s: float
    ) -> list[tuple[Tensor, Tensor]]:
        """All that the clients learned."""
        del mean
        return [(s * p * b_k, a_k) for b_k, a_k, p in shares]

    def next_factors(self, module: str, b: Tensor, a: Tensor, round_: int) -> tuple[Tensor, Tensor]:
        """A fresh A, and B = 0."""
        generator = torch_generator(self.probe_seed, "flora", round_, module)
        if self.init == "gaussian":
            fresh = torch.randn(a.shape, generator=generator) / a.shape[0]
        else:
            fresh = (2 * torch.rand(a.shape, generator=generator) - 1) / math.sqrt(a[0].numel())
        return torch.zeros_like(b), fresh.to(a.dtype)


@dataclass(frozen=True)
class FedEx(_Exact):
    """The averaged factors, with ``s (sum p_k B_k A_k - B A)`` beneath (Singhal et al. 2025, "FedEx-LoRA", arXiv
    2410.09432). It is computed as ``s sum p_k (B_k - B)(A_k - A)``, the same covariance without the cancellation.

    Departure: the residual is an adapter beneath, not written into the base's weights.
    """

    title: ClassVar[str] = "fedex"

    def beneath(
        self, shares: list[tuple[Tensor, Tensor, float]], mean: tuple[Tensor, Tensor], s: float
    ) -> list[tuple[Tensor, Tensor]]:
        """What averaging the factors misses."""
        b, a = mean[0].double(), mean[1].double()
        return [(s * p * (b_k - b), a_k - a) for b_k, a_k, p in shares]

    def next_factors(self, module: str, b: Tensor, a: Tensor, round_: int) -> tuple[Tensor, Tensor]:
        """The averaged ones."""
        del module, round_
        return b, a
