"""Arithmetic on whole adapters, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from unfed.base.errors import AdapterError
from unfed.base.types import AdapterState


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float32 for the 16-bit kinds and for float32, float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def floats(state: AdapterState) -> list[str]:
    """Names of the floating tensors; the others (integer and boolean buffers) are copied, never averaged."""
    return [n for n, t in state.items() if t.is_floating_point()]


def full_like(state: AdapterState, value: float) -> AdapterState:
    """Float32 tensors of ``value`` in the shapes of the floating tensors: a fresh optimizer slot."""
    return AdapterState({n: torch.full(state[n].shape, value, dtype=torch.float32) for n in floats(state)})


def delta(target: AdapterState, origin: AdapterState) -> AdapterState:
    """``target - origin`` of the floating tensors, in float32 (or wider). ``AdapterError`` if they do not match."""
    if found := target.problems_against(origin):
        raise AdapterError("; ".join(found[:3]))
    return AdapterState(
        {n: target[n].to(working_dtype(target[n].dtype)) - origin[n].to(working_dtype(origin[n].dtype))
         for n in floats(target)}
    )  # fmt: skip


def zip_map(function: Callable[..., Tensor], first: AdapterState, *others: AdapterState) -> AdapterState:
    """``function`` of the tensors of one name, for each name of ``first``."""
    return AdapterState({n: function(first[n], *(o[n] for o in others)) for n in first})


def inner(first: AdapterState, second: AdapterState) -> float:
    """The inner product of two states as vectors, over the floating tensors, in float64."""
    return sum(float(first[n].double().flatten() @ second[n].double().flatten()) for n in floats(first))


def norm(state: AdapterState) -> float:
    """The Euclidean length of a state as a vector."""
    return math.sqrt(inner(state, state))


def moved(origin: AdapterState, direction: AdapterState, step: float, buffers: AdapterState) -> AdapterState:
    """``origin + step * direction`` in ``origin``'s dtypes; integer and boolean tensors come from ``buffers``."""
    result: dict[str, Tensor] = {}
    for name, tensor in origin.items():
        if name in direction:
            wide = tensor.to(working_dtype(tensor.dtype))
            result[name] = torch.add(wide, direction[name], alpha=step).to(tensor.dtype)
        else:
            result[name] = buffers[name]
    return AdapterState(result)


class RunningMean:
    """A weighted mean that sees each state once and keeps one float32 copy.

    ``mean += (x_k - mean) * (w_k / (w_1 + ... + w_k))``, the incremental form of West (1979): the mean of one
    state is that state bit for bit, and so is the mean of equal states. A float64 tensor stays float64.
    """

    def __init__(self) -> None:
        self._mean: dict[str, Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._shapes: Mapping[str, torch.Size] = {}
        self._floating: list[str] = []
        self._wide: dict[str, torch.dtype] = {}
        self._weight = 0.0

    def add(self, state: AdapterState, weight: float) -> None:
        """Take one more state in. ``AdapterError`` for other names or shapes, NaN, or a weight of 0 or less."""
        if not weight > 0:
            raise AdapterError(f"a weight must be above 0, not {weight}")
        first = not self._dtypes
        fits = state.finite and (first or state.shapes == self._shapes)
        if not fits and (found := state.problems_against(state if first else AdapterState(self._mean))):
            raise AdapterError("; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else ""))
        self._weight += weight
        if first:
            self._begin(state)
            return
        if not self._floating:
            return
        means = [self._mean[n] for n in self._floating]
        given = [state[n] for n in self._floating]
        if state.dtypes != self._wide:
            given = [t.to(m.dtype) for t, m in zip(given, means, strict=True)]
        torch._foreach_lerp_(means, given, weight / self._weight)

    def _begin(self, state: AdapterState) -> None:
        self._dtypes, self._shapes, self._floating = dict(state.dtypes), state.shapes, floats(state)
        for name, tensor in state.items():
            wide = working_dtype(tensor.dtype) if tensor.is_floating_point() else tensor.dtype
            self._mean[name], self._wide[name] = tensor.to(wide, copy=True), wide

    def result(self) -> AdapterState:
        """The mean so far, in the dtypes of the first state. ``AdapterError`` when nothing was added."""
        if not self._dtypes:
            raise AdapterError("there is no client update to average")
        return AdapterState({n: t.to(self._dtypes[n], copy=True) for n, t in self._mean.items()})
