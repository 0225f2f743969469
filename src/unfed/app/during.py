"""Evaluation between rounds, of the server's adapter: a few scores, and each client's own utility."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from unfed.app.evaluate import evaluation_splits, suite_of
from unfed.app.progress import Track, say
from unfed.app.rundir import RunDir
from unfed.base.types import ServerState
from unfed.config.schema import EvalConfig, RunConfig
from unfed.evaluation.rows import read_rows
from unfed.evaluation.runner import evaluate
from unfed.evaluation.scoring import Pass, score
from unfed.evaluation.suites import SUITES
from unfed.federated.checkpoint import RoundRecord
from unfed.federated.client import ClientData
from unfed.federated.rounds import RoundListener
from unfed.federated.schedule import FitTask, Schedule
from unfed.metrics.probability import avg_loss, prob
from unfed.models.adapter import restore
from unfed.models.generate import inference
from unfed.models.load import LoadedModel
from unfed.models.residual import put_residual
from unfed.report.labels import label, number


@dataclass
class RoundEvaluation(RoundListener):
    """Evaluates before the first round, and after every round or every phase.

    ``clients`` are scored on the rows that they train on and that are to be kept (``train``): the mean probability of
    the answers. ``found`` gathers ``{"round", "phase", "scores", "clients", "client_mean", "client_worst",
    "client_gap"}``; ``gap`` is best minus worst. ``when``: ``round``, ``phase``, or ``no``. Nothing that training
    draws at random is touched.
    """

    config: RunConfig
    loaded: LoadedModel
    schedule: Schedule
    clients: Mapping[str, ClientData]
    when: str
    track: Track | None = None
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
        trained = {c: sorted(d.splits.get("train", ()), key=lambda e: e.example_id) for c, d in self.clients.items()}
        self._own = {c: rows[: given.round_limit] for c, rows in trained.items() if rows}
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
        restore(model, state.adapter)
        put_residual(model, state.base_residual)
        result = evaluate(model, tokenizer, self.config.model.template_args, self._suite, self._rows)
        wanted = self._given.metrics
        scores = {n: v for n, v in result.summary().items() if n in wanted}
        own = self._utilities()
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

    def _utilities(self) -> dict[str, float]:
        """Mean probability of each client's own answers."""
        budget = self._suite.budget
        given = Pass(self.loaded.model, self.loaded.tokenizer, self.config.model.template_args, budget)
        flat = [e for rows in self._own.values() for e in rows]
        if not flat:
            return {}
        with inference(self.loaded.model):
            values = prob(avg_loss(score(given, flat, [False] * len(flat))))
        found, start = {}, 0
        for client, rows in self._own.items():
            found[client] = float(values[start : start + len(rows)].mean())
            start += len(rows)
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
