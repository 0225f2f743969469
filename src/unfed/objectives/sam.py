"""Sharpness-aware unlearning."""

from __future__ import annotations

from dataclasses import dataclass

from unfed.base.params import number
from unfed.objectives.wrapper import Wrapper


@dataclass(frozen=True)
class SAM(Wrapper):
    """``max over ||eps|| <= rho of forget(theta + eps)``, plus the rest at ``theta`` (Fan et al. 2025, "Towards LLM
    Unlearning Resilient to Relearning Attacks: A Sharpness-Aware Minimization Perspective and Beyond").

    The maximum is taken to first order: ``eps = rho * g / ||g||``, ``g`` the gradient of the weighted forget term over
    the whole step and over all trained weights. With ``rho`` 0 it is the inner objective. How a step is made:
    :class:`unfed.training.gradients.SharpnessAware`. The default is the authors' for MUSE; their runs on WMDP train
    all weights with 0.01 to 0.1. An adapter has fewer weights, and its product B A moves with both factors.
    """

    rho: float = number(0.01, at_least=0)
