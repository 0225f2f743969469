"""Adapters of one shape cut to a smaller rank, and back.

Rank components beyond a client's own are zero in both factors. There gradients are zero as well (each factor's is a
product with the other), so a zero-padded adapter trains exactly as one of the smaller rank would.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unfed.aggregation.lora import lora_pairs
from unfed.base.errors import AdapterError
from unfed.base.types import AdapterState


def truncated(adapter: AdapterState, rank: int) -> AdapterState:
    """The first ``rank`` rows of every A and columns of every B (all, where there are fewer); the rest as it is."""
    found = dict(adapter)
    for a, b in lora_pairs(adapter).values():
        found[a], found[b] = adapter[a][:rank], adapter[b][:, :rank]
    return AdapterState(found)


def padded(adapter: AdapterState, like: AdapterState) -> AdapterState:
    """``adapter`` with zeros where its factors have fewer components than those of ``like``. ``AdapterError``: more."""
    found = dict(adapter)
    for a, b in lora_pairs(like).values():
        if a in adapter:
            found[a] = _grown(a, adapter[a], like[a].shape)
        if b in adapter:
            found[b] = _grown(b, adapter[b], like[b].shape)
    return AdapterState(found)


def _grown(name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    if tensor.shape == shape:
        return tensor
    if any(have > wanted for have, wanted in zip(tensor.shape, shape, strict=True)):
        raise AdapterError(f"{name} has shape {tuple(tensor.shape)}, more than {tuple(shape)}")
    grown = torch.zeros(shape, dtype=tensor.dtype)
    grown[tuple(slice(n) for n in tensor.shape)] = tensor
    return grown
