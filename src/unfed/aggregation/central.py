"""Central differential privacy on the way into the mean and out of it: a clipping filter, and noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from unfed.aggregation.base import Filtering, Weighted
from unfed.aggregation.gaussian import clipped, noise_like
from unfed.aggregation.privacy import CentralPrivacy
from unfed.aggregation.tree import delta, moved, zip_map
from unfed.base.types import AdapterState, Combined, OptState, ServerState

BOUND = "privacy.clip"
"""The slot that holds the adaptive bound: one float64 value named ``clip``."""


@dataclass(frozen=True)
class Central:
    """The settings, and what they are applied to.

    ``expected``: the number of clients that each round of the run expects, which is what sums are divided by, whoever
    answers. ``seed``: the run's.
    """

    settings: CentralPrivacy
    expected: Sequence[float]
    seed: int

    def bound(self, state: ServerState) -> float:
        """The bound of the round that begins with ``state``."""
        slot = state.opt_state.get(BOUND)
        return self.settings.clip if slot is None else float(slot["clip"])


@dataclass(frozen=True)
class Clipping:
    """Clips every update and gives all the same weight; with ``adaptive`` it also settles the next round's bound."""

    central: Central
    compares: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """For records."""
        return "privacy"

    def init(self, adapter: AdapterState) -> OptState:
        """The first bound, where it moves."""
        return _slot(self.central.settings.clip) if self.central.settings.adaptive else {}

    def begin(self, state: ServerState) -> Filtering:
        """See :class:`unfed.aggregation.base.UpdateFilter`."""
        return _Round(self.central, state)


class _Round:
    """One round's clipping."""

    def __init__(self, central: Central, state: ServerState) -> None:
        self._central, self._state = central, state
        self._bound = central.bound(state)
        self._bits = self._count = 0

    def apply(self, updates: Iterator[Weighted]) -> Iterator[Weighted]:
        """Each update clipped, with weight 1, in constant memory."""
        for item in updates:
            adapter, length = clipped(self._state.adapter, item.update.adapter, self._bound)
            self._bits += length <= self._bound
            self._count += 1
            yield Weighted(replace(item.update, adapter=adapter), 1.0)

    def slots(self) -> OptState:
        """The next bound, from the noisy share of updates that were within this one."""
        settings, round_ = self._central.settings, self._state.round
        if not settings.adaptive:
            return {}
        source = settings.generator(self._central.seed, "bits", round_)
        share = settings.noisy_share(self._bits, self._count, self._central.expected[round_], source)
        return _slot(settings.next_clip(self._bound, share))

    def notes(self) -> Mapping[str, float]:
        """The bound, which is no secret; how many updates were within it is one."""
        return {"clip": self._bound}


def _slot(bound: float) -> OptState:
    return {BOUND: AdapterState({"clip": torch.tensor(bound, dtype=torch.float64)})}


@dataclass(frozen=True)
class CentralNoise:
    """Turns the mean of the round's ``n`` clipped updates into the private estimate of the mean of those expected.

    ``start + (sum of updates) / expected + N(0, (z * bound / expected)^2)``: the fixed denominator keeps one client's
    influence at ``bound / expected`` at most, whoever took part (McMahan et al. 2018, section 3.2). With adaptive
    clipping ``z`` is larger, as the noisy count has its share (:meth:`CentralPrivacy.update_multiplier`).
    """

    central: Central

    def __call__(self, combined: Combined, state: ServerState, trained: frozenset[str]) -> Combined:
        """See :class:`unfed.aggregation.base.Noise`. Tensors that did not train stay as they are."""
        settings = self.central.settings
        expected = self.central.expected[state.round]
        std = settings.update_multiplier(expected) * self.central.bound(state) / expected
        scale = len(combined.client_ids) / expected
        if std == 0.0 and scale == 1.0:
            return combined
        apart = state.adapter.without(frozenset(state.adapter) - trained)
        mean = combined.adapter.without(frozenset(combined.adapter) - trained)
        change = delta(mean, apart)
        if std > 0.0:
            noise = noise_like(apart, std, settings.generator(self.central.seed, "sum", state.round))
            direction = zip_map(lambda d, e: d * scale + e, change, noise)
        else:
            direction = zip_map(lambda d: d * scale, change)
        return replace(combined, adapter=moved(apart, direction, 1.0, mean).filled(combined.adapter))
