"""Distillation of a teacher's whole distribution."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from unfed.base.params import Hyperparameters, number
from unfed.base.types import LossTerms
from unfed.objectives.base import Needs, StepContext
from unfed.objectives.tokens import kl_divergence


def distillation_loss(teacher_logits: Tensor, student_logits: Tensor, temperature: float) -> Tensor:
    """``tau^2 KL(softmax(teacher / tau) || softmax(student / tau))`` at each position (Hinton, Vinyals and Dean 2015,
    section 2): ``(N, V)`` twice to ``(N,)``, nats. The factor keeps the gradient's size as ``tau`` grows."""
    return kl_divergence(teacher_logits / temperature, student_logits / temperature) * temperature**2


@dataclass(frozen=True)
class Distill(Hyperparameters):
    """The reference policy taught to the model on split ``proxy``, mean over the answers' tokens.

    ``temperature`` 2 is our choice; Hinton et al. use 1 to 20. Departure: no cross-entropy with the labels is added,
    the plain rounds that follow have it.
    """

    temperature: float = number(2.0, above=0)

    @property
    def needs(self) -> Needs:
        """Batches of ``proxy``, and the reference's distribution on them."""
        return Needs(frozenset({"proxy"}), reference_distribution=True)

    def __call__(self, ctx: StepContext) -> LossTerms:
        """See :meth:`unfed.objectives.base.Objective.__call__`."""
        values = distillation_loss(ctx.reference_logits("proxy"), ctx.logits("proxy"), self.temperature)
        loss = values.sum() / ctx.count("proxy", "answer")
        return LossTerms(loss, {"distill": loss.detach()})
