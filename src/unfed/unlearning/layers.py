"""Which layers of a LoRA adapter a recipe works on: all, the first, those that changed most, or those of a pattern."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unfed.aggregation.lora import lora_pairs
from unfed.base.errors import AdapterError
from unfed.base.params import governed
from unfed.base.types import AdapterState

Layers = str | float
"""``all``; ``first``; a number above 0 and up to 1, the share of layers that changed most; else a regular expression
that is searched for in the modules' names (``layers\\.[01]\\.``)."""

_BLOCK = re.compile(r"^.*?\.(\d+)(?=\.)")
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LayersRule:
    """What :data:`Layers` says."""

    def complaint(self, value: object) -> str | None:
        """Why ``value`` is refused, or ``None``."""
        wanted = "must be all, first, a number above 0 and up to 1, or a regular expression for names of modules"
        if isinstance(value, str) and value:
            try:
                re.compile(value)
            except re.error as e:
                return f"{wanted}, not {value!r} ({e})"
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            return f"{wanted}, not {value!r}"
        return None


def layers_choice(default: Layers) -> Any:
    """A dataclass field for a choice of layers."""
    return governed(default, LayersRule())


def change(adapter: AdapterState, scaling: Mapping[str, float]) -> dict[str, float]:
    """``||s B A||`` (Frobenius) of each layer: what learning has changed there, over all modules of the layer.

    A layer is a block of the network (``model.layers.3``), a module outside of the blocks is one of its own. In float64
    from the Gram matrices of the factors: ``||B A||^2 = tr((B' B)(A A'))``; no matrix of a module's size is made.
    """
    sums: dict[str, float] = {}
    for module, (a_name, b_name) in lora_pairs(adapter).items():
        a, b = adapter[a_name].flatten(1).double(), adapter[b_name].flatten(1).double()
        square = float(((b.T @ b) * (a @ a.T)).sum()) * scaling[module] ** 2
        sums[_layer(module)] = sums.get(_layer(module), 0.0) + max(0.0, square)
    return {layer: math.sqrt(total) for layer, total in sums.items()}


def chosen_modules(which: Layers, adapter: AdapterState, scaling: Mapping[str, float]) -> tuple[str, ...]:
    """The modules of ``adapter`` in the chosen layers, by the module part of PEFT's tensor names.

    A share of the layers is rounded up. ``AdapterError`` for a pattern that no module's name has.
    """
    modules = sorted(lora_pairs(adapter), key=_order)
    if not modules:
        raise AdapterError("recipe.layers: the adapter has no LoRA factors")
    if which == "all":
        return tuple(modules)
    if which == "first":
        return tuple(m for m in modules if _layer(m) == _layer(modules[0]))
    if isinstance(which, str):
        found = tuple(m for m in modules if re.search(which, m.removeprefix(_PREFIX)))
        if not found:
            names = [m.removeprefix(_PREFIX) for m in (modules[0], modules[-1])]
            raise AdapterError(
                f"recipe.layers={which}: no module of the adapter has that in its name (they are {names[0]} to "
                f"{names[1]}); all, first and a share such as 0.5 work with every adapter"
            )
        return found
    norms = change(adapter, scaling)
    most = sorted(norms, key=lambda layer: (-norms[layer], _order(layer)))[: math.ceil(which * len(norms))]
    return tuple(m for m in modules if _layer(m) in most)


def _layer(module: str) -> str:
    found = _BLOCK.match(module)
    return found.group(0) if found else module


def _order(name: str) -> tuple[float, str]:
    """Blocks by number, what stands outside of them last."""
    found = _BLOCK.match(name + ".")
    return (float(found.group(1)) if found else math.inf, name)
