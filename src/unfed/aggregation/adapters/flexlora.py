"""FlexLoRA: the mean of the products, cut to the adapter's rank by its singular values (Bai et al. 2024, "Federated
Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources", arXiv 2402.11505)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from unfed.aggregation.adapters.base import AdapterRule, Collector, Merged, Pace, Scaling, Steps
from unfed.aggregation.adapters.parts import MeanOfProducts, into
from unfed.aggregation.adapters.weights import stepped
from unfed.aggregation.lora import lora_pairs
from unfed.base.types import AdapterState, Combined, OptState, ServerState


class _Decomposed:
    """See :class:`Collector`. Memory: the clients' factors in float64, up to 16 clients; beyond, see
    :class:`unfed.aggregation.adapters.stacks.Stack`."""

    def __init__(self, scaling: Scaling, num_clients: int, seed: int, start: AdapterState) -> None:
        self._products = MeanOfProducts(scaling, num_clients, seed)
        self._start = start

    def add(self, adapter: AdapterState, weight: float) -> None:
        """See :class:`Collector`."""
        self._products.add(adapter, weight)

    def result(self) -> Merged:
        """See :class:`Collector`."""
        first, found = self._products.first, dict(self._products.others())
        sums = self._products.sums()
        for module, pair in lora_pairs(first).items():
            into(found, pair, sums[module], first, self._start.get(pair[0], first[pair[0]]))
        adapter = AdapterState(found)
        error, estimate = self._products.error(sums, adapter)
        return Merged(adapter, error, estimate)


@dataclass(frozen=True)
class FlexLoRA(AdapterRule):
    """``U S V^T = sum p_k B_k A_k``, ``B = U sqrt(S)``, ``A = sqrt(S) V^T``; a client gets the largest components that
    its rank has room for. Exact up to truncation, which the aggregation error shows.

    With one scaling for all clients it need not enter the decomposition. Departures: the paper forms the full matrix,
    this never does; a component without energy keeps the A of the round's start, with B = 0.
    """

    title: ClassVar[str] = "flexlora"
    unequal_ranks: ClassVar[bool] = True
    steps: ClassVar[Steps] = "weights"

    def collector(self, state: ServerState, num_clients: int) -> Collector:
        """See :meth:`AdapterRule.collector`."""
        return _Decomposed(self.scaling, num_clients, self.probe_seed, state.adapter)

    def step(
        self, memory: OptState, state: ServerState, combined: Combined, pace: Pace
    ) -> tuple[OptState, AdapterState]:
        """See :meth:`AdapterRule.step` and :mod:`unfed.aggregation.adapters.weights`."""
        return stepped(memory, state.adapter, combined.adapter, pace)
