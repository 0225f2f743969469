"""Evaluation between rounds, of the server's adapter: a few scores, and each client's own utility."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from unfed.app.evaluate import evaluation_splits, suite_of
from unfed.app.own_rows import own_probabilities, own_rows
from unfed.app.progress import Track, say
from unfed.app.rundir import RunDir
from unfed.base.types import ServerState
from unfed.config.schema import EvalConfig, RunConfig
from unfed.evaluation.rows import read_rows
from unfed.evaluation.runner import evaluate
from unfed.evaluation.suites import SUITES
from unfed.federated.checkpoint import RoundRecord
from unfed.federated.client import ClientData
from unfed.federated.own import OwnFactors
from unfed.federated.rounds import RoundListener
from unfed.federated.schedule import FitTask, Schedule
from unfed.models.adapter import restore
from unfed.models.load import LoadedModel
from unfed.models.residual import put_residual
from unfed.report.labels import label, number


@dataclass
class RoundEvaluation(RoundListener):
    """Evaluates before the first round, and after every round or every phase: what would be served by then.

    ``clients`` are scored on the rows that they train on and that are to be kept (``train``), with what they have of
    their own (``own``): the mean probability of the answers. ``found`` gathers ``{"round", "phase", "scores",
    "clients", "client_mean", "client_worst", "client_gap"}``; ``gap`` is best minus worst. ``when``: ``round``,
    ``phase``, or ``no``. Nothing that training
    draws at random is touched.
    """

    config: RunConfig
    loaded: LoadedModel
    schedule: Schedule
    clients: Mapping[str, ClientData]
    when: str
    track: Track | None = None
    own: OwnFactors = field(default_factory=OwnFactors)
    found: list[dict[str, Any]] = field(default_factory=list)

    def begin(self, state: ServerState, directory: RunDir) -> None:
        """Read what is needed, take over what a resumed run found before, and look at what training starts from.

        ``found`` goes to ``run.json`` as ``evaluations`` after every look.
        """
        if self.when == "no":
            return
        assert self.config.eval is not None
        given, data_dir, self._directory = self.config.eval, self.config.paths.data_dir, directory
        self._given: EvalConfig = replace(given, metrics=given.round_metrics, limit=given.round_limit)
        self._rows = read_rows(SUITES[given.suite], given.round_metrics, evaluation_splits(self._given), data_dir)
        self._suite = suite_of(replace(self._given, finetuned_logs_path=None), data_dir)
        self._own = own_rows(self.clients, given.round_limit)
        before = directory.known("evaluations") or ()
        self.found = [dict(e) for e in before if e.get("round", 0) <= state.round]
        if all(e.get("round") != state.round for e in self.found) and (state.round == 0 or self._due(state)):
            last = next(iter(self.schedule.tasks(state.round - 1))).phase.name if state.round else "start"
            self._evaluate(state, last)

    def _due(self, state: ServerState) -> bool:
        ends = {sum(p.rounds for p in self.schedule.phases[: n + 1]) for n in range(len(self.schedule.phases))}
        return self.when == "round" or (self.when == "phase" and state.round in ends)

    def round_ended(self, record: RoundRecord, state: ServerState) -> None:
        """After a round that is to be looked at."""
        if self._due(state):
            self._evaluate(state, record.phase)

    def _evaluate(self, state: ServerState, phase: str) -> None:
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        restore(model, self.own.served(state).adapter)
        put_residual(model, state.base_residual)
        result = evaluate(model, tokenizer, self.config.model.template_args, self._suite, self._rows)
        wanted = self._given.metrics
        scores = {n: v for n, v in result.summary().items() if n in wanted}
        own = self._utilities(state)
        values = list(own.values())
        entry: dict[str, Any] = {"round": state.round, "phase": phase, "scores": scores, "clients": own}
        if values:
            mean, worst = sum(values) / len(values), min(values)
            entry |= {"client_mean": mean, "client_worst": worst, "client_gap": max(values) - worst}
        self.found.append(entry)
        self._directory.note(evaluations=self.found)
        shown = "; ".join(f"{label(n)} {number(n, v)}" for n, v in scores.items())
        told = f"; clients {entry['client_mean']:.3f}, worst {entry['client_worst']:.3f}" if values else ""
        say(f"  after round {state.round}: {shown}{told}")
        if self.track is not None:
            curves = {f"eval/{n}": v for n, v in scores.items()}
            curves |= {f"eval/{n}": entry[n] for n in ("client_mean", "client_worst", "client_gap") if n in entry}
            self.track(curves, state.round)

    def _utilities(self, state: ServerState) -> dict[str, float]:
        """Of each client on its own rows, with the adapter that it has."""
        budget = self._suite.budget
        if not self.own.there(state.round):
            return own_probabilities(self.config, self.loaded, budget, self._own)
        found: dict[str, float] = {}
        for client, rows in self._own.items():
            restore(self.loaded.model, self.own.of(client, state))
            found |= own_probabilities(self.config, self.loaded, budget, {client: rows})
        return found


@dataclass(frozen=True)
class Listeners(RoundListener):
    """Several listeners as one."""

    all: tuple[RoundListener, ...]

    def round_started(self, task: FitTask, clients: list[str]) -> None:
        """Before the first client."""
        for listener in self.all:
            listener.round_started(task, clients)

    def round_ended(self, record: RoundRecord, state: ServerState) -> None:
        """After the checkpoint."""
        for listener in self.all:
            listener.round_ended(record, state)
