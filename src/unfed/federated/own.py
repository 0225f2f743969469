"""What clients keep of the adapter for themselves (FedSA's B), and the one adapter that they make together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from unfed.aggregation.adapters.fedsa import common
from unfed.base.types import AdapterState, ServerState
from unfed.federated.client import OWN
from unfed.federated.store import ClientStore


@dataclass(frozen=True)
class OwnFactors:
    """The clients' own tensors, ``names``, which never travel while rounds run (none: every adapter is the server's).

    ``weights``: of the clients whose adapters count in the common one, in their order.
    """

    names: frozenset[str] = frozenset()
    weights: Mapping[str, float] = field(default_factory=dict)
    store: ClientStore = field(default_factory=ClientStore)

    def there(self, round_: int) -> dict[str, AdapterState]:
        """What each client has kept before round ``round_`` (from 0) begins; those that have nothing are left out."""
        if not self.names:
            return {}
        found = ((c, self.store.get(c, OWN, round_)) for c in self.weights)
        return {c: own for c, own in found if own is not None}

    def of(self, client_id: str, state: ServerState) -> AdapterState:
        """A client's adapter after ``state.round`` rounds: what is shared, and its own."""
        own = self.store.get(client_id, OWN, state.round) if self.names else None
        return state.adapter if own is None else own.filled(state.adapter)

    def served(self, state: ServerState) -> ServerState:
        """``state`` with the one adapter for everyone."""
        there = self.there(state.round)
        if not there:
            return state
        return replace(state, adapter=common(state.adapter, ((s, self.weights[c]) for c, s in there.items())))

    def nbytes(self, round_: int) -> int:
        """Bytes that the clients send once, for :meth:`served`."""
        return sum(s.nbytes for s in self.there(round_).values())
