"""The client's half of SCAFFOLD (Karimireddy et al. 2020, Algorithm 1): its control variate, kept between rounds."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from unfed.aggregation.tree import zip_map
from unfed.base.types import AdapterState
from unfed.federated.store import ClientStore

CONTROL = "control"
"""Kind of what a client keeps for itself: ``c_k``."""


@dataclass(frozen=True)
class Variate:
    """``c_k`` of one client as a round begins, beside the server's ``server`` (c), for the tensors that train."""

    client_id: str
    round: int
    own: AdapterState
    server: AdapterState

    @classmethod
    def begin(cls, store: ClientStore, client_id: str, round_: int, server: AdapterState) -> Variate:
        """What the client has kept, and zeros for what it has not trained yet."""
        zeros = AdapterState({n: torch.zeros_like(t) for n, t in server.items()})
        kept = store.get(client_id, CONTROL, round_) or AdapterState({})
        return cls(client_id, round_, AdapterState({n: kept.get(n, zeros[n]) for n in server}), server)

    @property
    def correction(self) -> AdapterState:
        """``c - c_k``, which every gradient gets added."""
        return zip_map(torch.sub, self.server, self.own)

    def end(self, store: ClientStore, gradient: AdapterState) -> AdapterState:
        """Keep the new ``c_k``, the mean ``gradient`` of the round's steps, and return its change.

        Tensors that did not train keep theirs. What is not finite is not kept: the update is dropped for it.
        """
        new = AdapterState({n: gradient.get(n, t) for n, t in self.own.items()})
        if all(bool(torch.isfinite(t).all()) for t in new.values()):
            store.put(self.client_id, CONTROL, self.round, new)
        return zip_map(torch.sub, new, self.own)
