"""Turn the sign of the first layer's update and train on what remains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from unfed.base.types import ServerState
from unfed.federated.schedule import Phase, Schedule
from unfed.unlearning.base import Demands, Ingredients, Plan, Promise, Recipe, Situation
from unfed.unlearning.layers import Layers, chosen_modules, layers_choice
from unfed.unlearning.negation import multiplied


@dataclass(frozen=True)
class NotLora(Recipe):
    """The server negates the learned update of ``layers``; then all train on their retain rows for ``global_rounds``.

    After NoT (Khalil et al., CVPR 2025, arXiv 2503.05657), which negates the weights of the first layer: a large
    perturbation that breaks how layers have come to fit each other and from which training on the retained data comes
    back fast. Neither the target's data nor any history is needed. Experimental: its evidence is image classification.

    Departures: of an adapter one factor is negated, ``(-B) A``, for ``(-B)(-A) = B A`` changes nothing; so the learned
    update is negated and the base's weights stay as they are, whose negation would destroy a language model.
    """

    layers: Layers = layers_choice("first")
    title: ClassVar[str] = "not_lora"
    demands: ClassVar[Demands] = Demands(lora=True, factors=True)
    promise: ClassVar[Promise] = Promise(
        "approximate",
        "experimental: the first layer's learned update is negated and trained anew without the forget rows; shown for "
        "image classification only, nothing proves that the rows are gone",
    )

    def problems(self, situation: Situation) -> list[str]:
        """A negated model that nobody trains again is of no use."""
        if not situation.retainers:
            return ["recipe=not_lora: no client has rows to keep, so nobody would train; use recipe=local_then_recover"]
        return []

    def plan(self, given: Ingredients) -> Plan:
        """See :meth:`Recipe.plan`."""
        modules = chosen_modules(self.layers, given.start, given.scaling)
        start = ServerState(0, multiplied(given.start, -1.0, modules))
        return Plan(Schedule((Phase("fine-tune", given.global_rounds, given.retain_work()),)), start)
