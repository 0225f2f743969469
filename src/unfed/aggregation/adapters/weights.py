"""A server's step on effective weights whose entries are never formed: all of it on low-rank products.

With ``W`` the product of the present adapter and ``M`` that of the merged one, plain averaging takes ``W + lr (M - W)``
and momentum ``V = beta V + (M - W)``, ``W + lr V``. Both are sums of products of rank ``r`` to ``4 r``, put side by
side and cut back to the adapter's rank by QR and SVD. Tensors that are no factors take the same step entry by entry.
The scaling is one for all of them, so it does not enter.
"""

from __future__ import annotations

from torch import Tensor

from unfed.aggregation.adapters.base import Pace
from unfed.aggregation.adapters.low_rank import Products
from unfed.aggregation.adapters.parts import into, pair_names
from unfed.aggregation.adapters.stacks import factors, product, side_by_side, times
from unfed.aggregation.lora import lora_pairs
from unfed.aggregation.tree import delta, full_like, moved, zip_map
from unfed.base.types import AdapterState, OptState

MOMENTUM = "m"
WIDTH = 2
"""Momentum is kept at so many times the adapter's rank: that of one update, ``M - W``."""


def stepped(memory: OptState, present: AdapterState, merged: AdapterState, pace: Pace) -> tuple[OptState, AdapterState]:
    """The optimizer's memory (slot ``m``, where there is momentum) and the adapter after a step towards ``merged``.

    A step of 1 without momentum is ``merged`` itself. Momentum's factors are of rank ``2 r`` at most: what a longer
    memory has beyond its ``2 r`` largest singular values is dropped.
    """
    if pace.momentum == 0.0 and pace.lr == 1.0:
        return memory, merged
    found: dict[str, Tensor] = {}
    slots: dict[str, Tensor] = {}
    before = memory.get(MOMENTUM, AdapterState({}))
    for pair in lora_pairs(merged).values():
        now, towards = _of(present, pair), _of(merged, pair)
        change = [towards, times(now, -1.0)]
        if pace.momentum > 0.0:
            change = [_kept(slots, pair, [times(_of(before, pair), pace.momentum), *change], merged)]
        whole = side_by_side([now, *(times(part, pace.lr) for part in change)])
        into(found, pair, whole, merged, merged[pair[0]])
    names = pair_names(merged)
    rest, rest_slots = _entrywise(before.without(names), present.without(names), merged.without(names), pace)
    memory = {MOMENTUM: AdapterState({**rest_slots, **slots})} if pace.momentum > 0.0 else memory
    return memory, AdapterState({**found, **rest})


def _of(adapter: AdapterState, pair: tuple[str, str]) -> Products:
    return product(adapter[pair[1]], adapter[pair[0]])


def _kept(slots: dict[str, Tensor], pair: tuple[str, str], parts: list[Products], like: AdapterState) -> Products:
    """The sum of ``parts``, cut to what the memory holds of it, which goes into ``slots``."""
    b, a, found = factors(side_by_side(parts), WIDTH * like[pair[0]].shape[0])
    slots[pair[0]], slots[pair[1]] = a.float(), b.float()
    return Products(b[:, :found], a[:found])


def _entrywise(
    before: AdapterState, present: AdapterState, merged: AdapterState, pace: Pace
) -> tuple[AdapterState, AdapterState]:
    direction = delta(merged, present)
    if pace.momentum > 0.0:
        old = before or full_like(direction, 0.0)
        direction = zip_map(lambda o, d: pace.momentum * o + d.float(), old, direction)
    return moved(present, direction, pace.lr, merged), direction
