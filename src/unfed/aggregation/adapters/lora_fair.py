"""LoRA-FAIR: the averaged factors, with B corrected towards the mean of the products (Bian et al. 2025, "LoRA-FAIR:
Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement", arXiv 2411.14961)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unfed.aggregation.adapters.base import AdapterRule, Collector, Merged, Scaling
from unfed.aggregation.adapters.low_rank import Products
from unfed.aggregation.adapters.parts import MeanOfProducts, pair_names
from unfed.aggregation.lora import lora_pairs
from unfed.aggregation.tree import RunningMean
from unfed.base.params import number
from unfed.base.types import AdapterState, ServerState


def corrected(whole: Products, a: Tensor, b: Tensor, ridge: float) -> Tensor:
    """``b + D`` for the ``D`` that minimises ``||whole - (b + D) a||_F^2 + ridge ||D||_F^2``, float64, ``(m, r)``:
    ``D = (whole - b a) a^T (a a^T + ridge I)^-1``. ``a`` is ``(r, n)``, ``b`` ``(m, r)``."""
    a, b = a.double(), b.double()
    gram = a @ a.T
    wanted = whole.left @ (whole.right @ a.T) - b @ gram
    regular = gram + ridge * torch.eye(len(gram), dtype=torch.float64)
    return b + torch.linalg.solve(regular, wanted.T).T


class _Corrected:
    """See :class:`Collector`. Memory: as FlexLoRA's, and one adapter."""

    def __init__(self, scaling: Scaling, num_clients: int, seed: int, ridge: float) -> None:
        self._products = MeanOfProducts(scaling, num_clients, seed)
        self._factors = RunningMean()
        self._ridge = ridge

    def add(self, adapter: AdapterState, weight: float) -> None:
        """See :class:`Collector`."""
        self._products.add(adapter, weight)
        self._factors.add(adapter.without(frozenset(adapter) - pair_names(adapter)), weight)

    def result(self) -> Merged:
        """See :class:`Collector`."""
        first, found = self._products.first, dict(self._products.others())
        mean, sums = self._factors.result(), self._products.sums()
        for module, (a, b) in lora_pairs(first).items():
            better = corrected(sums[module], mean[a].flatten(1), mean[b].flatten(1), self._ridge)
            found[a], found[b] = mean[a], better.reshape(mean[b].shape).to(mean[b].dtype)
        adapter = AdapterState(found)
        error, estimate = self._products.error(sums, adapter)
        return Merged(adapter, error, estimate)


@dataclass(frozen=True)
class LoRAFair(AdapterRule):
    """``A = sum p_k A_k`` and ``B = sum p_k B_k + D``, ``D`` by ridge regression of what averaging misses on ``A``.

    Departure: the paper minimises a similarity loss (the cosine's) plus ``ridge ||D||`` by gradient descent; this is
    the squared distance, whose minimum has a closed form. The scaling is left out of both. ``ridge``: the paper's
    lambda.
    """

    title: ClassVar[str] = "lora_fair"
    equal_because: ClassVar[str] = "it corrects B for the mean of whole factors A, and a client would get a part of it"
    ridge: float = number(0.01, above=0)

    def collector(self, state: ServerState, num_clients: int) -> Collector:
        """See :meth:`AdapterRule.collector`."""
        del state
        return _Corrected(self.scaling, num_clients, self.probe_seed, self.ridge)
