"""Gradient difference: ascent on the forget set, descent on the retain set."""

from __future__ import annotations

from dataclasses import dataclass

from unfed.base.types import LossTerms
from unfed.objectives.base import Needs, StepContext
from unfed.objectives.retain import WithRetain


@dataclass(frozen=True)
class GradDiff(WithRetain):
    """``-gamma * NLL(forget) + alpha * retain`` (Liu, Liu and Stone 2022, "Continual Learning and Private
    Unlearning"; the form of Maini et al. 2024, "TOFU"). Both cross-entropies are means over tokens."""

    @property
    def needs(self) -> Needs:
        """Batches of ``forget``, and of ``retain`` unless ``alpha`` is 0."""
        return self._needs(reference=False)

    def __call__(self, ctx: StepContext) -> LossTerms:
        """See :meth:`unfed.objectives.base.Objective.__call__`."""
        return self._total(ctx, -ctx.nll("forget"))
