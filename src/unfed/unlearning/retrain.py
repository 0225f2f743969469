"""Training again without what is to be forgotten: from the beginning, or from the last round before it took part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from unfed.federated.schedule import Schedule
from unfed.unlearning.base import Demands, Ingredients, Plan, Promise, Recipe, Situation
from unfed.unlearning.finetune import finetune


@dataclass(frozen=True)
class Retrain(Recipe):
    """The fine-tuning again, with its settings, seeds and partition, without the rows that are to be forgotten.

    What it gives is, bit for bit, what fine-tuning on the other rows gives (on the same machine and software).
    """

    title: ClassVar[str] = "retrain"
    demands: ClassVar[Demands] = Demands(source=True, replay=True)
    promise: ClassVar[Promise] = Promise("exact", "the model was trained without the forget rows, from the base on")

    def plan(self, given: Ingredients) -> Plan:
        """See :meth:`Recipe.plan`."""
        return Plan(_again(given))


@dataclass(frozen=True)
class Rollback(Recipe):
    """The fine-tuning from the last state that the targets had no part in, on without the forget rows.

    The rounds before are kept as they were (``history=rounds``), so the cost is the rest of the rounds. Where a target
    took part from the first round on that is all of them, and the result is that of ``retrain``.
    """

    title: ClassVar[str] = "rollback"
    demands: ClassVar[Demands] = Demands(frozenset({"rounds"}), source=True, replay=True)
    promise: ClassVar[Promise] = Promise(
        "exact", "every round that the model is made of was computed without the forget rows"
    )

    def problems(self, situation: Situation) -> list[str]:
        """A state that is gone."""
        source = situation.source
        if source is None or "rounds" not in source.kept.keep:  # said by the demands already
            return []
        clean = _clean_round(situation)
        if clean in source.history.rounds():
            return []
        return [f"recipe=rollback: the state after round {clean} of {source.directory} is gone; use recipe=retrain"]

    def plan(self, given: Ingredients) -> Plan:
        """See :meth:`Recipe.plan`."""
        return Plan(_again(given), given.history.state(_clean_round(given.situation)))


def _clean_round(situation: Situation) -> int:
    """How many of the fine-tuning's first rounds the targets had no part in."""
    assert situation.source is not None
    first = situation.source.first_round(situation.targets)
    return len(situation.source.participants) if first is None else first


def _again(given: Ingredients) -> Schedule:
    return finetune(given.retainers, given.retain, given.local_epochs, given.global_rounds)
