"""Adaptive server optimizers: FedAdagrad, FedAdam, FedYogi.

Reddi et al. 2021, "Adaptive Federated Optimization", Algorithm 2, as printed: the pseudo-gradient is the mean
update ``d``; ``m = beta1 m + (1 - beta1) d``; ``w = w + server_lr * m / (sqrt(v) + tau)``; ``m`` starts at 0
and ``v`` at ``tau^2``; there is no bias correction. The rules differ in ``v`` alone. A LoRA adapter's entries
move by 1e-6 to 1e-2 in a round, so ``server_lr`` is 1e-3 by default (the paper tunes it per task).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unfed.aggregation.base import WeightedMean
from unfed.aggregation.tree import delta, full_like, moved, zip_map
from unfed.base.params import number
from unfed.base.types import AdapterState, Combined, OptState


@dataclass(frozen=True)
class _Adaptive(WeightedMean):
    """What the three rules share. ``tau`` bounds the adaptivity; the paper keeps it at 1e-3."""

    server_lr: float = number(1e-3, above=0)
    tau: float = number(1e-3, above=0)
    beta1: float = number(0.9, at_least=0, below=1)

    def second_moment(self, v: Tensor, d_squared: Tensor) -> Tensor:
        """The next ``v`` from the present one and the squared mean update."""
        raise NotImplementedError

    def init(self, adapter: AdapterState) -> OptState:
        """``m = 0``, ``v = tau^2``, in float32."""
        return {"m": full_like(adapter, 0.0), "v": full_like(adapter, self.tau**2)}

    def step(self, state: OptState, adapter: AdapterState, combined: Combined) -> tuple[OptState, AdapterState]:
        """One step of Algorithm 2."""
        d = zip_map(Tensor.float, delta(combined.adapter, adapter))
        m = zip_map(lambda old, new: self.beta1 * old + (1 - self.beta1) * new, state["m"], d)
        v = zip_map(lambda old, new: self.second_moment(old, new.square()), state["v"], d)
        direction = zip_map(lambda m_t, v_t: m_t / (v_t.sqrt() + self.tau), m, v)
        return {"m": m, "v": v}, moved(adapter, direction, self.server_lr, combined.adapter)


@dataclass(frozen=True)
class FedAdagrad(_Adaptive):
    """``v = v + d^2``. ``beta1`` 0 as in the paper's experiments (its appendix on hyperparameters)."""

    beta1: float = number(0.0, at_least=0, below=1)

    def second_moment(self, v: Tensor, d_squared: Tensor) -> Tensor:
        """The sum of all squares."""
        return v + d_squared


@dataclass(frozen=True)
class FedAdam(_Adaptive):
    """``v = beta2 v + (1 - beta2) d^2``."""

    beta2: float = number(0.99, at_least=0, below=1)

    def second_moment(self, v: Tensor, d_squared: Tensor) -> Tensor:
        """The decaying mean of squares."""
        return self.beta2 * v + (1 - self.beta2) * d_squared


@dataclass(frozen=True)
class FedYogi(_Adaptive):
    """``v = v - (1 - beta2) d^2 sign(v - d^2)``: additive, so that ``v`` falls more slowly than in FedAdam."""

    beta2: float = number(0.99, at_least=0, below=1)

    def second_moment(self, v: Tensor, d_squared: Tensor) -> Tensor:
        """The square added or taken away, never a multiple of ``v``."""
        return v - (1 - self.beta2) * d_squared * torch.sign(v - d_squared)
