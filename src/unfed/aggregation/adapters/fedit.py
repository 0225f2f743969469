"""FedIT: A and B are averaged apart (Zhang et al. 2024, "Towards Building the Federated GPT", arXiv 2305.05644)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from unfed.aggregation.adapters.base import AdapterRule, Collector, Merged, Scaling
from unfed.aggregation.lora import AggregationError
from unfed.aggregation.tree import RunningMean
from unfed.base.types import AdapterState, ServerState


class MeanOfFactors:
    """A streaming weighted mean of every tensor, and how far its products are from the mean of the products.

    Memory: one adapter in float32, and what the error meter holds.
    """

    def __init__(self, scaling: Scaling, num_clients: int, seed: int) -> None:
        self._mean = RunningMean()
        self._error = AggregationError(scaling, num_clients, seed=seed)

    def add(self, adapter: AdapterState, weight: float) -> None:
        """See :class:`Collector`."""
        self._mean.add(adapter, weight)
        self._error.add(adapter, weight)

    def result(self) -> Merged:
        """See :class:`Collector`."""
        adapter = self._mean.result()
        return Merged(adapter, self._error.result(adapter), self._error.is_estimate)


@dataclass(frozen=True)
class FedIT(AdapterRule):
    """``A = sum p_k A_k``, ``B = sum p_k B_k``. Inexact: ``B A`` is ``sum p_k B_k A_k`` only where all A or B agree.

    Works for full-parameter training as well, where it is the plain mean. Unequal ranks are averaged with zeros for
    what a client has not (the baseline that HetLoRA's paper improves on): components that few clients have shrink.
    """

    title: ClassVar[str] = "fedit"
    unequal_ranks: ClassVar[bool] = True
    linear: ClassVar[bool] = True

    def collector(self, state: ServerState, num_clients: int) -> Collector:
        """See :meth:`AdapterRule.collector`."""
        del state
        return MeanOfFactors(self.scaling, num_clients, self.probe_seed)
