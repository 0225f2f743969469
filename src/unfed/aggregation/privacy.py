"""Differential privacy by clipping and Gaussian noise: the settings of its three kinds, and adaptive clipping.

``noise_multiplier`` is everywhere the ratio of the noise's standard deviation to the bound ``clip`` on what one
protected unit adds to a sum. Where the noise comes from: :func:`unfed.aggregation.gaussian.normal`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch

from unfed.aggregation.gaussian import normal
from unfed.base import params as hyper
from unfed.base.errors import ConfigError, nearest
from unfed.base.params import Hyperparameters, NumberRule, Rule, flag, governed, number
from unfed.base.seeding import torch_generator

Unit = Literal["client", "example"]


@dataclass(frozen=True)
class OrNone:
    """A rule, or ``None`` for what is settled from the rest of the run."""

    rule: Rule

    def complaint(self, value: object) -> str | None:
        """Why ``value`` is refused, or ``None``."""
        return None if value is None else self.rule.complaint(value)


@dataclass(frozen=True)
class Privacy(Hyperparameters):
    """What the three kinds have in common.

    ``clip``: the bound, in units of the weights (of their gradient for ``example``). ``delta``: of the guarantee;
    ``None`` is 1/N for N protected units. ``secure_noise``: noise from the operating system's entropy. Otherwise it is
    drawn from the run's seed, so that a run can be repeated bit for bit, and whoever knows the seed can take it off.
    """

    kind: ClassVar[str] = ""
    unit: ClassVar[Unit] = "client"

    clip: float = number(1.0, above=0)
    noise_multiplier: float = number(1.0, at_least=0)
    delta: float | None = governed(None, OrNone(NumberRule(above=0, below=1)))
    secure_noise: bool = flag(False)

    def generator(self, seed: int, *purpose: str | int) -> torch.Generator | None:
        """What noise for a purpose is drawn from; ``None`` for the operating system's entropy."""
        return None if self.secure_noise else torch_generator(seed, "privacy", *purpose)


@dataclass(frozen=True)
class CentralPrivacy(Privacy):
    """The server clips every client's update and adds noise to their sum (McMahan et al. 2018, "Learning Differentially
    Private Recurrent Language Models", Algorithm 1, with equal weights and the fixed-denominator estimator).

    With ``adaptive`` the bound follows the ``target_quantile`` of the updates' lengths (Andrew et al. 2021,
    "Differentially Private Learning with Adaptive Clipping", Algorithm 1): ``clip`` is where it begins, ``clip_lr`` the
    paper's eta_C, ``bit_noise`` the paper's sigma_b, the standard deviation of the noise on the count of updates within
    the bound. Quantile and rate are the paper's, which begins with a bound of 0.1; a fixed one has no usual value.

    Departure: the paper sets ``bit_noise`` to a 20th of the clients of a round, which with few of them leaves the
    update none of the budget; ``None`` is the larger of that and ``noise_multiplier``.
    """

    kind: ClassVar[str] = "central"

    adaptive: bool = flag(False)
    target_quantile: float = number(0.5, at_least=0, at_most=1)
    clip_lr: float = number(0.2, above=0)
    bit_noise: float | None = governed(None, OrNone(NumberRule(above=0)))

    def count_noise(self, clients: float) -> float:
        """sigma_b with an expected number of clients in a round."""
        if self.bit_noise is not None:
            return self.bit_noise
        return max(clients / 20.0, self.noise_multiplier)

    def update_multiplier(self, clients: float) -> float:
        """The multiplier of the noise on the sum of updates, so that this and the noisy count together cost what one
        Gaussian mechanism of ``noise_multiplier`` costs: ``(z^-2 - (2 sigma_b)^-2)^(-1/2)`` (Andrew et al. 2021,
        Theorem 1; the factor 2, since the count is of bits less a half). ``ConfigError`` where ``bit_noise`` is too
        small for that."""
        z = self.noise_multiplier
        if not self.adaptive or z == 0.0:
            return z
        bits = 2.0 * self.count_noise(clients)
        if bits <= z:
            raise ConfigError(
                [
                    (
                        f"privacy.bit_noise={self.bit_noise:g}: must be above {z / 2:g}, half of "
                        "privacy.noise_multiplier: the noisy count alone would cost more than both may"
                    )
                ]
            )
        return (z**-2 - bits**-2) ** -0.5

    def next_clip(self, clip: float, within: float) -> float:
        """``clip * exp(-clip_lr * (within - target_quantile))``, ``within`` the noisy share of updates that were no
        longer than ``clip``."""
        return clip * math.exp(-self.clip_lr * (within - self.target_quantile))

    def noisy_share(self, bits: int, clients: int, expected: float, generator: torch.Generator | None) -> float:
        """The share of a round's updates within the bound, as the server may know it: ``bits`` of ``clients`` are.

        ``1/2 + (sum of (bit - 1/2) + N(0, sigma_b^2)) / expected``, the fixed denominator once more.
        """
        noise = 0.0
        if self.noise_multiplier > 0.0:
            noise = self.count_noise(expected) * float(normal(torch.Size([1]), generator))
        return 0.5 + (bits - 0.5 * clients + noise) / expected


@dataclass(frozen=True)
class LocalPrivacy(Privacy):
    """Every client clips its own update and adds ``N(0, (noise_multiplier * clip)^2)`` to each value before it leaves,
    so that nobody else, the server included, sees the update itself."""

    kind: ClassVar[str] = "local"


@dataclass(frozen=True)
class ExamplePrivacy(Privacy):
    """DP-SGD in the local loop (Abadi et al. 2016, "Deep Learning with Differential Privacy", Algorithm 1): every
    example's gradient is clipped, noise is added to their sum, and a step's examples are a Poisson sample."""

    kind: ClassVar[str] = "example"
    unit: ClassVar[Unit] = "example"


PRIVACY: Mapping[str, type[Privacy]] = MappingProxyType(
    {cls.kind: cls for cls in (CentralPrivacy, LocalPrivacy, ExamplePrivacy)}
)


def privacy_problems(name: str, params: Mapping[str, Any]) -> list[str]:
    """Everything wrong with a kind of privacy and its settings (empty: it can be built)."""
    if name not in PRIVACY:
        return [f"unknown kind of privacy {name!r}{nearest(name, PRIVACY)}"]
    return hyper.problems(PRIVACY[name], params, "privacy", PRIVACY)


def build_privacy(name: str, params: Mapping[str, Any]) -> Privacy:
    """The kind ``name`` with ``params`` over its defaults; ``ConfigError`` lists every problem."""
    if found := privacy_problems(name, params):
        raise ConfigError(found)
    return PRIVACY[name](**params)
