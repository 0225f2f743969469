"""What recipes share whose work is a second adapter on top of the learned one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from unfed.base.params import number, whole
from unfed.base.types import AdapterState
from unfed.models.second import SecondAdapter
from unfed.unlearning.base import Recipe
from unfed.unlearning.layers import Layers, chosen_modules, layers_choice


@dataclass(frozen=True)
class OnTop(Recipe):
    """The second adapter's shape: rank ``r``, ``lora_alpha`` and the ``layers`` of the learned adapter that get it."""

    r: int = whole(8, at_least=1)
    lora_alpha: float = number(16, above=0)
    layers: Layers = layers_choice("all")

    def second_adapter(self, learned: AdapterState, scaling: Mapping[str, float]) -> SecondAdapter:
        """See :meth:`Recipe.second_adapter`."""
        return SecondAdapter(self.r, self.lora_alpha, chosen_modules(self.layers, learned, scaling))
