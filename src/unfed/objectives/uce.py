"""Unlearning cross-entropy: bounded, so it converges where gradient ascent explodes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unfed.base.params import number
from unfed.base.types import LossTerms
from unfed.objectives.base import Needs, StepContext
from unfed.objectives.retain import WithRetain


def uce_loss(token_logps: Tensor) -> Tensor:
    """``-log(1 - p/2)`` of each token, ``(N,)`` (Pan et al. 2025): from 0 (``p`` = 0) to log 2 (``p`` = 1)."""
    return -torch.log1p(-token_logps.exp() / 2)


@dataclass(frozen=True)
class UCE(WithRetain):
    """The unlearning cross-entropy on the forget answers, mean over labelled tokens (Pan et al. 2025, "Federated
    Unlearning with Gradient Descent and Conflict Mitigation": FedOSD's loss alone, not its projections).

    The paper writes it for classes; here each labelled token is one decision among the vocabulary. It has no retain
    term; ``alpha`` above 0 adds one.
    """

    alpha: float = number(0.0, at_least=0)

    @property
    def needs(self) -> Needs:
        """Batches of ``forget``, and of ``retain`` unless ``alpha`` is 0."""
        return self._needs(False)

    def __call__(self, ctx: StepContext) -> LossTerms:
        """See :meth:`unfed.objectives.base.Objective.__call__`."""
        return self._total(ctx, ctx.token_mean("forget", uce_loss(ctx.token_logps("forget"))))
