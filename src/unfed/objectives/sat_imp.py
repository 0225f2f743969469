"""Gradient ascent weighted by saturation and importance."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from unfed.base.params import number
from unfed.base.types import LossTerms
from unfed.objectives.base import Needs, StepContext
from unfed.objectives.retain import WithRetain


def satimp_loss(token_logps: Tensor, beta1: float, beta2: float) -> Tensor:
    """``p^beta1 (1 - p)^beta2 log p`` of each token, ``(N,)`` in nats, the weights without gradient (Yang et al. 2025).

    The first weight (saturation) spares tokens that are unlikely already, the second (importance) those that the model
    is sure of.
    """
    fixed = token_logps.detach()
    return (beta1 * fixed).exp() * (-fixed.expm1()).clamp(min=0).pow(beta2) * token_logps


@dataclass(frozen=True)
class SatImp(WithRetain):
    """SatImp on the forget answers, mean over labelled tokens, plus a retain term (Yang et al. 2025, "Exploring
    Criteria of Loss Reweighting to Enhance LLM Unlearning").

    ``beta1`` 5 and ``beta2`` 1 as in the paper, and its weights of the terms, ten to one: ``gamma`` 1, ``alpha`` 0.1
    (OpenUnlearning's YAML has them the other way round, its class and its authors' notes as here).
    """

    alpha: float = number(0.1, at_least=0)
    beta1: float = number(5.0, at_least=0)
    beta2: float = number(1.0, at_least=0)

    @property
    def needs(self) -> Needs:
        """Batches of ``forget``, and of ``retain`` unless ``alpha`` is 0."""
        return self._needs(False)

    def __call__(self, ctx: StepContext) -> LossTerms:
        """See :meth:`unfed.objectives.base.Objective.__call__`."""
        losses = satimp_loss(ctx.token_logps("forget"), self.beta1, self.beta2)
        return self._total(ctx, ctx.token_mean("forget", losses))
