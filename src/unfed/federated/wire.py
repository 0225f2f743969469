"""How a client's change of the adapter is written for the wire: as it is, in 16 or 8 bits, or its largest entries.

A message is a set of named arrays of stated dtypes, kept as the bytes of a safetensors file. Both ends know names,
order and shapes of the adapter's tensors from the broadcast, so a message holds all their values in one vector of
``N``: the floating tensors in the order of their names, each flattened.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from unfed.base import params as hyper
from unfed.base.errors import ConfigError, nearest
from unfed.base.params import Hyperparameters, choice, flag, number
from unfed.base.types import AdapterState
from unfed.federated.indices import index_bytes, read_index, write_index

Arrays = Mapping[str, Tensor]
Down = Literal["float32", "bfloat16"]
VALUES, SCALES = "values", "scales"
LEVELS = 127
"""Steps of ``int8`` on either side of zero; -128 is not used, so that the range is symmetric."""


@dataclass(frozen=True)
class Wire(Hyperparameters):
    """A format by name (``wire=``). ``down``: dtype of what the server sends (``float32``: tensors as they are)."""

    title: ClassVar[str]
    down: Down = choice("float32", ("float32", "bfloat16"))

    @property
    def name(self) -> str:
        """As in ``wire=``."""
        return self.title

    @property
    def remembers(self) -> bool:
        """Whether a client keeps what was lost and adds it to its next change."""
        return bool(getattr(self, "error_feedback", False))

    @property
    def as_it_is(self) -> bool:
        """Whether nothing is encoded in either direction."""
        return self.title == Float32.title and self.down == "float32"

    @property
    def up_bytes(self) -> float:
        """Bytes of one float32 value on its way to the server, without headers and scales."""
        raise NotImplementedError

    def encode(self, change: AdapterState, generator: torch.Generator) -> dict[str, Tensor]:
        """The arrays for the floating tensors of ``change`` (float32 or wider). ``generator``: of rounding at random.

        What is not finite stays so: an array that :meth:`decode` turns into values that are not finite.
        """
        raise NotImplementedError

    def decode(self, arrays: Arrays, like: AdapterState) -> AdapterState:
        """Float32 tensors in the shapes of ``like``, which has floating tensors only. ``ValueError``: they do not
        fit."""
        raise NotImplementedError


@dataclass(frozen=True)
class Float32(Wire):
    """No loss. Where ``down`` is float32 too, whole adapters travel as they are, in their own dtypes."""

    title: ClassVar[str] = "float32"

    @property
    def up_bytes(self) -> float:
        """See :attr:`Wire.up_bytes`."""
        return 4.0

    def encode(self, change: AdapterState, generator: torch.Generator) -> dict[str, Tensor]:
        """``values``: float32 ``(N,)``."""
        del generator
        return {VALUES: flat(change)}

    def decode(self, arrays: Arrays, like: AdapterState) -> AdapterState:
        """See :meth:`Wire.decode`."""
        return shaped(_checked(arrays, VALUES, torch.float32, like.numel), like)


@dataclass(frozen=True)
class BFloat16(Wire):
    """Rounded to the nearest bfloat16: a relative error of at most 2**-8 for each value (subnormals apart)."""

    title: ClassVar[str] = "bfloat16"
    error_feedback: bool = flag(True)

    @property
    def up_bytes(self) -> float:
        """See :attr:`Wire.up_bytes`."""
        return 2.0

    def encode(self, change: AdapterState, generator: torch.Generator) -> dict[str, Tensor]:
        """``values``: bfloat16 ``(N,)``."""
        del generator
        return {VALUES: flat(change).to(torch.bfloat16)}

    def decode(self, arrays: Arrays, like: AdapterState) -> AdapterState:
        """See :meth:`Wire.decode`."""
        return shaped(_checked(arrays, VALUES, torch.bfloat16, like.numel).float(), like)


@dataclass(frozen=True)
class Int8(Wire):
    """Symmetric 8 bits: ``q = round(x / s)``, ``s = max |x| / 127``, for each tensor or each slice of one.

    ``scale``: ``tensor`` has one ``s`` for each tensor; ``slice`` one for each index of its shorter dimension, which in
    a LoRA factor is the rank (rows of A, columns of B). ``rounding``: ``nearest`` is off by at most ``s / 2``;
    ``stochastic`` rounds up with the probability of the remainder, so that the mean of many is the value itself, and
    is off by less than ``s`` (Alistarh et al. 2017, "QSGD"; there the Euclidean norm takes the maximum's place).
    """

    title: ClassVar[str] = "int8"
    scale: Literal["tensor", "slice"] = choice("tensor", ("tensor", "slice"))
    rounding: Literal["nearest", "stochastic"] = choice("nearest", ("nearest", "stochastic"))
    error_feedback: bool = flag(True)

    @property
    def up_bytes(self) -> float:
        """See :attr:`Wire.up_bytes`."""
        return 1.0

    def encode(self, change: AdapterState, generator: torch.Generator) -> dict[str, Tensor]:
        """``values``: int8 ``(N,)``; ``scales``: float32, tensor by tensor."""
        values: list[Tensor] = []
        scales: list[Tensor] = []
        for tensor in change.values():
            wide = tensor.float()
            scale = self._largest(wide) / LEVELS
            drawn = generator if self.rounding == "stochastic" else None
            values.append(_in_steps(wide, scale, drawn).flatten())
            scales.append(scale.flatten())
        return {VALUES: _joined(values, torch.int8), SCALES: _joined(scales, torch.float32)}

    def decode(self, arrays: Arrays, like: AdapterState) -> AdapterState:
        """See :meth:`Wire.decode`."""
        sizes = [self._scale_shape(t) for t in like.values()]
        scales = _checked(arrays, SCALES, torch.float32, sum(math.prod(s) for s in sizes))
        steps = shaped(_checked(arrays, VALUES, torch.int8, like.numel), like)
        parts = scales.split([math.prod(s) for s in sizes])
        return AdapterState(
            {n: t.float() * s.view(size) for (n, t), s, size in zip(steps.items(), parts, sizes, strict=True)}
        )

    def _scale_shape(self, tensor: Tensor) -> tuple[int, ...]:
        kept = min(range(tensor.dim()), key=lambda d: tensor.shape[d]) if tensor.dim() > 1 else None
        alone = self.scale == "tensor" or kept is None
        return tuple(1 if alone or d != kept else n for d, n in enumerate(tensor.shape))

    def _largest(self, tensor: Tensor) -> Tensor:
        size = self._scale_shape(tensor)
        if tensor.numel() == 0:
            return torch.zeros(size)
        over = [d for d, n in enumerate(size) if n == 1]
        return tensor.abs().amax(dim=over, keepdim=True) if over else tensor.abs()


@dataclass(frozen=True)
class TopK(Wire):
    """The ``k = ceil(fraction * N)`` entries of largest size in the whole change; the others count as zero.

    Aji and Heafield 2017 ("Sparse Communication for Distributed Gradient Descent"), with one threshold for all tensors,
    found exactly. ``values``: the dtype of what is sent; in ``int8`` each tensor has one scale, as in :class:`Int8`
    (ours: the paper sends them whole). Positions: see :func:`unfed.federated.indices.write_index`.
    """

    title: ClassVar[str] = "topk"
    fraction: float = number(0.05, above=0.0, at_most=1.0)
    values: Literal["float32", "bfloat16", "int8"] = choice("float32", ("float32", "bfloat16", "int8"))
    error_feedback: bool = flag(True)

    @property
    def up_bytes(self) -> float:
        """See :attr:`Wire.up_bytes`."""
        return self._dtype.itemsize * self.fraction + index_bytes(self.fraction)

    @property
    def _dtype(self) -> torch.dtype:
        return getattr(torch, self.values)

    def encode(self, change: AdapterState, generator: torch.Generator) -> dict[str, Tensor]:
        """``values``: ``(k,)`` by rising index; where they are; with ``int8``, ``scales``: float32, one a tensor."""
        del generator
        vector = flat(change)
        k = math.ceil(self.fraction * vector.numel())
        index = torch.topk(vector.abs(), k, sorted=False).indices.sort().values
        values, where = vector[index], write_index(index, vector.numel())
        if self.values != "int8":
            return {VALUES: values.to(self._dtype), **where}
        owner = _owner(index, change)
        scales = torch.zeros(len(change)).scatter_reduce_(0, owner, values.abs(), "amax") / LEVELS
        return {VALUES: _in_steps(values, scales[owner]), SCALES: scales, **where}

    def decode(self, arrays: Arrays, like: AdapterState) -> AdapterState:
        """See :meth:`Wire.decode`."""
        total = like.numel
        index = read_index(arrays, lambda name, dtype, size: _checked(arrays, name, dtype, size), total)
        values = _checked(arrays, VALUES, self._dtype, len(index)).float()
        if self.values == "int8":
            values *= _checked(arrays, SCALES, torch.float32, len(like))[_owner(index, like)]
        return shaped(torch.zeros(total).index_copy_(0, index, values), like)


def _owner(index: Tensor, like: AdapterState) -> Tensor:
    """The number of the tensor that each position of the vector lies in."""
    ends = torch.tensor([t.numel() for t in like.values()], dtype=torch.long).cumsum(0)
    return torch.searchsorted(ends, index, right=True)


def _in_steps(values: Tensor, scale: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """``values`` in int8 steps of ``scale``, to the nearest, or at random where there is a generator.

    A scale that is not finite carries that to the decoded values; the steps beside it mean nothing.
    """
    steps = torch.where(scale > 0, values / scale, torch.zeros_like(values))
    if generator is None:
        steps = torch.round(steps)
    else:
        steps = torch.floor(steps + torch.rand(steps.shape, generator=generator))
    return steps.nan_to_num(1.0).clamp(-LEVELS, LEVELS).to(torch.int8)


def flat(state: AdapterState) -> Tensor:
    """All values in one float32 vector ``(N,)``."""
    return _joined([t.flatten().float() for t in state.values()], torch.float32)


def shaped(vector: Tensor, like: AdapterState) -> AdapterState:
    """The vector cut into tensors of the names and shapes of ``like``; no copy."""
    parts = vector.split([t.numel() for t in like.values()])
    return AdapterState({n: p.view(t.shape) for (n, t), p in zip(like.items(), parts, strict=True)})


def _joined(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat(parts) if parts else torch.empty(0, dtype=dtype)


def _checked(arrays: Arrays, name: str, dtype: torch.dtype, size: int) -> Tensor:
    """An array of a message that came from elsewhere. ``ValueError``: it is not what it should be."""
    found = arrays.get(name)
    if found is None:
        raise ValueError(f"the message has no {name}")
    if found.dtype != dtype or tuple(found.shape) != (size,):
        raise ValueError(f"{name} is {found.dtype} of shape {tuple(found.shape)}, not {dtype} of shape ({size},)")
    return found


WIRES: Mapping[str, type[Wire]] = MappingProxyType({cls.title: cls for cls in (Float32, BFloat16, Int8, TopK)})


def wire_problems(name: str, params: Mapping[str, Any]) -> list[str]:
    """Everything wrong with a format's name and hyperparameters."""
    if name not in WIRES:
        return [f"unknown wire format {name!r}{nearest(name, WIRES)}"]
    return hyper.problems(WIRES[name], params, "wire", WIRES)


def build_wire(name: str, params: Mapping[str, Any]) -> Wire:
    """The format ``name`` with ``params`` over its defaults; ``ConfigError`` lists every problem."""
    if found := wire_problems(name, params):
        raise ConfigError(found)
    return WIRES[name](**params)
