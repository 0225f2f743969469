"""Reference-free, length-normalised negative preference optimization."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from unfed.base.params import number
from unfed.base.types import LossTerms
from unfed.objectives.base import Needs, StepContext
from unfed.objectives.retain import WithRetain


def simnpo_loss(policy_logps: Tensor, num_tokens: Tensor, beta: float, delta: float = 0.0) -> Tensor:
    """``-(2/beta) log sigmoid(beta (-log pi / |y| - delta))`` of each example, ``(B,)`` (Fan et al. 2024).

    ``policy_logps`` are sequence log-likelihoods in nats and ``num_tokens`` the answers' lengths. The margin
    stands inside ``beta`` as in OpenUnlearning: ``delta`` is the paper's ``gamma / beta``. An example without
    a labelled token counts as a mean log-likelihood of 0, without gradient.
    """
    mean_nll = -policy_logps / num_tokens.clamp(min=1)
    return F.logsigmoid(beta * (mean_nll - delta)) * (-2.0 / beta)


@dataclass(frozen=True)
class SimNPO(WithRetain):
    """SimNPO on the forget set, mean over examples, plus a retain term (Fan et al. 2024, "Simplicity Prevails:
    Rethinking Negative Preference Optimization for LLM Unlearning").

    The defaults are those of OpenUnlearning's TOFU runs: ``beta`` 4.5, ``delta`` 0, ``gamma`` 0.125 (here the
    weight of the forget term, not the paper's margin), ``alpha`` 1.
    """

    gamma: float = number(0.125, above=0)
    beta: float = number(4.5, above=0)
    delta: float = number(0.0, at_least=0)

    @property
    def needs(self) -> Needs:
        """Batches of ``forget``, and of ``retain`` unless ``alpha`` is 0."""
        return self._needs(reference=False)

    def __call__(self, ctx: StepContext) -> LossTerms:
        """See :meth:`unfed.objectives.base.Objective.__call__`."""
        losses = simnpo_loss(ctx.logps("forget"), ctx.num_tokens("forget"), self.beta, self.delta)
        return self._total(ctx, ctx.example_mean("forget", losses))
