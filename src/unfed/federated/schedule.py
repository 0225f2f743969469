"""What happens in which order, as data: a schedule of phases, each with the work of every client."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from unfed.base.errors import UnfedError
from unfed.base.seeding import numpy_generator
from unfed.base.types import AdapterState, ClientUpdate, Combined, ServerState, Split
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
    each takes its part of the steps; else every round begins an epoch anew. ``args`` replace fields of
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
            by_work: dict[tuple[str, str, float], list[str]] = {}
            for client, work in phase.work.items():
                by_work.setdefault((work.objective.name, work.rows_name, work.epochs), []).append(client)
            for (objective, split, epochs), clients in by_work.items():
                who = ", ".join(clients) if len(clients) <= 3 else f"{clients[0]} .. {clients[-1]}"
                rows.append((phase.name, str(phase.rounds), who, f"{objective} on {split}", f"{epochs:g}"))
        return rows


@dataclass(frozen=True)
class Participation:
    """Who takes part in a round: a fraction of the phase's clients, ``min_clients`` at least.

    A phase's ``always`` clients come first, the draw fills up with others.
    """

    fraction_fit: float = 1.0
    min_clients: int = 1

    def select(self, clients: Sequence[str], seed: int, round_: int, always: Sequence[str] = ()) -> list[str]:
        """The round's clients in the order of ``clients``; drawn without replacement from (seed, round)."""
        wanted = max(min(self.min_clients, len(clients)), round(self.fraction_fit * len(clients)), 1)
        if wanted >= len(clients):
            return list(clients)
        others = [c for c in clients if c not in always]
        size = min(max(0, wanted - len(always)), len(others))
        drawn = numpy_generator(seed, "select", round_).choice(len(others), size=size, replace=False) if size else ()
        chosen = {*always, *(others[int(i)] for i in drawn)}
        return [c for c in clients if c in chosen]

    def check(self, survivors: int, invited: int, reasons: Sequence[str]) -> None:
        """Raise ``UnfedError`` when too few clients are left in a round."""
        needed = min(self.min_clients, invited)
        if survivors < needed or survivors == 0:
            raise UnfedError(
                f"only {survivors} of {invited} clients returned a usable update and min_clients={needed}: "
                + "; ".join(reasons[:5])
            )
