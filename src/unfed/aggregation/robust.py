"""Robust server rules that choose, weigh or shorten whole updates: Krum, multi-Krum, norm clipping, FLTrust.

They stand between screening and the mean as filters (:class:`unfed.aggregation.base.UpdateFilter`). ``over`` says where
lengths and distances are taken: ``effective`` (the default), over ``s (B_k A_k - B_0 A_0)`` of each module, or
``factors``, over the entries of A and B, as most of the literature on federated LoRA does. See
:mod:`unfed.aggregation.geometry`. A filter that has to see every update holds a round's updates in memory.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from unfed.aggregation.adapters.base import Scaling
from unfed.aggregation.base import Filtering, Weighted
from unfed.aggregation.geometry import Over, Ray, Space, distances
from unfed.aggregation.tree import delta, moved
from unfed.base.errors import UnfedError
from unfed.base.params import Hyperparameters, NumberRule, choice, governed, optional, whole
from unfed.base.types import SERVER, AdapterState, ClientUpdate, OptState, ServerState

log = logging.getLogger(__name__)

Notes = dict[str, float]


@dataclass(frozen=True)
class RobustRule(Hyperparameters):
    """A robust rule by name (``robust=``). ``scaling`` (alpha/r by module) and ``seed`` are not the user's to set."""

    title: ClassVar[str]
    compares: ClassVar[bool] = True
    over: Over = choice("effective", ("effective", "factors"))
    scaling: Scaling = 1.0
    seed: int = 0

    @property
    def name(self) -> str:
        """As in ``robust=``."""
        return self.title

    def init(self, adapter: AdapterState) -> OptState:
        """No memory from round to round."""
        del adapter
        return {}

    def begin(self, state: ServerState) -> Filtering:
        """See :meth:`unfed.aggregation.base.UpdateFilter.begin`."""
        return _Round(self, Space.of(state.adapter, self.scaling, self.over), state.round)

    def complaint(self, count: int) -> str | None:
        """Why the rule says nothing over ``count`` updates, or ``None``."""
        del count
        return None

    def judge(self, space: Space, held: Sequence[Weighted], round_: int) -> tuple[list[Weighted], Notes]:
        """What is passed on of a whole round, and what is said about it: by client, or by quantity."""
        raise NotImplementedError

    def judge_one(self, space: Space, item: Weighted) -> tuple[Weighted, Notes]:
        """As :meth:`judge` for one update, of a rule that streams."""
        raise NotImplementedError

    @property
    def holds(self) -> bool:
        """Whether the rule needs a round's updates at once."""
        return True


@dataclass
class _Round:
    """A robust rule at work. Updates are judged in the order of the clients' numbers, whichever came first."""

    rule: RobustRule
    space: Space
    number: int

    def __post_init__(self) -> None:
        self._notes: Notes = {}

    def apply(self, updates: Iterator[Weighted]) -> Iterator[Weighted]:
        if not self.rule.holds:
            for item in updates:
                judged, notes = self.rule.judge_one(self.space, item)
                self._notes |= notes
                yield judged
            return
        held = sorted(updates, key=lambda w: (len(w.update.client_id), w.update.client_id))
        reason = self.rule.complaint(sum(w.update.client_id != SERVER for w in held))
        if reason is not None:
            raise UnfedError(f"robust={self.rule.name}, round {self.number + 1}: {reason}")
        passed, notes = self.rule.judge(self.space, held, self.number)
        self._notes |= notes
        yield from passed

    def slots(self) -> OptState:
        return {}

    def notes(self) -> Mapping[str, float]:
        return self._notes


def rescaled(space: Space, item: Weighted, factor: float, weight: float) -> Weighted:
    """The update with its factors ``factor`` times as far from the round's adapter."""
    if factor == 1.0:
        return replace(item, weight=weight)
    update = item.update
    adapter = moved(space.start, delta(update.adapter, space.start), factor, update.adapter)
    return Weighted(replace(update, adapter=adapter), weight)


@dataclass(frozen=True)
class Krum(RobustRule):
    """Blanchard et al. 2017: of ``n`` updates the one with the smallest score, which is the sum of squared distances to
    its ``n - f - 2`` nearest others; ``f`` is ``num_byzantine``, and ``n >= 2f + 3``. Unweighted. Equal scores: the
    client with the lower number."""

    title: ClassVar[str] = "krum"
    num_byzantine: int = whole(1, at_least=0)

    def complaint(self, count: int) -> str | None:
        """The paper's condition."""
        f, needed = self.num_byzantine, 2 * self.num_byzantine + 3
        if count >= needed:
            return None
        most = (count - 3) // 2
        way = f"num_byzantine={most} at most" if most >= 0 else "more clients"
        return f"with num_byzantine={f} it needs 2 * {f} + 3 = {needed} updates, and there are {count}; take {way}"

    def scores(self, squared: Tensor) -> list[float]:
        """Scores from squared distances ``(n, n)``."""
        nearest = len(squared) - self.num_byzantine - 2
        return [float(row.sort().values[1 : 1 + nearest].sum()) for row in squared]

    def taken(self, count: int) -> int:
        """How many updates are taken of ``count``."""
        del count
        return 1

    def judge(self, space: Space, held: Sequence[Weighted], round_: int) -> tuple[list[Weighted], Notes]:
        """See :meth:`RobustRule.judge`. Notes: 1 for each client that was taken, 0 for the others."""
        del round_
        scores = self.scores(distances(space.gram([w.update.adapter for w in held])))
        best = set(sorted(range(len(held)), key=lambda i: (scores[i], i))[: self.taken(len(held))])
        notes = {w.update.client_id: float(i in best) for i, w in enumerate(held)}
        return [replace(w, weight=1.0) for i, w in enumerate(held) if i in best], notes


