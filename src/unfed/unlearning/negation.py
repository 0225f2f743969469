"""Signs of LoRA factors: what is negated in one of them is negated in the update."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from unfed.aggregation.lora import lora_pairs
from unfed.base.types import AdapterState


def multiplied(
    adapter: AdapterState, by: float, modules: Collection[str] | None = None, factor: Literal["A", "B"] = "B"
) -> AdapterState:
    """``adapter`` with one factor of the update ``s B A`` of each module (of ``modules`` alone) multiplied by ``by``.

    The update is multiplied by as much. Both factors negated change nothing: ``(-B)(-A) = B A``.
    """
    tensors = dict(adapter)
    for module, pair in lora_pairs(adapter).items():
        if modules is None or module in modules:
            name = pair[("A", "B").index(factor)]
            tensors[name] = adapter[name] * by
    return AdapterState(tensors)
