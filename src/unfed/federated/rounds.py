"""The rounds: send, fit, screen, average, step, checkpoint, report. The same for every engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from unfed.aggregation.base import Aggregator
from unfed.base.types import Broadcast, ClientFailure, ClientUpdate, Combined, ServerState
from unfed.federated.checkpoint import Checkpoints, RoundRecord
from unfed.federated.history_writer import HistoryWriter
from unfed.federated.schedule import FitTask, Participation, Schedule
from unfed.federated.transport import Transport
from unfed.federated.turnout import Turnout


@dataclass(frozen=True)
class RoundsConfig:
    """How rounds are run, apart from what is done in them."""

    seed: int = 0
    participation: Participation = field(default_factory=Participation)


class RoundListener:
    """Told of each round as it starts and ends; the default does nothing."""

    def round_started(self, task: FitTask, clients: list[str]) -> None:
        """Before the first client."""

    def round_ended(self, record: RoundRecord, state: ServerState) -> None:
        """After the checkpoint."""


@dataclass
class _Screening:
    """Lets usable updates through, with what did not travel filled in; remembers what was dropped, what was sent."""

    sent: Broadcast
    failures: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    bytes_up: int = 0

    def usable(self, answers: Iterable[ClientUpdate | ClientFailure]) -> Iterator[ClientUpdate]:
        for answer in answers:
            if isinstance(answer, ClientFailure):
                self.failures[answer.client_id] = answer.reason
                continue
            self.bytes_up += answer.sent
            problems = answer.adapter.problems_against(self.sent.returned(answer.client_id))
            if answer.control is not None and self.sent.control is not None:
                problems += [f"control variate: {p}" for p in answer.control.problems_against(self.sent.control)]
            if answer.num_examples < 1:
                problems.append(f"num_examples is {answer.num_examples}")
            if problems:
                more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
                self.failures[answer.client_id] = f"update dropped: {problems[0]}{more}"
                continue
            traffic = {"bytes_down": self.sent.nbytes([answer.client_id]), "bytes_up": answer.sent}
            self.metrics[answer.client_id] = {**answer.metrics, **traffic}
            whole = answer.adapter.filled(self.sent.start(answer.client_id))
            yield answer if whole is answer.adapter else replace(answer, adapter=whole)


class _NoUpdatesError(Exception):
    """Raised inside ``combine`` when there is nothing to average."""


def _first_or_raise(updates: Iterator[ClientUpdate]) -> Iterator[ClientUpdate]:
    for first in updates:
        yield first
        yield from updates
        return
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
    every seed is derived from (seed, round, client), and clients are averaged in the order of their names.
    Raises ``UnfedError`` when a round keeps fewer than ``min_clients`` usable updates; what was saved stays.
    """
    for task in schedule.tasks(state.round):
        began = time.perf_counter()
        phase = task.phase
        clients = config.participation.select(list(phase.work), config.seed, task.round, phase.always)
        turnout = config.participation.turnout(task, clients, config.seed)
        keep.listener.round_started(task, clients)
        # A recipe's own rule works on whole factors.
        own_rule = not isinstance(phase.rule, str)
        broadcast = Broadcast(state.adapter) if own_rule else aggregator.broadcast(state, clients)
        if phase.rule == "adopt":  # a phase that does not pass through the server's rule is no part of its variates
            broadcast = replace(broadcast, control=None)
        screening = _Screening(broadcast, dict(turnout.missing))
        updates = screening.usable(_answers(transport, task, turnout, screening))
        if keep.history is not None:
            updates = keep.history.of_round(task, state, updates)
        done = _finish(task, aggregator, state, updates, len(clients))
        combined = done[0] if done else None
        reasons = [f"{c}: {r}" for c, r in screening.failures.items()]
        survivors = len(combined.client_ids) if combined else 0
        config.participation.check(survivors, len(clients), reasons, len(phase.work))
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
            bytes_down=broadcast.nbytes(clients),
            bytes_up=screening.bytes_up,
            seconds=time.perf_counter() - began,
            aggregation_error=combined.aggregation_error,
            error_is_estimate=combined.error_is_estimate,
            metrics=screening.metrics,
            simulated_seconds=turnout.length(config.participation.conditions, screening.metrics),
        )
        keep.records.append(record)
        if keep.history is not None:
            keep.history.end_round(state, combined.client_ids)
        keep.save(state)
        keep.listener.round_ended(record, state)
    return state


def _answers(
    transport: Transport, task: FitTask, turnout: Turnout, screening: _Screening
) -> Iterator[ClientUpdate | ClientFailure]:
    """Of those whose updates are taken; where one cannot be used, of the next that came back. The others are late."""
    yield from transport.fit(task, screening.sent, turnout.trained)
    for client in turnout.spare:
        if len(screening.metrics) < len(turnout.trained):
            yield from transport.fit(task, screening.sent, [client])
        else:
            screening.failures[client] = f"not needed: {len(turnout.trained)} others returned first"


def _finish(
    task: FitTask, aggregator: Aggregator, state: ServerState, updates: Iterator[ClientUpdate], num_clients: int
) -> tuple[Combined, ServerState] | None:
    """The round's mean and the state after it; nothing when there was no usable update."""
    rule = task.phase.rule
    try:
        if not isinstance(rule, str):
            combined, adapter = rule.advance(task, state, _first_or_raise(updates))
            return combined, replace(state, round=state.round + 1, adapter=adapter)
        combined = aggregator.combine(_first_or_raise(updates), num_clients, state)
        combined = replace(combined, population=len(task.phase.work))
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
