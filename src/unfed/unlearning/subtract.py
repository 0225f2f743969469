"""Taking the targets' summed share out of the global adapter, then recovery by the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from unfed.aggregation.tree import moved
from unfed.base.params import flag
from unfed.base.types import AdapterState, ServerState
from unfed.federated.schedule import Schedule
from unfed.unlearning.base import Demands, Ingredients, Plan, Promise, Recipe, Situation
from unfed.unlearning.local_then_recover import recovery

GOES_ON = ("local_then_recover", "interleaved", "subtract", "distill", "pga", "fedosd")
"""Recipes whose result is the adapter that they were given and steps from there, so that its shares are still in it."""


@dataclass(frozen=True)
class Subtract(Recipe):
    """Subtraction of a client's contribution from the running sums that the fine-tuning kept; then recovery.

    With weights p of the clients in a round, theta_0 the adapter before the first round, theta_T the one that forgets,
    and D the clients' updates: ``renormalize`` starts from theta_0 + sum_t sum_{k != u} p_k / (1 - p_u) D_{k,t}, the
    steps that the others' mean would have made; else from theta_T - sum_t p_u D_{u,t}, the subtraction of Wu, Zhu and
    Mitra (arXiv 2201.09441), which leaves the others' weights as they were. ``global_rounds`` of plain training by the
    others follow.

    Exact up to rounding in float32 where ``renormalize`` is set and the target took part in the last round alone:
    no update of another client was computed from an adapter that the target had changed. Otherwise that influence
    stays.

    Limits: of several targets only the shares are kept, each by itself, so ``renormalize`` takes one.
    """

    renormalize: bool = flag(True)

    title: ClassVar[str] = "subtract"
    demands: ClassVar[Demands] = Demands(
        frozenset({"sums"}), source=True, whole_clients=True, linear=True, chained=True
    )
    promise: ClassVar[Promise] = Promise(
        "approximate",
        "the target's own updates are gone; what the others learnt from an adapter that it had changed is not",
    )

    def problems(self, situation: Situation) -> list[str]:
        """A sum that was not kept, or that is no longer about the adapter that forgets."""
        source, key = situation.source, f"recipe={self.name}"
        if source is None:
            return []
        if other := [r for r in situation.since if r not in GOES_ON]:
            what = f"recipe={other[-1]} has since made one by other steps, or of another rank or sign"
            way = "use recipe=retrain or recipe=local_then_recover"
            return [f"{key}: what {source.directory} kept are shares in its own adapter, and {what}; {way}"]
        if not self.renormalize:
            return []
        found = []
        if len(there := took_part(situation)) > 1:
            found.append(
                f"{key}: recipe.renormalize=true takes one client, and {', '.join(there)} are to go: what the others "
                "would have made without all of them is not kept; set recipe.renormalize=false (their shares are taken "
                "out one by one), or use recipe=retrain"
            )
        if not source.direct:
            found.append(
                f"{key}: recipe.renormalize=true starts again from {source.directory}, and would bring back what was "
                "forgotten since; set recipe.renormalize=false, or name all that is to be forgotten in one run from "
                "the fine-tuned adapter"
            )
        return found

    def promise_for(self, situation: Situation) -> Promise:
        """Exact where no other client has built on what the target sent."""
        source = situation.source
        if source is None or not source.direct or situation.known_at_start:
            return self.promise
        first = source.first_round(situation.targets)
        if first is None:
            return Promise("exact", "the target's updates never counted, so the adapter has nothing of them")
        if self.renormalize and first == len(source.participants) - 1:
            text = "the target took part in the last round alone, and its share is out, up to rounding in float32"
            return Promise("exact", text)
        return self.promise

    def plan(self, given: Ingredients) -> Plan:
        """See :meth:`Recipe.plan`."""
        return Plan(Schedule(recovery(given)), ServerState(0, self.without(given)))

    def without(self, given: Ingredients) -> AdapterState:
        """The adapter without the targets' shares, in its own dtypes. ``ArtifactError`` where sums cannot be read."""
        there, kept = took_part(given.situation), given.history
        if not there:
            return given.start
        if self.renormalize:
            return moved(kept.start(), kept.sums(there[0]).others, 1.0, given.start)
        found = given.start
        for client in there:
            found = moved(found, kept.sums(client).own, -1.0, found)
        return found


def took_part(situation: Situation) -> list[str]:
    """The targets whose updates counted in a round of the fine-tuning."""
    assert situation.source is not None
    return [c for c in situation.targets if situation.source.first_round([c]) is not None]
