"""The targets unlearn on their own; then everybody recovers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from unfed.federated.schedule import Phase, Schedule, Work
from unfed.unlearning.base import Demands, Ingredients, Plan, Promise, Recipe


@dataclass(frozen=True)
class LocalThenRecover(Recipe):
    """The targets unlearn locally from the global adapter; then all clients recover on their retain rows.

    The order of Oblivionis (arXiv 2508.08875). Departures: the result of local unlearning is adopted as it is
    (several targets: their mean) instead of passing through the server's optimizer, so that an adaptive rule
    cannot damp it; and with ``global_rounds=0`` the recovery is left out.
    """

    title: ClassVar[str] = "local_then_recover"
    demands: ClassVar[Demands] = Demands(method=True)
    promise: ClassVar[Promise] = Promise(
        "approximate", "the method lowers what the model says of the forget rows; nothing proves that they are gone"
    )

    @property
    def rounds_before(self) -> int:
        """See :class:`Recipe`."""
        return 1

    def plan(self, given: Ingredients) -> Plan:
        """See :meth:`Recipe.plan`."""
        work = {c: Work("forget", given.forget, given.unlearn_epochs) for c in given.targets}
        unlearn = Phase("unlearn", 1, work, rule="adopt", always=given.targets)
        return Plan(Schedule((unlearn, *recovery(given))))


def recovery(given: Ingredients) -> tuple[Phase, ...]:
    """``global_rounds`` of plain training by all who own retain rows; no phase where that is nothing."""
    if given.global_rounds == 0 or not given.retainers:
        return ()
    return (Phase("recover", given.global_rounds, given.retain_work()),)
