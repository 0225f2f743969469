"""Primal-dual unlearning: flat logits on the forget set under a bound on the retain loss."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from unfed.base.params import choice, number, whole
from unfed.base.types import LossTerms
from unfed.objectives.base import Needs, Objective, StepContext
from unfed.objectives.retain import WithRetain


def flattening_loss(logits: Tensor) -> Tensor:
    """``(max_v z_v - mean_v z_v)^2`` of each position: logits ``(..., V)`` to ``(...)``, at least float32.

    It is 0 exactly where the distribution over the vocabulary is uniform, and needs no softmax.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (wide.amax(dim=-1) - wide.mean(dim=-1)).square()


@dataclass(frozen=True)
class PDU(WithRetain):
    """Minimise the flattening loss subject to ``retain <= retain_loss_eps`` (Entesari et al. 2025, "Constrained
    Entropic Unlearning: A Primal-Dual Framework for Large Language Models").

    A step descends ``gamma * forget + dual * (retain - retain_loss_eps)``, and then
    ``dual = max(0, dual + dual_step_size * (retain - retain_loss_eps))`` with the step's retain loss. ``dual`` begins
    with ``alpha`` in every client's round and goes through that client's steps, so nothing has to be kept from round to
    round and a resumed run goes on alike. During the first ``dual_warmup_epochs`` epochs (those of a phase, where
    its rounds share them) it stays. ``dual_update_upon=epoch``: once an epoch, with the mean of its steps' retain
    losses. ``retain_loss_eps`` should lie somewhat above the retain loss at the start.

    Defaults are those of the authors' TOFU runs but for the warm-up, which is 5 of 10 epochs there and none in their
    trainer. Departures from that trainer: the mean runs over the positions that predict an answer's tokens
    (``parity="openunlearning"``: over those that hold one, without the shift by one, as the code there has it since it
    left out prompts and padding), the dual moves once an optimizer step and not once a
    micro-batch, and an epoch's update needs no further pass over the rows.

    ``dual`` is the present multiplier (``None``: ``alpha``); without ``held`` the constraint is left out.
    """

    alpha: float = number(100.0, at_least=0)
    retain_loss_eps: float = number(0.3)
    dual_step_size: float = number(5.0, at_least=0)
    dual_update_upon: Literal["step", "epoch"] = choice("step", ("step", "epoch"))
    dual_warmup_epochs: int = whole(0, at_least=0)
    dual: float | None = None
    held: bool = True

    @property
    def needs(self) -> Needs:
        """Batches of ``forget`` and ``retain``."""
        if not self.held:
            return Needs(frozenset({"forget"}))
        return Needs(frozenset({"forget", "retain"}), reference_distribution=self.retain_loss_type == "KL")

    def forget_alone(self) -> Self:
        """The same objective without its constraint."""
        return replace(self, held=False)

    def __call__(self, ctx: StepContext) -> LossTerms:
        """See :meth:`unfed.objectives.base.Objective.__call__`."""
        forget = self._flattening(ctx)
        terms = {"forget": self.gamma * forget}
        if not self.held:
            return LossTerms(terms["forget"], {"forget": forget.detach()}, terms)
        retain = self._retain(ctx)
        dual = self.alpha if self.dual is None else self.dual
        terms["retain"] = dual * (retain - self.retain_loss_eps * ctx.micro_share())
        parts = {"forget": forget.detach(), "retain": retain.detach()}
        return LossTerms(terms["forget"] + terms["retain"], parts, terms)

    def _flattening(self, ctx: StepContext) -> Tensor:
        """The forget loss without its weight."""
        if self.parity is None:
            return flattening_loss(ctx.logits("forget", "answer")).sum() / ctx.count("forget", "answer")
        own = ctx.label_mask("forget")
        unpredicted = ctx.count("forget", "examples") if bool(own[:, 0].any()) else 0  # a whole text has a label there
        values = flattening_loss(ctx.logits("forget", "all")).masked_fill(~own, 0.0)
        return values.sum() / (ctx.count("forget", "answer") + unpredicted)


def with_dual(objective: Objective, dual: float) -> Objective:
    """The objective, whatever is around it, with another multiplier in its innermost part."""
    if isinstance(objective, PDU):
        return replace(objective, dual=dual)
    part: Any = objective
    return replace(part, inner=with_dual(part.inner, dual))