@dataclass(frozen=True)
class MultiKrum(Krum):
    """Blanchard et al. 2017: the plain mean of the ``m`` updates with the smallest Krum scores. ``m`` null: ``n - f``,
    as in the paper's experiments."""

    title: ClassVar[str] = "multi_krum"
    m: int | None = governed(None, optional(NumberRule(at_least=1, whole=True)))

    def taken(self, count: int) -> int:
        """``m``."""
        return count - self.num_byzantine if self.m is None else self.m

    def complaint(self, count: int) -> str | None:
        """Krum's condition, and no more taken than are thought honest."""
        few, honest = super().complaint(count), count - self.num_byzantine
        if few is not None or self.taken(count) <= honest:
            return few
        return (
            f"m={self.m} is more than the {count} - {self.num_byzantine} = {honest} updates that are held to be honest"
        )


@dataclass(frozen=True)
class NormClipping(RobustRule):
    """Sun et al. 2019, "Can You Really Backdoor Federated Learning?": a step over ``max_norm`` is shortened to that.

    ``max_norm`` null: the median length of the round's steps (the choice of McMahan et al. 2018), which needs them all;
    a number streams. Weights stay as they are. ``over=effective``: the factors are moved back along the line to the
    round's adapter to where the effective step is ``max_norm`` long; with the median the step of the factors is held to
    its own median as well, since long factors with a short product would spoil a mean of factors.
    """

    title: ClassVar[str] = "norm_clipping"
    max_norm: float | None = governed(None, optional(NumberRule(above=0)))

    @property
    def holds(self) -> bool:
        """Only for the median."""
        return self.max_norm is None

    def judge_one(self, space: Space, item: Weighted) -> tuple[Weighted, Notes]:
        """See :meth:`RobustRule.judge_one`. Notes: what was left of each client's step of the factors, 1 for all."""
        assert self.max_norm is not None
        factor = _shortening(space.ray(item.update.adapter), self.max_norm)
        return rescaled(space, item, factor, item.weight), {item.update.client_id: factor}

    def judge(self, space: Space, held: Sequence[Weighted], round_: int) -> tuple[list[Weighted], Notes]:
        """See :meth:`RobustRule.judge`. Notes: as :meth:`judge_one`, and the median length."""
        del round_
        rays = [space.ray(w.update.adapter) for w in held]
        lengths = factor_lengths(space, held)
        bound, factor_bound = statistics.median(r.norm for r in rays), statistics.median(lengths)
        passed, notes = [], {"max_norm": bound}
        for item, ray, length in zip(held, rays, lengths, strict=True):
            factor = min(_shortening(ray, bound), 1.0 if length <= factor_bound else factor_bound / length)
            passed.append(rescaled(space, item, factor, item.weight))
            notes[item.update.client_id] = factor
        return passed, notes


def _shortening(ray: Ray, bound: float) -> float:
    return 1.0 if ray.norm <= bound else min(1.0, ray.reach(bound))


def factor_lengths(space: Space, held: Sequence[Weighted]) -> list[float]:
    """How far each update went from the round's adapter, all tensors as they are."""
    plain = Space.of(space.start, 1.0, "factors")
    return [plain.norm(w.update.adapter) for w in held]


@dataclass(frozen=True)
class FLTrust(RobustRule):
    """Cao et al. 2021, Algorithm 2: each update weighs ``max(0, cos)`` of the angle between its step and that of the
    server, which trains on a small root set of its own, and is first brought to the length of the server's step.

    Unweighted by examples. ``over=effective``: the factors are moved along the line through the round's adapter to
    where the effective step is as long as the server's, but no further than the server's own factors went (a departure:
    long factors with a short product would spoil a mean of factors). If no client points the server's way, the adapter
    stays.
    """

    title: ClassVar[str] = "fltrust"

    def complaint(self, count: int) -> str | None:
        """One client is enough."""
        return None if count else "no client's update came"

    def judge(self, space: Space, held: Sequence[Weighted], round_: int) -> tuple[list[Weighted], Notes]:
        """See :meth:`RobustRule.judge`. Notes: each client's trust, the cosine or 0."""
        own = [w for w in held if w.update.client_id == SERVER]
        if len(own) != 1:
            raise UnfedError(
                f"robust=fltrust, round {round_ + 1}: the server's own update is not there (its training failed, or "
                "its update was dropped), so there is nothing to compare with"
            )
        items = [w for w in held if w is not own[0]]
        gram = space.gram([own[0].update.adapter, *(w.update.adapter for w in items)])
        norms = gram.diagonal().clamp(min=0.0).sqrt()
        length, reach = float(norms[0]), factor_lengths(space, own)[0]
        passed, notes = [], {}
        for i, (item, far) in enumerate(zip(items, factor_lengths(space, items), strict=True), 1):
            both = length * float(norms[i])
            trust = max(0.0, min(1.0, float(gram[0, i]) / both)) if both > 0.0 else 0.0
            notes[item.update.client_id] = trust
            if trust > 0.0:
                factor = min(space.ray(item.update.adapter).reach(length), reach / far)
                passed.append(rescaled(space, item, factor, trust))
        if not passed:
            log.warning("robust=fltrust, round %d: no client points the server's way; the adapter stays", round_ + 1)
            passed = [Weighted(ClientUpdate(SERVER, space.start, own[0].update.num_examples), 1.0)]
        return passed, notes
