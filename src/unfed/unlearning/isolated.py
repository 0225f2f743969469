"""Shards of clients that never see each other, served side by side; to forget is to drop a shard or train it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from unfed.base.errors import UnfedError
from unfed.base.params import whole
from unfed.federated.schedule import Phase, Schedule, Work
from unfed.federated.shards import Shard, ShardStore
from unfed.unlearning.base import Demands, Ingredients, Isolation, Plan, Promise, Recipe, Situation


@dataclass(frozen=True)
class Isolated(Recipe):
    """Training in isolated shards, and exact forgetting in them: SISA (Bourtoule et al. 2021, arXiv 1912.03817) with
    clients for the data, as KNOT's clusters (Su and Li 2023); served as FLoRA's stack (arXiv 2409.05976).

    In fine-tuning ``shards`` (0: one for each client) are dealt: client i goes to shard i mod ``shards``. Each shard's
    adapter is trained from the same start by its clients alone for ``global_rounds``; what is served is the exact sum
    of their updates, weighted as the server's rule weights clients, as one adapter of the summed rank. In unlearning a
    shard whose rows all go is dropped; one that keeps some is trained again without the others, with the settings and
    seeds of the fine-tuning; every other shard stays as it was, to the byte.

    Departures: SISA cuts shards into slices with a checkpoint each, and lets the shards' models vote; there are no
    slices here, and updates are added, which is what an adapter can serve at the cost of one. KNOT chooses clusters by
    training time and similarity; here they are dealt in order.
    """

    shards: int = whole(0, at_least=0)

    title: ClassVar[str] = "isolated"
    demands: ClassVar[Demands] = Demands(source=True, replay=True, factors=True)
    promise: ClassVar[Promise] = Promise(
        "exact", "the shards that had the forget rows are dropped or trained again without them; no other saw them"
    )

    def problems(self, situation: Situation) -> list[str]:
        """A fine-tuning without shards."""
        if situation.source is None:
            return []
        found = []
        if not ShardStore(situation.source.adapter).shards():
            found.append(
                f"recipe=isolated: {situation.source.adapter} has no shards: it was not made with recipe=isolated; "
                "use recipe=retrain (exact), or fine-tune with recipe=isolated"
            )
        if self.shards:
            found.append(f"recipe.shards={self.shards}: unlearning has the shards of the fine-tuning; leave it out")
        return found

    def deal(self, rows: Mapping[str, Sequence[str]]) -> list[Shard]:
        """The shards of a fine-tuning; ``rows``: the ids of each client's rows, none for a client without any.

        Raises ``UnfedError`` where there are more shards than clients.
        """
        clients = list(rows)
        if self.shards > len(clients):
            raise UnfedError(
                f"recipe.shards={self.shards}: there are {len(clients)} clients; use {len(clients)} or less"
            )
        count = self.shards or len(clients)
        dealt = [Shard(i, {c: tuple(rows[c]) for c in clients[i::count] if rows[c]}) for i in range(count)]
        return [s for s in dealt if s.rows]

    def first(self, given: Ingredients) -> Plan:
        """The fine-tuning."""
        return _training(given, self.deal(given.rows), ())

    def plan(self, given: Ingredients) -> Plan:
        """See :meth:`Recipe.plan`."""
        assert given.situation.source is not None
        again, kept = [], []
        for shard in ShardStore(given.situation.source.adapter).shards():
            left = {c: tuple(i for i in ids if i in set(given.rows.get(c, ()))) for c, ids in shard.rows.items()}
            rest = Shard(shard.index, {c: ids for c, ids in left.items() if ids})
            if rest == shard:
                kept.append(shard)
            elif rest.rows:
                again.append(rest)
        if not again and not kept:
            raise UnfedError(
                "recipe=isolated: no shard would be left; there is nothing to serve without the forget rows"
            )
        return _training(given, again, kept)


def _training(given: Ingredients, again: Sequence[Shard], kept: Sequence[Shard]) -> Plan:
    phases = tuple(
        Phase(s.name, given.global_rounds, {c: Work("train", given.retain, given.local_epochs) for c in s.rows})
        for s in again
    )
    return Plan(Schedule(phases), isolation=Isolation(tuple(again), tuple(kept)))
