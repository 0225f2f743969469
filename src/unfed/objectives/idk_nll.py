"""Learning to decline: the likelihood of refusals to the forget questions."""

from __future__ import annotations

from dataclasses import dataclass

from unfed.base.types import LossTerms
from unfed.objectives.base import Needs, StepContext
from unfed.objectives.retain import WithRetain


@dataclass(frozen=True)
class IdkNLL(WithRetain):
    """``gamma * NLL(alternate) + alpha * retain`` (the preference optimization of Maini et al. 2024, "TOFU").

    Departure: TOFU's code averages over the tokens of refusals and retain answers together; here each mean is its own,
    as in every other method, so that the short refusals are not outweighed. Both weights are 1: the paper has none.
    """

    @property
    def needs(self) -> Needs:
        """Batches of ``alternate``, and of ``retain`` unless ``alpha`` is 0."""
        return self._needs(False, ("alternate",))

    def __call__(self, ctx: StepContext) -> LossTerms:
        """See :meth:`unfed.objectives.base.Objective.__call__`."""
        return self._total(ctx, ctx.nll("alternate"))
