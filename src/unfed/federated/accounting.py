"""What clipping and noise add up to: epsilon of a sequence of Gaussian mechanisms, by dp-accounting's accountants."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

from unfed.base.errors import ArtifactError

Sampling = Literal["everyone", "poisson", "fixed"]
Neighbours = Literal["add_or_remove", "replace"]
LARGE = 50.0
"""Epsilon by RDP above which the PLD accountant is not asked: its grid grows with the loss, to gigabytes at 1e4, and
such a bound protects nobody."""


@dataclass(frozen=True)
class Release:
    """A Gaussian mechanism that is applied ``count`` times to the same protected units.

    ``noise_multiplier``: standard deviation over the bound on one unit's part of the sum. ``sampling``: who is in each
    sum: ``everyone``; ``poisson``, each unit on its own with probability ``sample / population``; ``fixed``, ``sample``
    of ``population`` drawn without replacement. ``replace``: the unit is replaced by another rather than left out
    (local privacy, where its part is always there), so that the sum moves by twice the bound.
    """

    noise_multiplier: float
    count: int
    sampling: Sampling = "everyone"
    sample: float = 1
    population: int = 1
    replace: bool = False

    @property
    def rate(self) -> float:
        """The share of the units that a sum is over."""
        return 1.0 if self.sampling == "everyone" else min(1.0, self.sample / self.population)

    def record(self) -> dict[str, Any]:
        """For ``run.json``."""
        return asdict(self)

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Release:
        """From ``run.json``. ``ArtifactError`` where it is not what :meth:`record` wrote."""
        try:
            return cls(**record)
        except TypeError as e:
            raise ArtifactError(f"a run's privacy record cannot be read: {e}") from e


@dataclass(frozen=True)
class Spent:
    """Privacy loss at ``delta``. ``rdp``, ``pld``: epsilon by the accountant of that name, infinite without noise;
    ``None`` where it knows no bound for such sampling. ``neighbours``: data sets that are told apart differ by one
    unit more or less, or by one unit's data."""

    delta: float
    neighbours: Neighbours
    rdp: float | None
    pld: float | None

    @property
    def epsilon(self) -> float:
        """The smaller: each is an upper bound."""
        return min(e for e in (self.rdp, self.pld) if e is not None)


def spent(releases: Sequence[Release], delta: float, *, pld: bool = True) -> Spent:
    """Epsilon of all ``releases`` one after the other, at ``delta``.

    Fixed-size samples are accounted for by replacement (Wang, Balle and Kasiviswanathan 2019), for which dp-accounting
    has the RDP accountant alone; so is everything composed with them. A replaced unit moves a sum by twice the bound:
    the library's accountants differ in whether they count the 2 themselves, so it is put into the multiplier here, and
    the event is one of a unit that is there or not. Poisson samples and replacement do not go together in one bound
    (``ValueError``). ``pld``: false leaves the slower accountant out, as does an epsilon above ``LARGE``.
    """
    if not releases:
        return Spent(delta, "add_or_remove", 0.0, 0.0)
    replace = any(r.replace or (r.sampling == "fixed" and r.rate < 1) for r in releases)
    if replace and any(r.sampling == "poisson" and r.rate < 1 for r in releases):
        raise ValueError("Poisson sampling and replacement in one bound")
    neighbours: Neighbours = "replace" if replace else "add_or_remove"
    if any(r.noise_multiplier == 0 for r in releases):
        return Spent(delta, neighbours, math.inf, math.inf)
    fixed = any(r.sampling == "fixed" and r.rate < 1 for r in releases)
    by_rdp = _rdp(releases, delta, replace, fixed)
    by_pld = _pld(releases, delta, replace) if pld and not fixed and by_rdp <= LARGE else None
    return Spent(delta, neighbours, by_rdp, by_pld)


def _event(release: Release, replace: bool) -> Any:
    """dp-accounting's name for one application."""
    from dp_accounting import dp_event

    gaussian = dp_event.GaussianDpEvent(release.noise_multiplier / (2 if replace else 1))
    if release.rate == 1:
        return gaussian
    if release.sampling == "poisson":
        return dp_event.PoissonSampledDpEvent(release.rate, gaussian)
    return dp_event.SampledWithoutReplacementDpEvent(release.population, int(release.sample), gaussian)


def _rdp(releases: Sequence[Release], delta: float, replace: bool, fixed: bool) -> float:
    from dp_accounting import NeighboringRelation, rdp

    relation = NeighboringRelation.REPLACE_ONE if fixed else NeighboringRelation.ADD_OR_REMOVE_ONE
    accountant = rdp.RdpAccountant(neighboring_relation=relation)
    with _quiet():
        for release in releases:
            accountant.compose(_event(release, replace), release.count)
        return float(accountant.get_epsilon(delta))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without a warning for each order at which the RDP accountant's series does not converge: it leaves that out."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _pld(releases: Sequence[Release], delta: float, replace: bool) -> float:
    from dp_accounting import pld

    accountant = pld.PLDAccountant()
    for release in releases:
        accountant.compose(_event(release, replace), release.count)
    return float(accountant.get_epsilon(delta))
