"""Plain federated training: what every fine-tuning runs, and what exact recipes run again."""

from __future__ import annotations

from collections.abc import Sequence

from unfed.federated.schedule import Phase, Schedule, Work
from unfed.objectives.base import Objective


def finetune(clients: Sequence[str], objective: Objective, epochs: float, rounds: int) -> Schedule:
    """Every client trains on its own rows in every round."""
    return Schedule((Phase("finetune", rounds, {c: Work("train", objective, epochs) for c in clients}),))
