"""PGA: the targets climb their own loss from the mean of the others, inside a ball around it; the others recover."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from unfed.aggregation.tree import RunningMean, delta, full_like, moved, norm
from unfed.base.params import number, whole
from unfed.base.types import AdapterState, ServerState
from unfed.federated.schedule import Phase, Schedule, Work
from unfed.models.adapter import live_tensors
from unfed.objectives.grad_ascent import GradAscent
from unfed.unlearning.base import Demands, Ingredients, Plan, Promise, Recipe, Situation, Source
from unfed.unlearning.local_then_recover import recovery
from unfed.unlearning.sgd import plain_sgd


@dataclass(frozen=True)
class PGA(Recipe):
    """Projected gradient ascent (Halimi et al. 2022, "Federated Unlearning: How to Efficiently Erase a Client in FL?",
    arXiv 2207.05521).

    ``w_ref`` is the mean of what the other clients sent in the last round: ``N/(N-1) w_T - 1/(N-1) w_u`` for equal
    weights. From there each target takes SGD steps up the cross-entropy of its rows, for ``epochs`` at most; after
    each step its weights are projected to the ball around ``w_ref``, and it stops where it is far from ``w_u``, the
    model that it sent last. Several targets: the mean of theirs. Then ``global_rounds`` of recovery without them.

    Departures. The squared radius of the paper's ball is a third of the mean squared distance from ``w_ref`` to ten
    random models. For an adapter they stand for the one that it began as, ``w_0``: the radius is ``radius`` times
    ``||w_T - w_0||``, by default the square root of a third. The paper stops at a squared distance of 2.2 from ``w_u``.
    For its network (FLNet as PyTorch initialises it: 412 on the mean between two draws) that is 0.073 of the distance
    to a random model, which is ``early_stop`` here, times ``||w_T - w_0||``, and counts beyond the distance that
    ``w_ref`` has from ``w_u``: with few rounds one update is a good part of the way. Where the last kept round of a
    target is not the last of the training, ``w_ref`` is ``w_T`` without its share in that round's step.
    """

    title: ClassVar[str] = "pga"
    demands: ClassVar[Demands] = Demands(
        frozenset({"updates"}), source=True, whole_clients=True, linear=True, factors=True
    )
    promise: ClassVar[Promise] = Promise(
        "approximate",
        "gradient ascent lowers what the model says of the forget rows; nothing proves that they are gone",
    )

    epochs: int = whole(5, at_least=1)
    lr: float = number(0.01, above=0)
    momentum: float = number(0.9, at_least=0, below=1)
    clip: float = number(5.0, at_least=0)
    radius: float = number(0.577, above=0)
    early_stop: float = number(0.073, above=0)

    @property
    def rounds_before(self) -> int:
        """See :class:`Recipe`."""
        return 1

    def problems(self, situation: Situation) -> list[str]:
        """Targets of which no update is kept."""
        source = situation.source
        if source is None or "updates" not in source.kept.keep:
            return []
        lost = [c for c in situation.targets if _last_round(source, c) is None]
        if not lost:
            return []
        what = f"{source.directory} kept no update of {', '.join(lost)} (history.every={source.kept.every})"
        return [f"recipe=pga: {what}; fine-tune with history.every=1, or use recipe=local_then_recover"]

    def plan(self, given: Ingredients) -> Plan:
        """See :meth:`Recipe.plan`."""
        source = given.situation.source
        assert source is not None
        center = others_alone(source, given.start, given.targets)
        travelled = norm(delta(given.start, source.history.start()))
        work = {}
        for client in given.targets:
            last = last_model(source, given.start, client)
            reach = norm(delta(center, last)) + self.early_stop * travelled
            held = Ball(self.radius * travelled, reach, center, last)
            work[client] = Work(
                "forget",
                GradAscent(),
                self.epochs,
                args=plain_sgd(self.lr, self.clip, momentum=self.momentum),
                constraint=held,
            )
        ascent = Phase("ascent", 1, work, rule="adopt", always=given.targets)
        return Plan(Schedule((ascent, *recovery(given))), ServerState(0, center))


@dataclass(frozen=True)
class Ball:
    """Holds the trainable weights within ``radius`` of ``center``, and stops beyond ``reach`` from ``last``.

    Lengths are Euclidean, over all floating tensors, computed in float32: a projected weight vector may lie outside by
    its rounding (some 1e-7 of the radius; more where the weights themselves are kept in 16 bits).
    """

    radius: float
    reach: float
    center: AdapterState = field(compare=False)
    last: AdapterState = field(compare=False)

    def bind(self, model: nn.Module) -> Callable[[], bool]:
        """See :class:`unfed.training.loop.Constraint`."""
        live = {n: t for n, t in live_tensors(model).items() if t.is_floating_point()}
        weights = list(live.values())
        center = [self.center[n].to(t.device, torch.float32) for n, t in live.items()]
        last = [self.last[n].to(t.device, torch.float32) for n, t in live.items()]

        @torch.no_grad()
        def hold() -> bool:
            away = _length(weights, center)
            if away > self.radius:
                for weight, middle in zip(weights, center, strict=True):
                    weight.copy_(middle + (weight.float() - middle) * (self.radius / away))
            return _length(weights, last) > self.reach

        return hold


def _length(first: list[Tensor], second: list[Tensor]) -> float:
    parts = [torch.linalg.vector_norm(a.float() - b) for a, b in zip(first, second, strict=True)]
    return float(torch.linalg.vector_norm(torch.stack(parts)))


def others_alone(source: Source, adapter: AdapterState, targets: tuple[str, ...]) -> AdapterState:
    """``adapter`` as the last round of each target would have left it without the targets.

    With the server's step ``s`` and weights ``p``: ``w + s (sum_others p_k D_k / sum_others p_k - sum_all p_k D_k)``,
    which is ``N/(N-1) w_T - 1/(N-1) w_u`` where ``s`` is 1, the weights are equal and there is one target. A round that
    had nobody else is taken back whole.
    """
    rounds = {_last_round(source, c) for c in targets}
    for last in sorted(n for n in rounds if n is not None):
        everybody = _mean(source, last, ())
        others = _mean(source, last, targets)
        adapter = moved(adapter, delta(others, everybody), _step(source), adapter)
    return adapter


def last_model(source: Source, adapter: AdapterState, client: str) -> AdapterState:
    """What ``client`` sent in its last kept round, seen from ``adapter``, the server's after that round."""
    last = _last_round(source, client)
    assert last is not None  # see PGA.problems
    kept = source.history.update_of(last, client)
    assert kept is not None
    before = moved(adapter, _mean(source, last, ()), -_step(source), adapter)
    return moved(before, kept.delta, 1.0, before)


def _mean(source: Source, kept_round: int, without: tuple[str, ...]) -> AdapterState:
    """The weighted mean of a kept round's updates but those of ``without``; zero where nobody is left."""
    mean, like, found = RunningMean(), None, False
    for client, kept in source.history.updates(kept_round):
        like = kept.delta
        if client not in without:
            mean.add(kept.delta, source.weight(kept.num_examples))
            found = True
    assert like is not None
    return mean.result() if found else full_like(like, 0.0)


def _last_round(source: Source, client: str) -> int | None:
    """The last round of which an update of ``client`` is kept."""
    history = source.history
    return next((n for n in reversed(history.update_rounds()) if client in history.examples(n)), None)


def _step(source: Source) -> float:
    assert source.mean_step is not None  # Demands.linear
    return source.mean_step
