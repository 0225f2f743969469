"""Negative preference optimization."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from unfed.base.params import number
from unfed.base.types import LossTerms
from unfed.objectives.base import Needs, StepContext
from unfed.objectives.retain import WithRetain


def npo_loss(policy_logps: Tensor, reference_logps: Tensor, beta: float) -> Tensor:
    """``-(2/beta) log sigmoid(-beta (log pi - log pi_ref))`` of each example (Zhang et al. 2024).

    Both inputs are sequence log-likelihoods in nats, ``(B,)``; so is the result. It is bounded below by 0
    and tends to gradient ascent for ``beta`` to 0; at ``pi = pi_ref`` it is ``2 log(2) / beta``.
    """
    return F.logsigmoid(-beta * (policy_logps - reference_logps)) * (-2.0 / beta)


@dataclass(frozen=True)
class NPO(WithRetain):
    """NPO on the forget set, mean over examples, plus a retain term (Zhang et al. 2024, "Negative Preference
    Optimization: From Catastrophic Collapse to Effective Unlearning"). ``beta`` 0.1 as in the paper."""

    beta: float = number(0.1, above=0)

    @property
    def needs(self) -> Needs:
        """Batches of ``forget``, and of ``retain`` unless ``alpha`` is 0."""
        return self._needs(reference=True)

    def __call__(self, ctx: StepContext) -> LossTerms:
        """See :meth:`unfed.objectives.base.Objective.__call__`."""
        losses = npo_loss(ctx.logps("forget"), ctx.reference_logps("forget"), self.beta)
        return self._total(ctx, ctx.example_mean("forget", losses))
