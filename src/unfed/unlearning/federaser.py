"""FedEraser: the kept rounds once more without the targets, as long as they were, in directions that are found anew."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.linalg import vector_norm

from unfed.aggregation.tree import RunningMean, delta, moved, zip_map
from unfed.base.params import number, whole
from unfed.base.types import AdapterState, ClientUpdate, Combined, ServerState
from unfed.federated.schedule import FitTask, Phase, Schedule, Work
from unfed.unlearning.base import Demands, Ingredients, Plan, Promise, Recipe, Situation, Source


@dataclass(frozen=True)
class FedEraser(Recipe):
    """Liu et al. 2021, "FedEraser: Enabling Efficient Client-Level Data Removal from Federated Learning Models".

    In each kept round ``j`` the clients that took part in it, without the targets, train for ``calibration_ratio`` of
    the local epochs from the present adapter, which gives a direction ``d_k``; the server adds the weighted mean of
    ``||D_k,j|| d_k / ||d_k||``, where ``D_k,j`` is the update that client ``k`` made in that round. The
    first kept round needs no training: its updates began from an adapter that no target had touched, so they are added
    as they are (as the authors' code does). ``final_rounds`` of plain training may follow.

    Departures: norms and directions are those of each client's update as in the paper's formula, where the authors'
    code takes those of the mean; they are taken tensor by tensor, so for LoRA of the factors ``A`` and ``B``, and
    nothing holds the length of ``B A``; part of an epoch is trained where the ratio asks for it, the authors' code
    rounds up; the server's step and weights are the fine-tuning's.
    """

    title: ClassVar[str] = "federaser"
    demands: ClassVar[Demands] = Demands(
        frozenset({"updates"}), source=True, whole_clients=True, replay=True, linear=True, factors=True
    )
    promise: ClassVar[Promise] = Promise(
        "approximate",
        "the model was trained without the forget rows, in steps whose lengths were measured beside them: the other "
        "clients' kept updates of later rounds began from adapters that the targets had changed",
    )

    calibration_ratio: float = number(0.5, above=0)
    final_rounds: int = whole(0, at_least=0)

    def problems(self, situation: Situation) -> list[str]:
        """Kept rounds that leave nothing to do."""
        source = situation.source
        if source is None or "updates" not in source.kept.keep or not situation.retainers:
            return []
        kept = _others(source, situation.targets)
        if not kept:
            who, what = (
                ", ".join(situation.targets),
                f"took part in a round of which {source.directory} kept the updates",
            )
            return [f"recipe=federaser: no client but {who} {what}; use recipe=retrain"]
        if set(kept) == {0} and self.final_rounds == 0:
            what = (
                f"of {source.directory} only the first round's updates are kept, there is no further round to calibrate"
            )
            way = "set recipe.final_rounds to 1 or more, fine-tune with a smaller history.every, or use recipe=retrain"
            return [f"recipe=federaser: {what}; {way}"]
        return []

    def plan(self, given: Ingredients) -> Plan:
        """See :meth:`Recipe.plan`. Every run of kept rounds with the same clients is a phase."""
        source = given.situation.source
        assert source is not None
        kept = _others(source, given.targets)
        epochs = given.local_epochs * self.calibration_ratio
        phases = []
        for clients, numbers in itertools.groupby((n for n in kept if n > 0), kept.__getitem__):
            work = {c: Work("train", given.retain, epochs, shown="retain") for c in clients}
            rounds = tuple(numbers)
            phases.append(Phase("calibrate", len(rounds), work, Calibrate(source, rounds), always=clients))
        if self.final_rounds:
            phases.append(Phase("recover", self.final_rounds, given.retain_work()))
        start = source.history.start()
        return Plan(Schedule(tuple(phases)), ServerState(0, _first_round(source, start, kept.get(0, ()))))


@dataclass(frozen=True)
class Calibrate:
    """The server's rule: kept lengths, new directions. Kept updates are read one at a time."""

    source: Source
    rounds: tuple[int, ...]

    @property
    def name(self) -> str:
        """See :class:`unfed.federated.schedule.PhaseRule`."""
        return "calibrate"

    def advance(
        self, task: FitTask, state: ServerState, updates: Iterator[ClientUpdate]
    ) -> tuple[Combined, AdapterState]:
        """See :meth:`unfed.federated.schedule.PhaseRule.advance`."""
        kept_round, mean, examples = self.rounds[task.phase_round], RunningMean(), {}
        for update in updates:
            kept = self.source.history.update_of(kept_round, update.client_id)
            assert kept is not None  # the phase's clients are those of the kept round
            step = calibrated(delta(update.adapter, state.adapter), kept.delta)
            mean.add(step, self.source.weight(update.num_examples))
            examples[update.client_id] = update.num_examples
        adapter = _stepped(self.source, state.adapter, mean)
        return Combined(adapter, sum(examples.values()), tuple(examples)), adapter


def calibrated(direction: AdapterState, kept: AdapterState) -> AdapterState:
    """``||kept|| direction / ||direction||`` tensor by tensor; zero where ``direction`` is. Lengths are in float64: the
    squares of a small update would be 0 in float32."""

    def as_long(d: Tensor, k: Tensor) -> Tensor:
        return d * (vector_norm(k, dtype=torch.float64) / vector_norm(d, dtype=torch.float64)) if d.any() else d

    return zip_map(as_long, direction, kept)


def _others(source: Source, targets: tuple[str, ...]) -> dict[int, tuple[str, ...]]:
    """The clients beside the targets in each round of which the updates are kept; rounds without any are left out."""
    history = source.history
    found = {n: tuple(c for c in history.examples(n) if c not in targets) for n in history.update_rounds()}
    return {n: clients for n, clients in found.items() if clients}


def _first_round(source: Source, start: AdapterState, clients: tuple[str, ...]) -> AdapterState:
    if not clients:
        return start
    mean = RunningMean()
    for client, kept in source.history.updates(0):
        if client in clients:
            mean.add(kept.delta, source.weight(kept.num_examples))
    return _stepped(source, start, mean)


def _stepped(source: Source, adapter: AdapterState, mean: RunningMean) -> AdapterState:
    assert source.mean_step is not None
    return moved(adapter, mean.result(), source.mean_step, adapter)
