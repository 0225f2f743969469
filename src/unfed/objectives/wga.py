"""Weighted gradient ascent."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from unfed.base.params import number
from unfed.base.types import LossTerms
from unfed.objectives.base import Needs, StepContext
from unfed.objectives.retain import WithRetain


def wga_loss(token_logps: Tensor, beta: float) -> Tensor:
    """``p^beta log p`` of each token, ``(N,)`` in nats, the weight ``p^beta`` without gradient (Wang et al. 2025,
    "Rethinking LLM Unlearning Objectives"). With ``beta`` 0 it is gradient ascent; with more, a token that is
    unlikely already is pushed no further."""
    return (beta * token_logps.detach()).exp() * token_logps


@dataclass(frozen=True)
class WGA(WithRetain):
    """WGA on the forget answers, mean over labelled tokens, plus a retain term (Wang et al. 2025, "Rethinking LLM
    Unlearning Objectives: A Gradient Perspective and Go Beyond").

    ``beta`` (the paper's alpha) is 1 as its authors set it in OpenUnlearning, both terms have weight 1. The mean over
    tokens is OpenUnlearning's.
    """

    beta: float = number(1.0, at_least=0)

    @property
    def needs(self) -> Needs:
        """Batches of ``forget``, and of ``retain`` unless ``alpha`` is 0."""
        return self._needs(False)

    def __call__(self, ctx: StepContext) -> LossTerms:
        """See :meth:`unfed.objectives.base.Objective.__call__`."""
        return self._total(ctx, ctx.token_mean("forget", wga_loss(ctx.token_logps("forget"), self.beta)))
