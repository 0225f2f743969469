"""What happens in which order, as data: a schedule of phases, each with the work of every client."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from unfed.base.errors import UnfedError
from unfed.base.seeding import numpy_generator
from unfed.base.types import AdapterState, ClientUpdate, Combined, ServerState, Split
from unfed.federated.sampling import Sampling
from unfed.federated.turnout import Conditions, Turnout, turnout
from unfed.objectives.base import Objective
from unfed.training.loop import Constraint


class PhaseRule(Protocol):
    """What a recipe's server does with a round's updates, where that is not the aggregator's rule.

    It has no state of its own, so that a resumed round gives the same adapter: what it must remember is in the
    adapters, or on disk in the history.
    """

    @property
    def name(self) -> str:
        """For tables and records."""
        ...

    def advance(
        self, task: FitTask, state: ServerState, updates: Iterator[ClientUpdate]
    ) -> tuple[Combined, AdapterState]:
        """The round's mean update as a record of it, and the next global adapter.

        ``updates`` come one by one in the order of the clients and hold one adapter each; there is one at least.
        """
        ...


ServerRule = Literal["aggregate", "adopt"] | PhaseRule


@dataclass(frozen=True)
class Work:
    """What one client does in each round of a phase.

    ``rows`` is the split whose rows make up an epoch; ``objective`` says what else it needs (a retain row beside
    each forget row, say). ``epochs`` may be a fraction. ``spread``: the phase's rounds share one run over the rows,
    each takes its part of the steps; else every round begins an epoch anew. ``steps``: so many optimizer steps a round
    instead of ``epochs``. ``args`` replace fields of
    :class:`unfed.training.args.LoopArgs` for this work (another optimizer, say). ``constraint`` holds the weights after
    every step.
    """

    rows: Split
    objective: Objective
    epochs: float
    spread: bool = False
    shown: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    constraint: Constraint | None = None
    steps: int | None = None

    @property
    def amount(self) -> str:
        """How much a client does in a round, for tables."""
        return f"{self.epochs:g}" if self.steps is None else f"{self.steps} steps"

    @property
    def rows_name(self) -> str:
        """What a reader calls the rows: in an unlearning run a client's ``train`` rows are those that it retains."""
        return self.shown or self.rows


@dataclass(frozen=True)
class Phase:
    """A number of rounds in which the same clients do the same work.

    ``always``: clients that take part in every round whatever ``fraction_fit`` is: those that unlearn. ``rule``:
    ``aggregate`` passes the clients' mean through the server's optimizer; ``adopt`` takes the mean as it
    is, for a phase in which the server must not damp what a client did (local unlearning); else a recipe's own.
    """

    name: str
    rounds: int
    work: Mapping[str, Work]
    rule: ServerRule = "aggregate"
    always: tuple[str, ...] = ()


@dataclass(frozen=True)
class FitTask:
    """One round, as the clients see it. ``round`` counts over the whole schedule, ``phase_round`` within it."""

    phase: Phase
    round: int
    phase_round: int


@dataclass(frozen=True)
class Schedule:
    """All phases of a run, in order; none where the server alone acts."""

    phases: tuple[Phase, ...]

    def __post_init__(self) -> None:
        if any(p.rounds < 1 or not p.work for p in self.phases):
            raise ValueError("every phase of a schedule has a round and a client at least")

    @property
    def num_rounds(self) -> int:
        """Rounds over all phases."""
        return sum(p.rounds for p in self.phases)

    def tasks(self, start: int = 0) -> Iterator[FitTask]:
        """The tasks from round ``start`` on."""
        number = 0
        for phase in self.phases:
            for phase_round in range(phase.rounds):
                if number >= start:
                    yield FitTask(phase, number, phase_round)
                number += 1

    def table(self) -> list[tuple[str, str, str, str, str]]:
        """Rows (phase, rounds, clients, objective and rows, epochs a round) for printing and for the record."""
        rows = []
        for phase in self.phases:
            by_work: dict[tuple[str, str, str], list[str]] = {}
            for client, work in phase.work.items():
                by_work.setdefault((work.objective.name, work.rows_name, work.amount), []).append(client)
            for (objective, split, amount), clients in by_work.items():
                who = ", ".join(clients) if len(clients) <= 3 else f"{clients[0]} .. {clients[-1]}"
                rows.append((phase.name, str(phase.rounds), who, f"{objective} on {split}", amount))
        return rows


@dataclass(frozen=True)
class Participation:
    """Who takes part in a round: a fraction of the phase's clients, or ``number`` of them; ``min_clients`` at least.

    A phase's ``always`` clients come first, the draw (``sampling``) fills up with others. ``oversample`` times as many
    are invited, and the first that return are taken; ``conditions`` say who does, and when. ``steps``: the local steps
    that a client has in a task (``None``: 1 for each).
    """

    fraction_fit: float = 1.0
    min_clients: int = 1
    number: int | None = None
    oversample: float = 1.0
    sampling: Sampling = field(default_factory=Sampling)
    conditions: Conditions = field(default_factory=Conditions)
    steps: Callable[[FitTask, str], float] | None = None

    def wanted(self, population: int) -> int:
        """How many updates a round of a phase with so many clients is to have."""
        share = round(self.fraction_fit * population) if self.number is None else self.number
        return min(population, max(self.min_clients, share, 1))

    def select(self, clients: Sequence[str], seed: int, round_: int, always: Sequence[str] = ()) -> list[str]:
        """The clients that are invited, in the order of ``clients``; drawn without replacement from (seed, round)."""
        asked = math.ceil(round(self.wanted(len(clients)) * self.oversample, 6))
        if asked >= len(clients) and self.sampling.kind != "trace":
            return list(clients)
        others = self.sampling.there([c for c in clients if c not in always], round_)
        size = min(max(0, asked - len(always)), len(others))
        drawn = self.sampling.draw(others, size, numpy_generator(seed, "select", round_))
        chosen = {*always, *drawn}
        return [c for c in clients if c in chosen]

    def turnout(self, task: FitTask, invited: Sequence[str], seed: int) -> Turnout:
        """Who of the invited comes back in time."""
        steps = {c: 1.0 if self.steps is None else self.steps(task, c) for c in invited}
        enough = self.wanted(len(task.phase.work))
        return turnout(invited, steps, enough, task.phase.always, self.conditions, (seed, task.round))

    def check(self, survivors: int, invited: int, reasons: Sequence[str], population: int | None = None) -> None:
        """Raise ``UnfedError`` when too few are left in a round. ``population``: clients of the phase, where not all of
        them could be asked."""
        needed = min(self.min_clients, invited if population is None else population)
        if survivors < needed or survivors == 0:
            told = "; ".join(reasons[:5]) or "none was there to be asked (clients.availability)"
            raise UnfedError(
                f"only {survivors} of {invited} clients returned a usable update and min_clients={needed}: {told}"
            )
