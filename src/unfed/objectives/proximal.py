"""FedProx's proximal term around any objective."""

from __future__ import annotations

from dataclasses import dataclass, replace

from unfed.base.params import Hyperparameters, number
from unfed.base.types import LossTerms
from unfed.objectives.base import Needs, Objective, StepContext


@dataclass(frozen=True)
class Proximal(Hyperparameters):
    """``inner + (mu/2) ||w - w_t||^2`` over the trainable parameters, ``w_t`` those that the round began with
    (Li et al. 2020, "Federated Optimization in Heterogeneous Networks", eq. 2).

    Each micro-batch carries its share of the term, so that it counts once in an optimizer step. At the first
    step of a round it is 0.
    """

    inner: Objective
    mu: float = number(0.01, at_least=0)

    @property
    def name(self) -> str:
        """The inner objective's name, marked."""
        return f"{self.inner.name}+proximal"

    @property
    def needs(self) -> Needs:
        """As the inner objective, and the weights that the round began with."""
        return replace(self.inner.needs, anchor=True)

    def __call__(self, ctx: StepContext) -> LossTerms:
        """See :meth:`unfed.objectives.base.Objective.__call__`."""
        terms = self.inner(ctx)
        proximal = (0.5 * self.mu * ctx.micro_share()) * ctx.adapter_distance_sq()
        parts = {**terms.parts, "proximal": proximal.detach()}
        return LossTerms(terms.total + proximal, parts, {**terms.terms, "proximal": proximal} if terms.terms else {})
