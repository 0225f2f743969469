"""Direct preference optimization: another answer is preferred to the forgotten one."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from unfed.base.params import number
from unfed.base.types import LossTerms
from unfed.objectives.base import Needs, StepContext
from unfed.objectives.retain import WithRetain


def dpo_loss(chosen_log_ratios: Tensor, rejected_log_ratios: Tensor, beta: float) -> Tensor:
    """``-(2/beta) log sigmoid(beta (chosen - rejected))`` of each pair, ``(B,)`` (Rafailov et al. 2023, eq. 7).

    A log-ratio is ``log pi - log pi_ref`` of a whole answer in nats, ``(B,)``. Departure from the paper: the factor
    ``2/beta``, which NPO has (Zhang et al. 2024) and OpenUnlearning gives DPO too, so that ``beta`` and ``gamma``
    compare between both; NPO is this loss without the chosen answer. At ``pi = pi_ref`` it is ``2 log(2) / beta``.
    """
    return F.logsigmoid(beta * (chosen_log_ratios - rejected_log_ratios)) * (-2.0 / beta)


@dataclass(frozen=True)
class DPO(WithRetain):
    """DPO that prefers an alternate answer to the forget answer, mean over examples, plus a retain term (Rafailov et
    al. 2023, "Direct Preference Optimization"; for unlearning: Zhang et al. 2024, "Negative Preference Optimization").

    The alternate answers are refusals, or those of ``data.alternate``: OpenUnlearning's tables call the first
    ``IdkDPO``. ``beta`` 0.1 as in both papers; the second gives both terms equal weight.
    """

    beta: float = number(0.1, above=0)

    @property
    def needs(self) -> Needs:
        """Batches of ``forget`` and ``alternate``, and of ``retain`` unless ``alpha`` is 0."""
        return self._needs(True, ("forget", "alternate"))

    def __call__(self, ctx: StepContext) -> LossTerms:
        """See :meth:`unfed.objectives.base.Objective.__call__`."""
        chosen = ctx.logps("alternate") - ctx.reference_logps("alternate")
        rejected = ctx.logps("forget") - ctx.reference_logps("forget")
        return self._total(ctx, ctx.example_mean("forget", dpo_loss(chosen, rejected, self.beta)))
