"""HetLoRA: factors averaged with zeros for missing ranks, weighted by the size of what each client has learnt (Cho et
al. 2024, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", arXiv 2401.06432)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from unfed.aggregation.adapters.base import AdapterRule, Collector, Merged, Scaling
from unfed.aggregation.adapters.parts import pair_names
from unfed.aggregation.adapters.stacks import product
from unfed.aggregation.lora import AggregationError, lora_pairs, scale_of
from unfed.aggregation.tree import RunningMean
from unfed.base.params import flag, number
from unfed.base.types import AdapterState, Broadcast, ClientUpdate, OptState, ServerState

RANKS = "hetlora.ranks"
"""Slot of the ranks of clients that gave some up, by client."""


def learnt_norm(adapter: AdapterState, scaling: Scaling) -> float:
    """``||s B A||_F`` over all modules of an adapter, float64."""
    pairs = lora_pairs(adapter).items()
    return math.sqrt(sum((scale_of(scaling, m) * product(adapter[b], adapter[a]).norm()) ** 2 for m, (a, b) in pairs))


class _BySize:
    """See :class:`Collector`. Memory: two adapters, and what the error meter holds."""

    def __init__(self, rule: HetLoRA, num_clients: int) -> None:
        self._rule = rule
        self._factors, self._plain, self._others = RunningMean(), RunningMean(), RunningMean()
        self._error = AggregationError(rule.scaling, num_clients, seed=rule.probe_seed)
        self._learnt, self._more = False, False

    def add(self, adapter: AdapterState, weight: float) -> None:
        """See :class:`Collector`."""
        names = pair_names(adapter)
        pairs, others = adapter.without(frozenset(adapter) - names), adapter.without(names)
        norm = learnt_norm(adapter, self._rule.scaling)
        if norm > 0:
            self._factors.add(pairs, norm * weight if self._rule.by_weight else norm)
        elif not self._learnt:
            self._plain.add(pairs, weight)
        self._learnt |= norm > 0
        self._error.add(adapter, weight)
        if others:
            self._others.add(others, weight)
            self._more = True

    def result(self) -> Merged:
        """See :class:`Collector`."""
        factors = (self._factors if self._learnt else self._plain).result()
        adapter = AdapterState({**factors, **self._others.result()}) if self._more else factors
        return Merged(adapter, self._error.result(adapter), self._error.is_estimate)


@dataclass(frozen=True)
class HetLoRA(AdapterRule):
    """``A = sum q_k A_k`` and ``B = sum q_k B_k``, zeros in place of ranks that a client has not, with
    ``q_k = ||s B_k A_k||_F / sum_j ||s B_j A_j||_F`` over all modules; a client gets the first components, as many as
    its rank. Inexact, also in its weights: the error is that against the mean by the aggregator's weights.

    Where no client has learnt anything yet the aggregator's weights stand in. ``by_weight``: multiply by them always,
    so that clients' sizes (or a robust rule's weights) count as well. Tensors that are no factors are averaged by them.

    Rank self-pruning: plain training adds ``prune_lambda ||B[:, k:]|| ||A[k:]||`` (summed over modules), ``k`` being
    ``gamma`` times the client's rank; where that norm is smaller after the round than before, the client goes on with
    rank ``k`` (1 at least). ``gamma=1`` leaves it out. The paper was not at hand: see docs/aggregation.md.
    """

    title: ClassVar[str] = "hetlora"
    unequal_ranks: ClassVar[bool] = True
    by_weight: bool = flag(default=False)
    gamma: float = number(0.99, above=0, at_most=1)
    prune_lambda: float = number(0.01, at_least=0)

    @property
    def pruning(self) -> tuple[float, float] | None:
        """See :meth:`AdapterRule.pruning`."""
        return (self.gamma, self.prune_lambda) if self.gamma < 1 else None

    def broadcast(self, state: ServerState, client_ids: Sequence[str]) -> Broadcast:
        """A client that gave ranks up gets what it has left."""
        left = {c: int(r) for c, r in state.opt_state.get(RANKS, {}).items()}
        return AdapterRule.broadcast(replace(self, ranks={**self.ranks, **left}), state, client_ids)

    def remembered(self, state: ServerState, answers: Sequence[ClientUpdate]) -> OptState:
        """The clients' ranks after pruning; a client's rank never grows."""
        left = dict(state.opt_state.get(RANKS, {}))
        for answer in answers:
            rank = answer.metrics.get("rank")
            if rank is not None:
                most = int(left.get(answer.client_id, rank))
                left[answer.client_id] = torch.tensor(max(1, min(int(rank), most)))
        return {RANKS: AdapterState(left)} if left else {}

    def collector(self, state: ServerState, num_clients: int) -> Collector:
        """See :meth:`AdapterRule.collector`."""
        del state
        return _BySize(self, num_clients)
