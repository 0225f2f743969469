"""What a schedule costs, in the units that training again is measured in, too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from unfed.base.types import Split
from unfed.federated.schedule import Schedule, Work


@dataclass(frozen=True)
class Cost:
    """Rounds, optimizer steps over all clients, bytes sent both ways."""

    rounds: int
    client_steps: int
    nbytes: int

    def words(self) -> str:
        """As a reader wants it."""
        rounds = f"{self.rounds} round{'s' * (self.rounds != 1)}"
        return f"{rounds}, {self.client_steps} client steps, {self.nbytes / 1e6:.2f} MB sent"

    def against(self, other: Cost) -> str:
        """The share of another cost, in percent of its client steps and bytes."""
        steps = self.client_steps / max(1, other.client_steps)
        return f"{steps:.0%} of the fine-tuning's client steps, {self.nbytes / max(1, other.nbytes):.0%} of its bytes"


def cost_of(
    schedule: Schedule, start: int, rows: Mapping[str, Mapping[Split, int]], step_size: int, adapter_bytes: int
) -> Cost:
    """From round ``start`` on, with every client in every round of its phases.

    ``rows``: each client's number of rows by split; ``step_size``: examples of an optimizer step.
    """
    steps = sent = 0
    for task in schedule.tasks(start):
        for client, work in task.phase.work.items():
            steps += steps_of(work, rows[client].get(work.rows, 0), step_size, spread=task.phase.rounds)
        sent += 2 * adapter_bytes * len(task.phase.work)
    return Cost(schedule.num_rounds - start, steps, sent)


def steps_of(work: Work, rows: int, step_size: int, *, spread: int = 1) -> int:
    """Optimizer steps of one client in one round; where the work is spread over ``spread`` rounds, the mean."""
    if work.steps is not None:
        return work.steps if rows else 0
    per_epoch = math.ceil(rows / step_size)
    parts = spread if work.spread else 1
    return max(1, math.ceil(round(per_epoch * work.epochs * parts, 6) / parts)) if rows else 0
