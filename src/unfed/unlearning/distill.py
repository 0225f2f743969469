"""Subtraction, then the old model teaches what it knew away from the forget topic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from unfed.base.params import number, whole
from unfed.base.types import Example, ServerState
from unfed.data.topic import close_rows
from unfed.federated.schedule import Phase, Schedule, Work
from unfed.objectives.distill import Distill
from unfed.unlearning.base import Ingredients, Plan, Promise, Situation
from unfed.unlearning.local_then_recover import recovery
from unfed.unlearning.subtract import Subtract


@dataclass(frozen=True)
class DistillRecipe(Subtract):
    """Unlearning with knowledge distillation (Wu, Zhu and Mitra 2022, arXiv 2201.09441).

    The start is that of :class:`unfed.unlearning.subtract.Subtract`. In ``distill_rounds`` rounds the remaining clients
    then learn the distribution of the old global adapter (:class:`unfed.objectives.distill.Distill` at
    ``temperature``), and ``global_rounds`` of plain training follow.

    Departures: the paper distils on the server from unlabelled data of the same domain. Here there are no such data:
    the clients distil on retain rows of their own. The teacher has learnt the forget rows, so rows that
    :func:`unfed.data.topic.close_rows` finds near to them (``similarity``) are left out. The paper subtracts without
    renormalisation, which is ``renormalize=false``.
    """

    distill_rounds: int = whole(1, at_least=1)
    temperature: float = number(2.0, above=0)
    similarity: float = number(0.3, above=0)

    title: ClassVar[str] = "distill"
    promise: ClassVar[Promise] = Promise(
        "approximate",
        "the target's own updates are gone, but the teacher had learnt its rows and may pass some of it on",
    )

    @property
    def rounds_before(self) -> int:
        """See :class:`Recipe`."""
        return self.distill_rounds

    def promise_for(self, situation: Situation) -> Promise:
        """Never exact: the teacher is computed from the target's rows."""
        del situation
        return self.promise

    def proxy_rows(self, forget: Sequence[Example], retain: Sequence[Example]) -> frozenset[str]:
        """See :meth:`Recipe.proxy_rows`."""
        near = close_rows(retain, forget, self.similarity)
        return frozenset(e["id"] for e in retain) - near

    def plan(self, given: Ingredients) -> Plan:
        """See :meth:`Recipe.plan`."""
        lesson = given.as_retain(Distill(self.temperature))
        work = {c: Work("proxy", lesson, given.local_epochs) for c in given.retainers if c in given.proxied}
        teach = Phase("distill", self.distill_rounds, work)
        return Plan(Schedule((teach, *recovery(given))), ServerState(0, self.without(given)))
