"""Rules that follow the mean: FedAvg, FedProx, FedAvgM."""

from __future__ import annotations

from dataclasses import dataclass

from unfed.aggregation.adapters.base import Pace
from unfed.aggregation.base import WeightedMean
from unfed.aggregation.tree import delta, full_like, moved, zip_map
from unfed.base.params import number
from unfed.base.types import AdapterState, Combined, OptState


@dataclass(frozen=True)
class FedAvg(WeightedMean):
    """The weighted mean (McMahan et al. 2017, Algorithm 1), or a step of ``server_lr`` towards it.

    With ``server_lr`` 1 the new adapter is the mean itself, bit for bit.
    """

    server_lr: float = number(1.0, above=0)

    @property
    def mean_step(self) -> float | None:
        """``server_lr``, where nothing but the mean of the factors comes to it."""
        return self.server_lr if self.adapters.linear and not self.filters and self.noise is None else None

    @property
    def pace(self) -> Pace:
        """A step of ``server_lr``."""
        return Pace(self.server_lr)

    def init(self, adapter: AdapterState) -> OptState:
        """No state."""
        return {}

    def step(self, state: OptState, adapter: AdapterState, combined: Combined) -> tuple[OptState, AdapterState]:
        """``w + server_lr * (mean - w)``."""
        if self.server_lr == 1.0:
            return state, combined.adapter
        return state, moved(adapter, delta(combined.adapter, adapter), self.server_lr, combined.adapter)


@dataclass(frozen=True)
class FedProx(FedAvg):
    """FedAvg on the server; the clients add ``(proximal_mu/2) ||w - w_t||^2`` to their loss (Li et al. 2020,
    Algorithm 2). The paper tunes mu in {0.001, 0.01, 0.1, 1}; the default here is our choice among them."""

    proximal_mu: float = number(0.01, at_least=0)

    @property
    def client_proximal_mu(self) -> float:
        """``proximal_mu``."""
        return self.proximal_mu


@dataclass(frozen=True)
class FedAvgM(WeightedMean):
    """Server momentum (Hsu, Qi and Brown 2019, "Measuring the Effects of Non-Identical Data Distribution"):
    ``m = momentum * m + delta``, ``w = w + server_lr * m`` (the paper has ``server_lr`` 1)."""

    server_lr: float = number(1.0, above=0)
    momentum: float = number(0.9, at_least=0, below=1)

    @property
    def pace(self) -> Pace:
        """A step of ``server_lr`` along the momentum."""
        return Pace(self.server_lr, self.momentum)

    def init(self, adapter: AdapterState) -> OptState:
        """``m = 0``."""
        return {"m": full_like(adapter, 0.0)}

    def step(self, state: OptState, adapter: AdapterState, combined: Combined) -> tuple[OptState, AdapterState]:
        """One step along the accumulated direction."""
        m = zip_map(lambda old, d: self.momentum * old + d.float(), state["m"], delta(combined.adapter, adapter))
        return {"m": m}, moved(adapter, m, self.server_lr, combined.adapter)
