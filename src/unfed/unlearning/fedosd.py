"""FedOSD: steps that lower the targets' unlearning loss and leave the others' losses alone; then a recovery that does
not run back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from unfed.aggregation.tree import RunningMean, delta, floats, moved, norm, zip_map
from unfed.base.params import number, whole
from unfed.base.types import AdapterState, ClientUpdate, Combined, ServerState
from unfed.federated.schedule import FitTask, Phase, Schedule, Work
from unfed.objectives.uce import UCE
from unfed.unlearning.base import Demands, Ingredients, Plan, Promise, Recipe, Situation
from unfed.unlearning.sgd import plain_sgd

ALL_ROWS = 1_000_000
"""Micro-batches of an optimizer step: more than any client has, so that one step sees all its rows."""
CUT = 1e-6
"""Directions of the others' gradients below this share of the longest count as rounding."""


@dataclass(frozen=True)
class FedOSD(Recipe):
    """Pan et al. 2025 (AAAI), "Federated Unlearning with Gradient Descent and Conflict Mitigation", arXiv 2412.20200.

    In each of ``unlearn_rounds`` rounds every client sends the gradient over all its rows: the targets ``g_u`` of the
    unlearning cross-entropy (their mean where there are several), the others ``g_k`` of the cross-entropy. The server
    steps by ``-lr d``, where ``d`` is ``g_u`` without its part in the span of the ``g_k``, as long as ``g_u``: to first
    order no other client's loss changes. Then ``global_rounds`` of plain training by all who keep rows; each update
    loses its part along ``w - w_0``, from the adapter ``w_0`` that unlearning began with, and keeps its length.
    Gradients and updates count equally, whatever the numbers of rows (as in the authors' code).

    A gradient is one plain SGD step at rate 1 over all rows, as the authors take it (full batches, one epoch). The
    server holds those of the others of a round, ``K`` adapters in float32, and solves in float64.

    Departures. The authors cut singular values of ``G G'`` below 1e-6, a number for their network's gradients; here the
    ``g_k`` are scaled to length 1 and singular values of ``G`` below 1e-6 of the largest are cut, which spans the same.
    Where nothing of ``g_u`` is left, the round takes no step. The authors take 100 rounds at rate 4e-4, falling by
    0.1 % a round, and recover by single gradients at rate 1e-6; an adapter's gradients are small, so here are fewer and
    longer steps at one rate, and a recovery by the run's own local training. A target may keep rows: it forgets in the
    rounds of unlearning, where its kept rows do not count among the others' gradients, and recovers with the others.
    """

    title: ClassVar[str] = "fedosd"
    demands: ClassVar[Demands] = Demands(factors=True)
    promise: ClassVar[Promise] = Promise(
        "approximate",
        "unlearning steps do not change the other clients' losses to first order; nothing proves that the forget rows "
        "are gone",
    )

    unlearn_rounds: int = whole(20, at_least=1)
    lr: float = number(1.0, above=0)

    @property
    def rounds_before(self) -> int:
        """See :class:`Recipe`."""
        return self.unlearn_rounds

    def problems(self, situation: Situation) -> list[str]:
        """Nobody whose gradients could be spared."""
        if _others(situation):
            return []
        what = f"no client but {', '.join(situation.targets)} owns retain rows, so there is no gradient to step around"
        return [f"recipe=fedosd: {what}; use recipe=local_then_recover"]

    def plan(self, given: Ingredients) -> Plan:
        """See :meth:`Recipe.plan`."""
        args = _one_gradient()
        work = {c: Work("forget", UCE(), 1.0, args=args) for c in given.targets}
        work |= {c: Work("train", given.retain, 1.0, shown="retain", args=args) for c in _others(given.situation)}
        rule = Descend(given.targets, self.lr)
        phases = [Phase("unlearn", self.unlearn_rounds, work, rule, always=given.targets)]
        if given.global_rounds and given.retainers:
            phases.append(Phase("recover", given.global_rounds, given.retain_work(), KeepAway(given.start)))
        return Plan(Schedule(tuple(phases)))


