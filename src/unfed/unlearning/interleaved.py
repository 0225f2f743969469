"""Unlearning and retain training in the same rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from unfed.federated.schedule import Phase, Schedule, Work
from unfed.unlearning.base import Demands, Ingredients, Plan, Promise, Recipe


@dataclass(frozen=True)
class Interleaved(Recipe):
    """In every round the targets unlearn beside the others' retain training, and the server averages both.

    ``unlearn_epochs`` are spread over the rounds: the steps that they would take in one piece are dealt out in order,
    so no forget row comes again before all came once.
    """

    title: ClassVar[str] = "interleaved"
    demands: ClassVar[Demands] = Demands(method=True)
    promise: ClassVar[Promise] = Promise(
        "approximate", "the method lowers what the model says of the forget rows; nothing proves that they are gone"
    )

    def plan(self, given: Ingredients) -> Plan:
        """See :meth:`Recipe.plan`."""
        rounds = max(1, given.global_rounds)
        work: dict[str, Work] = {
            c: Work("forget", given.forget, given.unlearn_epochs / rounds, spread=True) for c in given.targets
        }
        merged: Mapping[str, Work] = {**work, **given.retain_work([c for c in given.retainers if c not in work])}
        ordered = {c: merged[c] for c in sorted(merged, key=lambda c: (len(c), c))}
        return Plan(Schedule((Phase("interleaved", rounds, ordered, always=given.targets),)))
