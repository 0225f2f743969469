"""Plain training: the negative log-likelihood of the labelled tokens."""

from __future__ import annotations

from dataclasses import dataclass

from unfed.base.params import Hyperparameters
from unfed.base.types import LossTerms
from unfed.objectives.base import Needs, StepContext


@dataclass(frozen=True)
class NLL(Hyperparameters):
    """Mean cross-entropy over the labelled tokens of split ``train``: fine-tuning and recovery."""

    @property
    def needs(self) -> Needs:
        """Batches of one split."""
        return Needs(frozenset({"train"}))

    def __call__(self, ctx: StepContext) -> LossTerms:
        """See :meth:`unfed.objectives.base.Objective.__call__`."""
        loss = ctx.nll("train")
        return LossTerms(loss, {"train": loss.detach()})
