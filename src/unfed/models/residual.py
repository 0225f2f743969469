"""Low-rank factors that act beneath the adapter: what exact aggregation adds to a base model that never changes.

A forward hook adds ``B A x`` to the output of a LoRA layer's base layer. So the base's weights stay as they are,
quantised ones too, and the residual's rank may be another in every round.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from unfed.aggregation.lora import lora_pairs
from unfed.base.errors import AdapterError
from unfed.base.types import AdapterState

_KEY = "unfed_residual"


@dataclass(frozen=True)
class _Held:
    state: AdapterState
    handles: tuple[RemovableHandle, ...]


def residual_of(model: nn.Module) -> AdapterState | None:
    """The residual that acts in the model at present."""
    held = vars(model).get(_KEY)
    return None if held is None else held.state


def put_residual(model: nn.Module, residual: AdapterState | None) -> None:
    """Have ``residual`` (LoRA factors of scaling 1, by the adapter's names) act in the model, in place of another;
    ``None``: none. ``AdapterError`` where a module is no LoRA layer around a linear one."""
    if residual is residual_of(model):
        return
    held: _Held | None = vars(model).pop(_KEY, None)
    for handle in () if held is None else held.handles:
        handle.remove()
    if residual is None:
        return
    handles = [
        _base_layer(model, module).register_forward_hook(_adding(residual[a], residual[b]))
        for module, (a, b) in lora_pairs(residual).items()
    ]
    vars(model)[_KEY] = _Held(residual, tuple(handles))


@contextmanager
def with_residual(model: nn.Module, residual: AdapterState | None) -> Iterator[None]:
    """Inside, ``residual`` acts in the model; afterwards what did before."""
    before = residual_of(model)
    put_residual(model, residual)
    try:
        yield
    finally:
        put_residual(model, before)


def _base_layer(model: nn.Module, name: str) -> nn.Module:
    layer: Any = model.get_submodule(name)
    base = getattr(layer, "base_layer", None)
    if base is None or not hasattr(base, "in_features"):
        raise AdapterError(f"{name}: a residual can lie beneath a LoRA layer around a linear one alone")
    return base


def _adding(a: Tensor, b: Tensor) -> Any:
    # One copy a device, made when the first input comes: the model may be spread over several.
    there: dict[Any, tuple[Tensor, Tensor]] = {}

    def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = args[0]
        if x.device not in there:
            there[x.device] = (a.to(x.device), b.to(x.device))
        left, right = there[x.device]
        return output + F.linear(F.linear(x.to(left.dtype), left), right).to(output.dtype)

    return hook
