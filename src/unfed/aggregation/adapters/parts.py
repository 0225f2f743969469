"""What rules share that work on whole products: an adapter taken apart, and how far the one that they make is off."""

from __future__ import annotations

import math

from torch import Tensor

from unfed.aggregation.adapters.base import Scaling
from unfed.aggregation.adapters.low_rank import Products
from unfed.aggregation.adapters.stacks import Stack, factors, product, side_by_side
from unfed.aggregation.lora import AggregationError, lora_pairs, scale_of
from unfed.aggregation.tree import RunningMean
from unfed.base.errors import AdapterError
from unfed.base.types import AdapterState


def pair_names(adapter: AdapterState) -> frozenset[str]:
    """Names of all LoRA factors; the other tensors are biases, whole modules and the like."""
    return frozenset(name for pair in lora_pairs(adapter).values() for name in pair)


def into(found: dict[str, Tensor], pair: tuple[str, str], whole: Products, like: AdapterState, rest: Tensor) -> None:
    """Put the best factors of ``whole`` under the names ``pair`` (A, B), in the shapes and dtypes of ``like``.

    A component without a singular value above 0 gets ``B = 0`` and its row of ``rest``, as a fresh adapter has: with
    both factors 0 it could never train again.
    """
    a_name, b_name = pair
    a_like, b_like = like[a_name], like[b_name]
    b, a, number = factors(whole, a_like.shape[0])
    if rest.shape == a_like.shape:
        a[number:] = rest.flatten(1)[number:].double()
    found[a_name] = a.reshape(a_like.shape).to(a_like.dtype)
    found[b_name] = b.reshape(b_like.shape).to(b_like.dtype)


class MeanOfProducts:
    """A round's weighted mean of ``B_k A_k`` for every module, and the plain weighted mean of all other tensors.

    The error of what is made of it is computed from the stacked factors, or estimated where they were cut (see
    :class:`Stack`).
    """

    def __init__(self, scaling: Scaling, num_clients: int, seed: int) -> None:
        self._scaling, self._num_clients = scaling, num_clients
        self._meter = AggregationError(scaling, num_clients, seed=seed)
        self._stacks: dict[str, Stack] = {}
        self._others = RunningMean()
        self._first: AdapterState | None = None
        self._total = 0.0

    def add(self, adapter: AdapterState, weight: float) -> None:
        """Take in a client. ``AdapterError``: it does not match the first, is not finite, or has no weight."""
        if not weight > 0:
            raise AdapterError(f"a weight must be above 0, not {weight}")
        first = self._first = self._first or adapter
        if found := adapter.problems_against(first):
            raise AdapterError("; ".join(found[:3]))
        self._total += weight
        for module, (a, b) in lora_pairs(first).items():
            stack = self._stacks.setdefault(module, Stack(self._num_clients))
            stack.add(adapter[b], adapter[a], weight)
        if self._meter.is_estimate:
            self._meter.add(adapter, weight)
        others = adapter.without(pair_names(first))
        if others:
            self._others.add(others, weight)

    @property
    def first(self) -> AdapterState:
        """The first client's adapter: names, shapes and dtypes. ``AdapterError`` when there was none."""
        if self._first is None:
            raise AdapterError("there is no client update to average")
        return self._first

    def sums(self) -> dict[str, Products]:
        """By module: ``sum p_k B_k A_k``, without the scaling."""
        return {module: stack.sum(self._total) for module, stack in self._stacks.items()}

    def others(self) -> AdapterState:
        """The mean of the tensors that are no LoRA factors."""
        return self._others.result() if pair_names(self.first) != frozenset(self.first) else AdapterState({})

    def error(self, sums: dict[str, Products], adapter: AdapterState) -> tuple[float | None, bool]:
        """How far the products of ``adapter`` are from ``sums``, relative to those over all modules, and whether that
        is an estimate."""
        if self._meter.is_estimate:
            return self._meter.result(adapter), True
        missed = wanted = 0.0
        for module, (a, b) in lora_pairs(adapter).items():
            scale = scale_of(self._scaling, module)
            both = side_by_side([sums[module], product(adapter[b], adapter[a], -1.0)])
            wanted += (scale * sums[module].norm()) ** 2
            missed += (scale * both.norm()) ** 2
        if not sums:
            return None, False
        return (0.0 if missed == 0.0 else math.sqrt(missed / wanted) if wanted else math.inf), False
