"""Fed-SB: two fixed factors and between them an r x r core, which alone trains and travels.

Singhal et al. 2025, "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private)
Federated LoRA Fine-Tuning", arXiv 2502.15436; the factors as in LoRA-SB (Ponkshe et al. 2024, arXiv 2411.19557).

The weight of a module is ``W + s B R A`` with ``B`` ``(m, r)``, ``R`` ``(r, r)``, ``A`` ``(r, n)``; here B has
orthonormal columns and A orthonormal rows. As ``B (sum p_k R_k) A = sum p_k B R_k A``, the mean of the cores is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unfed.aggregation.adapters.base import AdapterRule, Collector, Merged, Scaling
from unfed.aggregation.lora import AggregationError, lora_pairs
from unfed.aggregation.tree import RunningMean
from unfed.base.errors import AdapterError
from unfed.base.params import whole
from unfed.base.types import AdapterState, Broadcast, ServerState

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""By module a matrix ``(m, n)`` as ``left`` ``(m, k)`` times ``right`` ``(k, n)``."""


def core_name(module: str) -> str:
    """The name of a module's R in an ``AdapterState``."""
    return f"{module}.lora_R.weight"


class _Cores:
    """The mean of the cores, and its aggregation error: ``||B X A|| = ||X||`` between orthonormal factors."""

    def __init__(self, scaling: Scaling, num_clients: int, seed: int) -> None:
        self._mean = RunningMean()
        self._error = AggregationError(scaling, num_clients, seed=seed)

    def add(self, adapter: AdapterState, weight: float) -> None:
        """See :class:`Collector`."""
        self._mean.add(adapter, weight)
        self._error.add(_as_pairs(adapter), weight)

    def result(self) -> Merged:
        """See :class:`Collector`."""
        adapter = self._mean.result()
        return Merged(adapter, self._error.result(_as_pairs(adapter)), self._error.is_estimate)


def _as_pairs(adapter: AdapterState) -> AdapterState:
    found = {}
    for module, (a, b) in lora_pairs(adapter).items():
        core = adapter[core_name(module)]
        found |= {a: core, b: torch.eye(len(core), dtype=core.dtype)}
    return AdapterState(found)


@dataclass(frozen=True)
class FedSB(AdapterRule):
    """``R = sum p_k R_k``. ``init_rows``: of each client, for the gradient of all weights that the factors of a fresh
    adapter span; ``oversampling``: directions beyond r in its randomised SVD.

    An adapter that has learnt is gone on with in its own spaces: B and A are its singular vectors, R its singular
    values, so the start is that adapter up to rounding and R can only move within what it spans.

    Departures: LoRA-SB takes the SVD of Adam's first step (the gradient's sign times the learning rate) and starts R
    at its singular values, away from the base model. A sign has no low rank that clients could send, so the factors
    here are those of the clients' weighted mean gradient, and R starts at 0: the first round begins with the base.
    """

    title: ClassVar[str] = "fed_sb"
    exact: ClassVar[bool] = True
    linear: ClassVar[bool] = True
    whole_at_server: ClassVar[bool] = False
    why_not_whole: ClassVar[str] = "what trains is an r x r core between two fixed factors, not the adapter's own"
    init_rows: int = whole(32, at_least=1)
    oversampling: int = whole(8, at_least=0)

    def broadcast(self, state: ServerState, client_ids: Sequence[str]) -> Broadcast:
        """R travels both ways; A and B reached the clients before the first round."""
        del client_ids
        fixed = frozenset(name for pair in lora_pairs(state.adapter).values() for name in pair)
        return Broadcast(state.adapter, state.base_residual, frozen=fixed, known=fixed)

    def collector(self, state: ServerState, num_clients: int) -> Collector:
        """See :meth:`AdapterRule.collector`."""
        del state
        return _Cores(self.scaling, num_clients, self.probe_seed)


def is_fresh(adapter: AdapterState) -> bool:
    """Whether the adapter does nothing yet: every B is 0."""
    return all(not bool(adapter[b].any()) for _, b in lora_pairs(adapter).values())


def factored(adapter: AdapterState) -> AdapterState:
    """A learned adapter as fixed factors and a core, ``B A`` kept up to rounding: A and B become its right and left
    singular vectors and R, of diagonal form, its singular values (computed in float64 through QR of both factors).

    ``AdapterError`` for a rank above a module's smaller side.
    """
    tensors = dict(adapter)
    for module, (a, b) in lora_pairs(adapter).items():
        left, right = adapter[b].double(), adapter[a].double()
        u, s, v = _product_svd(module, left, right, right.shape[0])
        kind = adapter[a].dtype
        tensors |= {b: u.to(kind), a: v.to(kind), core_name(module): torch.diag(s).to(kind)}
    return AdapterState(tensors)


def spanned(adapter: AdapterState, gradients: Sequence[tuple[Factors, float]]) -> AdapterState:
    """A fresh adapter with the spaces of a mean gradient: A and B are the top singular vectors of ``sum p_k G_k``,
    which comes as factors with the clients' weights, and R is 0. No ``m x n`` matrix is formed.

    ``AdapterError`` for a rank above a module's smaller side, and where nothing was sent.
    """
    if not gradients:
        raise AdapterError("no client sent a gradient to begin with")
    total = sum(weight for _, weight in gradients)
    tensors = dict(adapter)
    for module, (a, b) in lora_pairs(adapter).items():
        left = torch.cat([f[module][0].double() * (weight / total) for f, weight in gradients], dim=1)
        right = torch.cat([f[module][1].double() for f, _ in gradients])
        kind, rank = adapter[a].dtype, adapter[a].shape[0]
        u, _, v = _product_svd(module, left, right, rank)
        tensors |= {b: u.to(kind), a: v.to(kind), core_name(module): torch.zeros(rank, rank, dtype=kind)}
    return AdapterState(tensors)


def _product_svd(module: str, left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The top of the SVD of ``left @ right``: ``(m, rank)``, ``(rank,)``, ``(rank, n)``."""
    if rank > min(left.shape[0], right.shape[1]):
        raise AdapterError(
            f"aggregator.adapter=fed_sb: {module} is {left.shape[0]} x {right.shape[1]} and cannot have orthonormal "
            f"factors of rank {rank}; lower model.model_args.lora_config.r"
        )
    q_left, t_left = torch.linalg.qr(left)
    q_right, t_right = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(t_left @ t_right.T, full_matrices=False)
    if len(s) < rank:
        raise AdapterError(f"aggregator.adapter=fed_sb: {module}: {len(s)} directions came for a rank of {rank}")
    return (q_left @ u)[:, :rank], s[:rank], (vh @ q_right.T)[:rank]


def plain(adapter: AdapterState) -> AdapterState:
    """The ordinary adapter that does the same: ``R A`` in place of A, and no R (the product in float64)."""
    tensors = dict(adapter)
    for module, (a, _) in lora_pairs(adapter).items():
        core = tensors.pop(core_name(module))
        tensors[a] = (core.double() @ adapter[a].double()).to(adapter[a].dtype)
    return AdapterState(tensors)
