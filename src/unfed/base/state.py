"""A set of tensors by name: what clients train, and what travels."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from types import MappingProxyType

import torch
from torch import Tensor


class AdapterState(Mapping[str, Tensor]):
    """Trainable tensors by PEFT name (without the adapter's own name), in sorted order.

    Every tensor is detached and on the CPU, and nobody changes one in place: whoever wants other
    values makes another ``AdapterState``. In full-parameter mode the names are the model's own.
    """

    __slots__ = ("_digest", "_dtypes", "_finite", "_nbytes", "_shapes", "_tensors")

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if tensor.requires_grad or tensor.device.type != "cpu":
                raise ValueError(f"{name}: an AdapterState holds detached CPU tensors")
        self._tensors = MappingProxyType({n: tensors[n] for n in sorted(tensors)})
        self._digest: str | None = None
        self._finite: bool | None = None
        self._nbytes: int | None = None
        self._dtypes: Mapping[str, torch.dtype] | None = None
        self._shapes: Mapping[str, torch.Size] | None = None

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"AdapterState({len(self)} tensors, {self.numel} values, {self.nbytes} bytes)"

    @property
    def numel(self) -> int:
        """Number of values."""
        return sum(t.numel() for t in self.values())

    @property
    def nbytes(self) -> int:
        """Size in bytes in its own dtypes: what travels, uncompressed."""
        if self._nbytes is None:
            self._nbytes = sum([t.nbytes for t in self._tensors.values()])
        return self._nbytes

    def without(self, names: AbstractSet[str]) -> AdapterState:
        """The same tensors less those of ``names``; no copy."""
        return AdapterState({n: t for n, t in self.items() if n not in names}) if names else self

    def filled(self, others: AdapterState) -> AdapterState:
        """With the tensors of ``others`` whose names are missing here; no copy."""
        return self if len(self) == len(others) else AdapterState({**others, **self})

    def digest(self) -> str:
        """SHA-256 over names, dtypes, shapes and bytes, as ``sha256:<hex>``; computed once."""
        if self._digest is None:
            self._digest = self._compute_digest()
        return self._digest

    def _compute_digest(self) -> str:
        h = hashlib.sha256()
        for name, tensor in self.items():
            h.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}\n".encode())
            h.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return "sha256:" + h.hexdigest()

    def problems_against(self, like: AdapterState) -> list[str]:
        """What keeps this state from being averaged with ``like``: names, shapes, NaN or infinity."""
        if self.finite and self.shapes == like.shapes:
            return []
        found = [f"missing {n}" for n in like if n not in self]
        found += [f"unknown {n}" for n in self if n not in like]
        for name in self:
            if name in like and self[name].shape != like[name].shape:
                found.append(f"{name} has shape {tuple(self[name].shape)}, not {tuple(like[name].shape)}")
            elif not bool(torch.isfinite(self[name]).all()):
                found.append(f"{name} has values that are not finite")
        return found

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """Shapes by name."""
        if self._shapes is None:
            self._shapes = {n: t.shape for n, t in self._tensors.items()}
        return self._shapes

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """Dtypes by name."""
        if self._dtypes is None:
            self._dtypes = {n: t.dtype for n, t in self._tensors.items()}
        return self._dtypes

    @property
    def finite(self) -> bool:
        """Whether every value is a finite number; found out once. A sum is finite only where all that was added is, and
        is quicker than a look at each value, which follows where one is not (finite values may add up to infinity)."""
        if self._finite is None:
            sums = [float(t.sum()) for t in self._tensors.values() if t.is_floating_point()]
            self._finite = all(map(math.isfinite, sums)) or all(bool(torch.isfinite(t).all()) for t in self.values())
        return self._finite