@dataclass(frozen=True)
class Descend:
    """The server's rule while unlearning. An update is an adapter minus its gradient."""

    targets: tuple[str, ...]
    lr: float

    @property
    def name(self) -> str:
        """See :class:`unfed.federated.schedule.PhaseRule`."""
        return "descend"

    def advance(
        self, task: FitTask, state: ServerState, updates: Iterator[ClientUpdate]
    ) -> tuple[Combined, AdapterState]:
        """See :meth:`unfed.federated.schedule.PhaseRule.advance`. Without a target's gradient there is no step."""
        del task
        mean, others, examples = RunningMean(), [], {}
        for update in updates:
            gradient = delta(state.adapter, update.adapter)
            if update.client_id in self.targets:
                mean.add(gradient, 1.0)
            else:
                others.append(gradient)
            examples[update.client_id] = update.num_examples
        adapter = state.adapter
        if not examples.keys().isdisjoint(self.targets):
            adapter = moved(adapter, around(mean.result(), others), -self.lr, adapter)
        return Combined(adapter, sum(examples.values()), tuple(examples)), adapter


@dataclass(frozen=True)
class KeepAway:
    """The server's rule of the recovery: the mean of updates that neither return to ``origin`` nor flee from it."""

    origin: AdapterState = field(compare=False)

    @property
    def name(self) -> str:
        """See :class:`unfed.federated.schedule.PhaseRule`."""
        return "keep_away"

    def advance(
        self, task: FitTask, state: ServerState, updates: Iterator[ClientUpdate]
    ) -> tuple[Combined, AdapterState]:
        """See :meth:`unfed.federated.schedule.PhaseRule.advance`."""
        del task
        away, mean, examples = delta(state.adapter, self.origin), RunningMean(), {}
        for update in updates:
            mean.add(around(delta(update.adapter, state.adapter), [away]), 1.0)
            examples[update.client_id] = update.num_examples
        adapter = moved(state.adapter, mean.result(), 1.0, state.adapter)
        return Combined(adapter, sum(examples.values()), tuple(examples)), adapter


def around(vector: AdapterState, others: Sequence[AdapterState]) -> AdapterState:
    """``vector`` without its part in the span of ``others``, rescaled to its length; zero where nothing is left.

    ``v - G' (G G')^+ G v`` with the ``others`` as rows of ``G``, scaled to length 1; the ``K x K`` matrix ``G G'`` and
    all sums are in float64. The result has ``vector``'s dtypes.
    """
    lengths = [norm(o) for o in others]
    rows = [(o, length) for o, length in zip(others, lengths, strict=True) if length > 0]
    if not rows:
        return vector
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    along = torch.zeros(len(rows), dtype=torch.float64)
    for name in floats(vector):
        part = torch.stack([o[name].double().flatten() / length for o, length in rows])
        gram += part @ part.T
        along += part @ vector[name].double().flatten()
    values, vectors = torch.linalg.eigh(gram)
    kept = values > CUT**2 * values.max()
    basis = vectors[:, kept]
    shares = (basis @ ((basis.T @ along) / values[kept])).tolist()
    rest = vector
    for share, (other, length) in zip(shares, rows, strict=True):
        rest = zip_map(lambda r, o, by=share / length: r.double() - by * o.double(), rest, other)
    wanted, left = norm(vector), norm(rest)
    scale = wanted / left if left > CUT * wanted else 0.0
    return zip_map(lambda r, v: (r.double() * scale).to(v.dtype), rest, vector)


def _others(situation: Situation) -> tuple[str, ...]:
    """Clients with retain rows that are no targets."""
    return tuple(c for c in situation.retainers if c not in situation.targets)


def _one_gradient() -> dict[str, Any]:
    """Settings under which a client's update is minus its gradient over all rows."""
    return {"gradient_accumulation_steps": ALL_ROWS, **plain_sgd(lr=1.0, clip=0.0)}
