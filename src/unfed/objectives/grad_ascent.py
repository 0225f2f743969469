"""Gradient ascent on the forget set."""

from __future__ import annotations

from dataclasses import dataclass

from unfed.base.params import Hyperparameters
from unfed.base.types import LossTerms
from unfed.objectives.base import Needs, StepContext


@dataclass(frozen=True)
class GradAscent(Hyperparameters):
    """The negated cross-entropy of the forget answers, mean over labelled tokens (Jang et al. 2023,
    "Knowledge Unlearning for Mitigating Privacy Risks in Language Models"). Unbounded below, and nothing
    holds the retain data: a few steps only."""

    @property
    def needs(self) -> Needs:
        """Batches of one split."""
        return Needs(frozenset({"forget"}))

    def __call__(self, ctx: StepContext) -> LossTerms:
        """See :meth:`unfed.objectives.base.Objective.__call__`."""
        loss = -ctx.nll("forget")
        return LossTerms(loss, {"forget": loss.detach()}, {"forget": loss})
