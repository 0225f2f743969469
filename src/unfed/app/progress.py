"""Progress of long work: rounds, clients, loss and time left on a terminal; a line a round elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from unfed.base.types import ServerState
from unfed.federated.checkpoint import RoundRecord
from unfed.federated.rounds import RoundListener
from unfed.federated.schedule import FitTask, Schedule
from unfed.report.labels import headline, label, number
from unfed.training.loop import StepEvent

console = Console(stderr=True, soft_wrap=True)
Track = Callable[[Mapping[str, float], int], None]
FAILURES_SHOWN = 10
"""Clients of a round whose failures are printed; all of them are recorded."""


def say(message: str) -> None:
    """One line for the user."""
    console.print(message, highlight=False, markup=False)


def show_schedule(schedule: Schedule, settings: Mapping[str, Mapping[str, object]]) -> None:
    """Print the schedule as a table, and the hyperparameters of its objectives and of the server's rule."""
    table = Table(title="Schedule", title_justify="left", show_edge=False)
    for column in ("phase", "rounds", "clients", "objective", "epochs a round"):
        table.add_column(column)
    for row in schedule.table():
        table.add_row(*row)
    console.print(table)
    for name, values in settings.items():
        if values:
            say(f"{name}: " + ", ".join(f"{k}={v}" for k, v in values.items()))


def show_scores(summary: Mapping[str, float], where: str) -> None:
    """Print the headline scores of an evaluation, and where all of them are."""
    say("; ".join(f"{label(name)} {number(name, summary[name])}" for name in headline(set(summary))))
    say(f"{len(summary)} scores: {where}")


class Reporter(RoundListener):
    """Shows rounds and steps, and hands the curves to a tracker."""

    def __init__(self, schedule: Schedule, done: int, track: Track | None = None) -> None:
        self._total, self._track = schedule.num_rounds, track
        self._phases = {phase.name: phase for phase in schedule.phases}
        self._bar: Progress | None = None
        self._began = time.monotonic()
        self._first, self._steps = done, 0
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[loss]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=console,
            )
            self._rounds = self._bar.add_task("rounds", total=self._total, completed=done, loss="")
            self._client = self._bar.add_task("", total=None, loss="", visible=False)
            self._bar.start()

    def close(self) -> None:
        """Stop drawing."""
        if self._bar is not None:
            self._bar.stop()

    def stepped(self, task: FitTask, client_id: str, event: StepEvent) -> None:
        """A client's optimizer steps."""
        self._steps += 1
        if self._track is not None:
            self._track({f"{task.phase.name}/{client_id}/loss": event.loss, "lr": event.lr}, self._steps)
        if self._bar is not None:
            label = f"{task.phase.name} round {task.phase_round + 1}/{task.phase.rounds} {client_id}"
            self._bar.update(
                self._client,
                description=label,
                completed=event.step,
                total=event.total,
                loss=f"loss {event.loss:.3f}",
                visible=True,
            )

    def _by_work(self, record: RoundRecord) -> str:
        """The mean loss of each kind of work, where a round has several: their mean over all clients hides both."""
        found: dict[str, list[float]] = {}
        for client, metrics in record.metrics.items():
            if "loss" in metrics:
                work = self._phases[record.phase].work[client]
                found.setdefault(f"{work.objective.name} on {work.rows_name}", []).append(metrics["loss"])
        if len(found) < 2:
            return ""
        return " (" + ", ".join(f"{name} {sum(v) / len(v):.4f}" for name, v in found.items()) + ")"

    def round_ended(self, record: RoundRecord, state: ServerState) -> None:
        """One line: what the round did and what it cost."""
        loss = "" if record.loss is None else f"loss {record.loss:.4f}{self._by_work(record)}"
        missed = record.aggregation_error
        # Exact rules end at rounding, which a percentage would show as 0.
        shown = "" if missed is None else f"{missed:.1e}" if 0 < missed < 1e-5 else f"{missed:.2%}"
        error = f", aggregation error {shown}" if shown else ""
        left = (time.monotonic() - self._began) / (state.round - self._first) * (self._total - state.round)
        count = f"{len(record.clients)} client{'s' * (len(record.clients) != 1)}"
        simulated = "" if record.simulated_seconds is None else f" ({record.simulated_seconds:.3g} s simulated)"
        eta = f", about {left:.0f} s left" if self._total > state.round else ""
        say(
            f"round {state.round}/{self._total} {record.phase}: {count}, {loss}{error}, "
            f"{record.bytes_up / 1e6:.2f} MB up, {record.seconds:.1f} s{simulated}{eta}"
        )
        for client, reason in list(record.failures.items())[:FAILURES_SHOWN]:
            say(f"  {client} is left out of this round: {reason}")
        if (more := len(record.failures) - FAILURES_SHOWN) > 0:
            say(f"  and {more} more clients: their reasons are in run.json")
        if self._bar is not None:
            self._bar.update(self._rounds, completed=state.round, loss=loss)
            self._bar.update(self._client, visible=False)
        if self._track is not None:
            values = {
                "round/loss": record.loss,
                "round/aggregation_error": record.aggregation_error,
                "round/bytes_up": float(record.bytes_up),
                "round/seconds": record.seconds,
            }
            self._track({k: v for k, v in values.items() if v is not None}, state.round)
