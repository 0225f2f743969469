"""FedSA-LoRA: A is shared, every client keeps a B of its own (Guo et al. 2025, "Selective Aggregation for Low-Rank
Adaptation in Federated Learning", ICLR 2025, arXiv 2410.01463)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from unfed.aggregation.adapters.base import AdapterRule, Collector, Merged
from unfed.aggregation.adapters.one_factor import factor_names
from unfed.aggregation.tree import RunningMean
from unfed.base.types import AdapterState, Broadcast, ServerState


class _Shared:
    """The mean of what travels. There is no product of averaged factors, so there is no aggregation error either."""

    def __init__(self) -> None:
        self._mean = RunningMean()

    def add(self, adapter: AdapterState, weight: float) -> None:
        """See :class:`Collector`."""
        self._mean.add(adapter, weight)

    def result(self) -> Merged:
        """See :class:`Collector`."""
        return Merged(self._mean.result())


@dataclass(frozen=True)
class FedSALoRA(AdapterRule):
    """Both factors train; ``A = sum p_k A_k`` is what all begin the next round with, and ``B_k`` stays at its client.

    A server optimizer steps on A alone. Biases and modules that are saved whole are averaged as ever.

    Departures: the paper has no model for everyone. Here the clients send their B once, after the last round, and
    what is served is :func:`common`. The paper's mean is uniform; here ``weighting`` decides, as for every rule.
    """

    title: ClassVar[str] = "fedsa"
    linear: ClassVar[bool] = True
    whole_at_server: ClassVar[bool] = False
    why_not_whole: ClassVar[str] = "every client keeps a B of its own, so the server never sees a whole update"

    def broadcast(self, state: ServerState, client_ids: Sequence[str]) -> Broadcast:
        """A travels both ways; the server's B says only what a client without one of its own begins with."""
        del client_ids
        return Broadcast(state.adapter, state.base_residual, local=factor_names(state.adapter, 1))

    def collector(self, state: ServerState, num_clients: int) -> Collector:
        """See :meth:`AdapterRule.collector`."""
        del state, num_clients
        return _Shared()


def common(shared: AdapterState, own: Iterable[tuple[AdapterState, float]]) -> AdapterState:
    """One adapter for everyone: ``shared`` with the weighted means of what the clients kept (state, weight).

    With one A for all, ``s (sum p_k B_k) A = sum p_k (s B_k A)``: it does what the personal adapters do on average,
    exactly. Without any, ``shared`` as it is.
    """
    mean, there = RunningMean(), False
    for state, weight in own:
        mean.add(state, weight)
        there = True
    return mean.result().filled(shared) if there else shared
