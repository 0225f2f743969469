"""What a run with differential privacy releases, of whom and how often, and what that costs whoever is worst off."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from unfed.aggregation.privacy import CentralPrivacy, LocalPrivacy, Privacy
from unfed.base.errors import ArtifactError, ConfigError
from unfed.federated.accounting import Release, Spent, spent
from unfed.federated.checkpoint import RoundRecord
from unfed.federated.client import ClientData
from unfed.federated.schedule import Participation, Schedule, Work
from unfed.training.args import LoopArgs
from unfed.training.batches import TrainRows, steps_per_epoch

Ledger = Mapping[str, tuple[Release, ...]]
"""What was released of whom: every client's own, or ``clients`` for all of them at once."""
ALL = "clients"
MANY = 16
"""Ledgers of different content that the PLD accountant is asked about; of more, the RDP accountant alone."""


@dataclass(frozen=True)
class Accountant:
    """Counts what a run releases. ``earlier``: what the runs before it on the same adapter released (``None``: one of
    them trained on rows without privacy; empty: nothing was trained before)."""

    settings: Privacy
    schedule: Schedule
    participation: Participation
    clients: Mapping[str, ClientData]
    args: LoopArgs
    seed: int
    earlier: Mapping[str, Any] | None

    @property
    def units(self) -> int:
        """How many units are protected: clients, or rows to be trained on."""
        if self.settings.unit == "client":
            return len({c for phase in self.schedule.phases for c in phase.work})
        rows = {
            (client, e.example_id)
            for phase in self.schedule.phases
            for client, work in phase.work.items()
            for e in self.clients[client].splits.get(work.rows, ())
        }
        return len(rows)

    @property
    def delta(self) -> float:
        """As set, or one over the number of units. ``ConfigError`` where that says nothing."""
        if self.settings.delta is not None:
            return self.settings.delta
        if self.units < 2:
            raise ConfigError(["privacy.delta: 1 over the number of protected units is 1 here; give a smaller one"])
        return 1.0 / self.units

    def selected(self) -> list[list[str]]:
        """The clients that each round of the whole schedule invites."""
        return [
            self.participation.select(list(t.phase.work), self.seed, t.round, t.phase.always)
            for t in self.schedule.tasks()
        ]

    def planned(self) -> Ledger:
        """What the whole schedule releases."""
        return self._ledger(self.selected(), {})

    def done(self, records: Sequence[RoundRecord]) -> Ledger:
        """What the finished rounds released. A client that failed is counted: its update may have been seen."""
        took_part = [[*r.clients, *r.failures] for r in records]
        steps = {(r.round, client): int(m["steps"]) for r in records for client, m in r.metrics.items() if "steps" in m}
        return self._ledger(took_part, steps)

    def _ledger(self, rounds: Sequence[Sequence[str]], steps: Mapping[tuple[int, str], int]) -> Ledger:
        if isinstance(self.settings, CentralPrivacy):
            return {ALL: self._central(len(rounds))}
        found: dict[str, list[Release]] = {}
        for task, names in zip(self.schedule.tasks(), rounds, strict=False):
            for client in names:
                work = task.phase.work[client]
                if isinstance(self.settings, LocalPrivacy):
                    release = Release(self.settings.noise_multiplier, 1, replace=True)
                else:
                    size, rows = self.args.step_size(), self.clients[client].splits[work.rows]
                    count = steps.get((task.round, client)) or self._steps(client, work)
                    z = self.settings.noise_multiplier
                    release = Release(z, count, "poisson", min(size, len(rows)), len(rows))
                found.setdefault(client, []).append(release)
        return {client: joined(releases) for client, releases in found.items()}

    def _steps(self, client: str, work: Work) -> int:
        per_epoch = steps_per_epoch(TrainRows(self.clients[client].splits), work.rows, self.args.step_size())
        count = max(1, math.ceil(round(per_epoch * work.epochs, 6))) if work.steps is None else work.steps
        return min(count, self.args.max_steps) if self.args.max_steps > 0 else count

    def _central(self, rounds: int) -> tuple[Release, ...]:
        releases = []
        for task, names in zip(self.schedule.tasks(), self.selected()[:rounds], strict=False):
            among, z = len(task.phase.work), self.settings.noise_multiplier
            # Only a uniform draw is known to hide who took part.
            uniform = self.participation.sampling.kind == "uniform"
            drawn = uniform and len(names) < among and not task.phase.always
            releases.append(Release(z, 1, "fixed", len(names), among) if drawn else Release(z, 1))
        return joined(releases)

    def cost(self, ledger: Ledger, *, pld: bool = True) -> Spent:
        """Of the unit that is worst off. ``pld``: see :func:`unfed.federated.accounting.spent`."""
        return worst(ledger, self.delta, pld=pld)


def joined(releases: Sequence[Release]) -> tuple[Release, ...]:
    """Equal mechanisms counted together."""
    found: dict[Release, int] = {}
    for release in releases:
        one = replace(release, count=1)
        found[one] = found.get(one, 0) + release.count
    return tuple(replace(one, count=count) for one, count in found.items())


def worst(ledger: Ledger, delta: float, *, pld: bool = True) -> Spent:
    """Epsilon of whoever has the largest: clients own different rows, so what one gives away costs no other."""
    different = list(dict.fromkeys(ledger.values()))
    costs = [spent(releases, delta, pld=pld and len(different) <= MANY) for releases in different]
    if not costs:
        return spent((), delta)
    by_pld = [c.pld for c in costs if c.pld is not None]
    by_rdp = max(c.rdp for c in costs if c.rdp is not None)
    return Spent(delta, costs[0].neighbours, by_rdp, max(by_pld) if len(by_pld) == len(costs) else None)


def composed(mine: Ledger, earlier: Mapping[str, Any]) -> Ledger:
    """This run's releases after those of the runs before it."""
    before = earlier.get("releases")
    if not isinstance(before, Mapping):
        raise ArtifactError("the privacy record of the run that made the adapter lacks its releases")
    read = {str(who): [Release.read(r) for r in list_] for who, list_ in before.items()}
    return {
        who: joined([*read.get(who, ()), *mine.get(who, ())]) for who in (*read, *(w for w in mine if w not in read))
    }
