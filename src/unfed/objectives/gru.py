"""Gradient rectified unlearning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from unfed.base.params import number
from unfed.base.types import Split
from unfed.objectives.wrapper import Wrapper


@dataclass(frozen=True)
class GRU(Wrapper):
    """The forget gradient without its part that goes against the retain gradient (Wang et al. 2025, "GRU: Mitigating
    the Trade-off between Unlearning and Retention for LLMs").

    Of all updates that do not raise the retain loss to first order, the nearest to the forget term's gradient ``g``:
    ``g - min(0, <g, r>) / ||r||^2 * r``. Both are gradients of losses to be lowered, so a negative product means that
    a step along ``-g`` raises the retain loss. ``r`` is the retain term's gradient, averaged over steps:
    ``r_t = gamma * now + (1 - gamma) * r_(t-1)`` from ``r_0 = 0``, anew in every client's round; 1 takes the
    present one alone. ``gamma`` 0.8 is the authors'.

    As in the paper the retain term gives a direction and nothing more: it is not descended, and the inner objective's
    ``alpha`` has no effect unless it is 0, which is refused. The paper's "GA with GRU" is GradDiff in this wrapper.
    """

    splits: ClassVar[frozenset[Split]] = frozenset({"forget", "retain"})

    gamma: float = number(0.8, above=0, at_most=1)
