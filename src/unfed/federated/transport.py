"""The seam between rounds and engines."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

from unfed.base.errors import UnfedError
from unfed.base.types import Broadcast, ClientFailure, ClientUpdate
from unfed.federated.schedule import FitTask

log = logging.getLogger(__name__)

Fit = Callable[[FitTask, Broadcast, str], ClientUpdate]
"""Runs one client's task from what the server sent."""


class Transport(Protocol):
    """Brings a task and a broadcast to clients and their updates back."""

    def fit(
        self, task: FitTask, broadcast: Broadcast, client_ids: Sequence[str]
    ) -> Iterator[ClientUpdate | ClientFailure]:
        """Yield one answer for each client, in the order of ``client_ids``."""
        ...


class InProcess:
    """Runs the clients in this process, one after the other, on the one base model."""

    def __init__(self, fit: Fit) -> None:
        self._fit = fit

    def fit(
        self, task: FitTask, broadcast: Broadcast, client_ids: Sequence[str]
    ) -> Iterator[ClientUpdate | ClientFailure]:
        """A client's exception becomes a :class:`ClientFailure`; memory, user and system errors end the run."""
        for client_id in client_ids:
            try:
                yield self._fit(task, broadcast, client_id)
            except (UnfedError, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as e:
                log.warning("client %s failed in round %d", client_id, task.round + 1, exc_info=True)
                yield ClientFailure(client_id, f"{type(e).__name__}: {e}")
