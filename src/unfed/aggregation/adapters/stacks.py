"""Clients' products ``B_k A_k`` side by side, and the best factors of an adapter's rank for their sum.

Built on :class:`unfed.aggregation.adapters.low_rank.Products`: with ``R`` components in all a decomposition of an
``(m, n)`` module costs ``O((m + n) R^2 + R^3)`` in time and ``O((m + n) R)`` in memory, float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unfed.aggregation.adapters.low_rank import Products
from unfed.aggregation.lora import EXACT_LIMIT

HELD = 16
"""Beyond :data:`EXACT_LIMIT` clients a stack is cut whenever it has so many times the adapter's rank."""
KEPT = 8
"""To so many times the adapter's rank."""


def product(b: Tensor, a: Tensor, weight: float = 1.0) -> Products:
    """``weight * b @ a`` of LoRA factors of any shape and dtype, without the rank components that are 0 on a side."""
    left, right = b.flatten(1).double() * weight, a.flatten(1).double()
    there = (left != 0).any(dim=0) & (right != 0).any(dim=1)
    return Products(left[:, there], right[there])


def times(whole: Products, factor: float) -> Products:
    """A sum, multiplied."""
    return Products(whole.left * factor, whole.right)


def side_by_side(parts: Sequence[Products]) -> Products:
    """The sum of several, as one."""
    return Products(torch.cat([p.left for p in parts], dim=1), torch.cat([p.right for p in parts]))


def factors(whole: Products, rank: int) -> tuple[Tensor, Tensor, int]:
    """``B = U sqrt(S)`` ``(m, rank)`` and ``A = sqrt(S) V^T`` ``(rank, n)`` of the largest ``rank`` singular values,
    and how many of those are not 0 (to rounding); beyond them the factors are 0.

    Of each pair of singular vectors the left one has its largest entry positive, so that the same sum gives the same
    factors in whatever order it was added up.
    """
    best = whole.smallest(rank)
    there = (best.left != 0).any(dim=0)
    left, right = best.left[:, there], best.right[there]
    found = left.shape[1]
    sign = left.gather(0, left.abs().argmax(dim=0, keepdim=True)).sign().squeeze(0)
    b = torch.zeros(left.shape[0], rank, dtype=torch.float64)
    a = torch.zeros(rank, right.shape[1], dtype=torch.float64)
    b[:, :found], a[:found] = left * sign, right * sign[:, None]
    return b, a, found


class Stack:
    """The weighted sum of one module's products, client by client.

    ``num_clients``: how many are expected at most. Up to :data:`EXACT_LIMIT` everything is kept, and the sum is exact;
    beyond, the stack is cut to its largest singular values now and then, so that memory does not grow with the clients.
    """

    def __init__(self, num_clients: int) -> None:
        self._parts: list[Products] = []
        self._cuts = num_clients > EXACT_LIMIT

    def add(self, b: Tensor, a: Tensor, weight: float) -> None:
        """One client's factors ``b`` ``(m, r)`` and ``a`` ``(r, n)``."""
        self._parts.append(product(b, a, weight))
        rank = a.shape[0]
        if self._cuts and sum(p.left.shape[1] for p in self._parts) > HELD * rank:
            b64, a64, found = factors(side_by_side(self._parts), KEPT * rank)
            self._parts = [Products(b64[:, :found], a64[:found])]

    def sum(self, total: float) -> Products:
        """What was added, divided by ``total``."""
        return times(side_by_side(self._parts), 1.0 / total)
