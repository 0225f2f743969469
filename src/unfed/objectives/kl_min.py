"""KL minimization: ascent on the forget set, the old distribution on the retain set."""

from __future__ import annotations

from dataclasses import dataclass

from unfed.base.params import choice
from unfed.base.types import LossTerms
from unfed.objectives.base import Needs, RetainLoss, StepContext
from unfed.objectives.retain import WithRetain


@dataclass(frozen=True)
class KLMin(WithRetain):
    """``-gamma * NLL(forget) + alpha * KL(reference || policy)`` on retain rows (Maini et al. 2024, "TOFU", KL
    Minimization): GradDiff whose retain loss is the KL. Both weights are 1 as in the paper.

    The KL is averaged over the answers' tokens, see :func:`unfed.objectives.retain.retain_loss` for ``parity``.
    """

    retain_loss_type: RetainLoss = choice("KL", ("KL",))

    @property
    def needs(self) -> Needs:
        """Batches of ``forget``, and of ``retain`` with the reference's distribution unless ``alpha`` is 0."""
        return self._needs(False)

    def __call__(self, ctx: StepContext) -> LossTerms:
        """See :meth:`unfed.objectives.base.Objective.__call__`."""
        return self._total(ctx, -ctx.nll("forget"))
