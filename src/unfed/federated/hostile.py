"""Clients that do harm, for studies of robust rules: what they send instead of what they have learnt.

Everything is said of the step, what a client's factors add to those that it began with. ``sign_flip``: ``-factor``
times the step. ``scale``: ``factor`` times. ``random``: Gaussian noise, ``factor`` times as long as the step. A client
of ``label_flip`` is honest with what it sends; its rows are wrong (:func:`unfed.data.labels.exchanged_answers`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from unfed.aggregation.tree import delta, moved, norm
from unfed.base.seeding import torch_generator
from unfed.base.types import AdapterState, Broadcast, ClientFailure, ClientUpdate
from unfed.federated.schedule import FitTask
from unfed.federated.transport import Transport

ATTACKS = ("sign_flip", "scale", "random")
"""Attacks on what is sent."""


@dataclass(frozen=True)
class Hostile:
    """A transport on which ``clients`` send what ``attack`` makes of their updates."""

    inner: Transport
    attack: str
    clients: frozenset[str]
    factor: float
    seed: int = 0

    def fit(
        self, task: FitTask, broadcast: Broadcast, client_ids: Sequence[str]
    ) -> Iterator[ClientUpdate | ClientFailure]:
        """See :meth:`unfed.federated.transport.Transport.fit`."""
        for answer in self.inner.fit(task, broadcast, client_ids):
            if isinstance(answer, ClientUpdate) and answer.client_id in self.clients:
                yield replace(answer, adapter=self._instead(answer, broadcast, task.round))
            else:
                yield answer

    def _instead(self, update: ClientUpdate, broadcast: Broadcast, round_: int) -> AdapterState:
        whole = broadcast.start(update.client_id)
        start = AdapterState({n: whole[n] for n in update.adapter})
        step, factor = delta(update.adapter, start), self.factor
        if self.attack == "sign_flip":
            factor = -factor
        elif self.attack == "random":
            generator = torch_generator(self.seed, "hostile", round_, update.client_id)
            noise = AdapterState({n: torch.randn(t.shape, generator=generator, dtype=t.dtype) for n, t in step.items()})
            factor, step = factor * norm(step) / norm(noise), noise
        return moved(start, step, factor, update.adapter)
