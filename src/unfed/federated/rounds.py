"""The rounds: send, fit, screen, average, step, checkpoint, report. The same for every engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from unfed.aggregation.base import Aggregator
from unfed.base.stopping import whole
from unfed.base.types import SERVER, Broadcast, ClientFailure, ClientUpdate, Combined, ServerState
from unfed.federated.checkpoint import Checkpoints, RoundRecord
from unfed.federated.history_writer import HistoryWriter
from unfed.federated.schedule import FitTask, Participation, Phase, Schedule
from unfed.federated.screening import Screening, ScreeningSettings
from unfed.federated.transport import Transport
from unfed.federated.turnout import Turnout


@dataclass(frozen=True)
class RoundsConfig:
    """How rounds are run, apart from what is done in them."""

    seed: int = 0
    participation: Participation = field(default_factory=Participation)
    screening: ScreeningSettings = field(default_factory=ScreeningSettings)


class RoundListener:
    """Told of each round as it starts and ends; the default does nothing."""

    def round_started(self, task: FitTask, clients: list[str]) -> None:
        """Before the first client."""

    def round_ended(self, record: RoundRecord, state: ServerState) -> None:
        """After the checkpoint."""


class _NoUpdatesError(Exception):
    """Raised inside ``combine`` when there is nothing to average."""


def _first_or_raise(updates: Iterator[ClientUpdate]) -> Iterator[ClientUpdate]:
    empty = True
    for update in updates:
        empty = False
        yield update
        del update  # or it would stay in memory beside the next one
    if empty:
        raise _NoUpdatesError


def run_rounds(
    schedule: Schedule,
    transport: Transport,
    aggregator: Aggregator,
    state: ServerState,
    config: RoundsConfig,
    keep: RunKeeper,
) -> ServerState:
    """Run the schedule from ``state.round`` on and return the last state.

    After every round the state is checkpointed, so a run that was killed goes on from there to the same bytes:
    every seed is derived from (seed, round, client), and clients are averaged in the order of their names. A signal
    that ends the run waits until the round that has just ended is kept.
    Raises ``UnfedError`` when a round keeps fewer than ``min_clients`` usable updates; what was saved stays.
    """
    for task in schedule.tasks(state.round):
        began = time.perf_counter()
        phase = task.phase
        members, server = [c for c in phase.work if c != SERVER], [c for c in phase.work if c == SERVER]
        clients = config.participation.select(members, config.seed, task.round, phase.always)
        turnout = config.participation.turnout(task, clients, config.seed)
        keep.listener.round_started(task, clients)
        broadcast = _broadcast(phase, aggregator, state, clients)
        screening = Screening(broadcast, config.screening, dict(turnout.missing))
        updates = screening.usable(_answers(transport, task, turnout, screening, server))
        if keep.history is not None:
            updates = keep.history.of_round(task, state, updates)
        done = _finish(task, aggregator, state, updates, len(clients))
        combined = done[0] if done else None
        reasons = [f"{c}: {r}" for c, r in screening.failures.items()]
        survivors = len(combined.client_ids) if combined else 0
        config.participation.check(survivors, len(clients), reasons, len(members))
        assert done is not None
        assert combined is not None
        before, state = state.digest(), done[1]
        record = RoundRecord(
            round=task.round,
            phase=task.phase.name,
            clients=combined.client_ids,
            failures=screening.failures,
            num_examples=combined.num_examples,
            adapter_before=before,
            adapter_after=state.digest(),
            bytes_down=broadcast.nbytes(clients) - screening.spared_down,
            bytes_up=screening.bytes_up,
            seconds=time.perf_counter() - began,
            aggregation_error=combined.aggregation_error,
            error_is_estimate=combined.error_is_estimate,
            metrics=screening.metrics,
            notes=combined.notes,
            simulated_seconds=turnout.length(config.participation.conditions, screening.metrics),
        )
        with whole():
            keep.records.append(record)
            if keep.history is not None:
                keep.history.end_round(state, combined.client_ids)
            keep.save(state)
        keep.listener.round_ended(record, state)
    return state


def _broadcast(phase: Phase, aggregator: Aggregator, state: ServerState, clients: Sequence[str]) -> Broadcast:
    """What goes out: a recipe's own rule works on whole factors, and a phase that does not pass through the server's
    rule is no part of its control variates."""
    if not isinstance(phase.rule, str):
        return Broadcast(state.adapter)
    broadcast = aggregator.broadcast(state, clients)
    return replace(broadcast, control=None) if phase.rule == "adopt" else broadcast


def _answers(
    transport: Transport, task: FitTask, turnout: Turnout, screening: Screening, server: Sequence[str]
) -> Iterator[ClientUpdate | ClientFailure]:
    """Of those whose updates are taken; where one cannot be used, of the next that came back. The others are late."""
    yield from transport.fit(task, screening.sent, turnout.trained)
    for client in turnout.spare:
        if len(screening.metrics) < len(turnout.trained):
            yield from transport.fit(task, screening.sent, [client])
        else:
            screening.failures[client] = f"not needed: {len(turnout.trained)} others returned first"
    if server:
        yield from transport.fit(task, screening.sent, server)


def _finish(
    task: FitTask, aggregator: Aggregator, state: ServerState, updates: Iterator[ClientUpdate], num_clients: int
) -> tuple[Combined, ServerState] | None:
    """The round's mean and the state after it; nothing when there was no usable update."""
    rule = task.phase.rule
    try:
        if not isinstance(rule, str):
            combined, adapter = rule.advance(task, state, _first_or_raise(updates))
            return combined, replace(state, round=state.round + 1, adapter=adapter)
        by = aggregator.adopting() if rule == "adopt" else aggregator
        combined = by.combine(_first_or_raise(updates), num_clients, state)
        combined = replace(combined, population=len([c for c in task.phase.work if c != SERVER]))
    except _NoUpdatesError:
        return None
    return combined, aggregator.advance(state, combined, adopt=rule == "adopt")


@dataclass
class RunKeeper:
    """Where records and checkpoints go, and what is kept beside them for later requests to forget.

    Without ``checkpoints`` and ``history`` nothing is written (tests, benchmarks).
    """

    records: list[RoundRecord] = field(default_factory=list)
    listener: RoundListener = field(default_factory=RoundListener)
    checkpoints: Checkpoints | None = None
    on_save: Callable[[ServerState], None] | None = None
    history: HistoryWriter | None = None

    def save(self, state: ServerState) -> None:
        """Checkpoint the round that has just ended."""
        if self.checkpoints is not None:
            self.checkpoints.save(state, self.records)
        if self.on_save is not None:
            self.on_save(state)
