"""HetLoRA's regulariser around any objective: a client's last rank components are made small, to be given up."""

from __future__ import annotations

from dataclasses import dataclass, replace

from unfed.base.params import Hyperparameters, number
from unfed.base.types import LossTerms
from unfed.objectives.base import Needs, Objective, StepContext


@dataclass(frozen=True)
class Pruning(Hyperparameters):
    """``inner + strength sum ||B[:, k:]||_F ||A[k:]||_F`` over the LoRA modules, ``k = gamma r`` of the client's rank
    ``r`` (Cho et al. 2024, arXiv 2401.06432; see :class:`unfed.aggregation.adapters.hetlora.HetLoRA`).

    Each micro-batch carries its share of the term, so that it counts once in an optimizer step.
    """

    inner: Objective
    gamma: float = number(0.99, above=0, at_most=1)
    strength: float = number(0.01, at_least=0)

    @property
    def name(self) -> str:
        """The inner objective's name, marked."""
        return f"{self.inner.name}+pruning"

    @property
    def needs(self) -> Needs:
        """As the inner objective, and the norm of the last components."""
        return replace(self.inner.needs, tail=self.gamma)

    def __call__(self, ctx: StepContext) -> LossTerms:
        """See :meth:`unfed.objectives.base.Objective.__call__`."""
        terms = self.inner(ctx)
        pruning = (self.strength * ctx.micro_share()) * ctx.tail_norm()
        parts = {**terms.parts, "pruning": pruning.detach()}
        return LossTerms(terms.total + pruning, parts, {**terms.terms, "pruning": pruning} if terms.terms else {})
