"""Plain training: the negative log-likelihood of the labelled tokens."""

from __future__ import annotations

from dataclasses import dataclass

from unfed.base.params import Hyperparameters
from unfed.base.types import LossTerms, Split
from unfed.objectives.base import Needs, StepContext


@dataclass(frozen=True)
class NLL(Hyperparameters):
    """Mean cross-entropy over the labelled tokens of one split: ``train`` in fine-tuning and recovery, ``forget`` where
    a recipe has the rows learned that are to be forgotten."""

    rows: Split = "train"

    @property
    def needs(self) -> Needs:
        """Batches of one split."""
        return Needs(frozenset({self.rows}))

    def __call__(self, ctx: StepContext) -> LossTerms:
        """See :meth:`unfed.objectives.base.Objective.__call__`."""
        loss = ctx.nll(self.rows)
        return LossTerms(loss, {self.rows: loss.detach()})
