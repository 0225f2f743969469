"""The retain term that most methods have in common."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from unfed.base.params import Hyperparameters, choice, number
from unfed.base.types import LossTerms, Split
from unfed.objectives.base import Needs, Parity, RetainLoss, StepContext


def retain_loss(ctx: StepContext, kind: RetainLoss, parity: Parity | None = None) -> Tensor:
    """The loss on split ``retain``, a scalar: cross-entropy, or KL(reference || policy).

    KL is averaged over the answers' tokens; with ``parity="openunlearning"`` over all positions of the
    padded batch as OpenUnlearning does, which makes it depend on the prompts' length and on the padding.
    """
    if kind == "NLL":
        return ctx.nll("retain")
    return ctx.kl("retain", "all" if parity == "openunlearning" else "answer")


@dataclass(frozen=True)
class WithRetain(Hyperparameters):
    """``gamma * forget + alpha * retain``: the weights of both terms and the kind of the second.

    With ``alpha = 0`` no retain batch is asked for. ``parity`` acts on ``retain_loss_type="KL"``, see
    :func:`retain_loss`, and on nothing else where a method does not say so.
    """

    gamma: float = number(1.0, above=0)
    alpha: float = number(1.0, at_least=0)
    retain_loss_type: RetainLoss = choice("NLL", ("NLL", "KL"))
    parity: Parity | None = choice(None, ("openunlearning", None))

    def forget_alone(self) -> Self:
        """The same objective without its retain term."""
        return self if self.alpha == 0 else replace(self, alpha=0.0)

    def _needs(
        self, reference: bool, splits: tuple[Split, ...] = ("forget",), *, reference_distribution: bool = False
    ) -> Needs:
        """``splits`` and what they need; with ``alpha`` above 0 the retain term's besides."""
        if self.alpha == 0:
            return Needs(frozenset(splits), reference, reference_distribution)
        distribution = reference_distribution or self.retain_loss_type == "KL"
        return Needs(frozenset({*splits, "retain"}), reference, distribution)

    def _total(self, ctx: StepContext, forget: Tensor) -> LossTerms:
        """Join the forget term with the retain term; the parts are logged without their weights."""
        terms = {"forget": self.gamma * forget}
        if self.alpha == 0:
            return LossTerms(terms["forget"], {"forget": forget.detach()}, terms)
        retain = self._retain(ctx)
        terms["retain"] = self.alpha * retain
        total = terms["forget"] + terms["retain"]
        return LossTerms(total, {"forget": forget.detach(), "retain": retain.detach()}, terms)

    def _retain(self, ctx: StepContext) -> Tensor:
        """The retain loss without its weight."""
        return retain_loss(ctx, self.retain_loss_type, self.parity)
