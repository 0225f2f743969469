"""Elastic weight consolidation around an unlearning objective."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from unfed.base.params import number, whole
from unfed.base.types import LossTerms
from unfed.objectives.base import Needs, StepContext
from unfed.objectives.wrapper import Wrapper


@dataclass(frozen=True)
class EWC(Wrapper):
    """``inner + (ewc_lambda / 2) * sum_i F_i (w_i - w*_i)^2`` over the trained weights (Kirkpatrick et al. 2017,
    "Overcoming catastrophic forgetting in neural networks", eq. 3).

    ``w*`` are the weights that unlearning starts from, ``F`` the diagonal of the empirical Fisher information there:
    the mean over ``fisher_rows`` of the client's retain rows of the squared gradient of a row's log-likelihood (the sum
    over its answer's tokens). Each client has its own. With GradAscent this is the idea of SGA-EWC (Wu et al. 2022),
    which ascends on aggregated gradients instead.

    Departures: the rows' own answers stand for labels drawn from the model; of more rows than ``fisher_rows``, so many
    are drawn, from the run's seed. An adapter's entries are few and its log-likelihoods' gradients large, so the
    published weights of hundreds do not carry over; the default of 1 is a start.
    """

    own_gradient: ClassVar[bool] = False

    ewc_lambda: float = number(1.0, at_least=0)
    fisher_rows: int = whole(64, at_least=1)

    @property
    def needs(self) -> Needs:
        """As the inner objective, and the Fisher information of so many rows."""
        return replace(self.inner.needs, fisher_rows=self.fisher_rows)

    def __call__(self, ctx: StepContext) -> LossTerms:
        """See :meth:`unfed.objectives.base.Objective.__call__`. Each micro-batch carries its share of the penalty."""
        terms = self.inner(ctx)
        penalty = (0.5 * self.ewc_lambda * ctx.micro_share()) * ctx.fisher_distance_sq()
        parts = {**terms.parts, "ewc": penalty.detach()}
        return LossTerms(terms.total + penalty, parts, {**terms.terms, "ewc": penalty} if terms.terms else {})
