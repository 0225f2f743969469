"""Forget-data-only loss adjustment: an f-divergence between another answer and the forgotten one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from unfed.base.params import Hyperparameters, choice
from unfed.base.types import LossTerms, Split
from unfed.objectives.base import Needs, StepContext
from unfed.objectives.tokens import sum_by_example

Divergence = Literal["TV", "KL", "JS", "Pearson"]


def flat_loss(template: Tensor, forget: Tensor, divergence: Divergence) -> Tensor:
    """``f*(g(forget)) - g(template)`` of each pair, ``(B,)``: minus the divergence's variational form (Wang et al.
    2025, table 2). Both inputs are mean probabilities of an answer's tokens, in ``[0, 1]``, ``(B,)``.

    ``g``: tanh(v)/2 (total variation), v (KL, Pearson), log 2 - log(1 + exp(-v)) (Jensen-Shannon); ``f*(g(v))`` in the
    same order: tanh(v)/2, exp(v - 1), v + v^2/4, v + log(1 + exp(-v)) - log 2.
    """
    if divergence == "TV":
        return (forget.tanh() - template.tanh()) / 2
    if divergence == "KL":
        return (forget - 1).exp() - template
    if divergence == "Pearson":
        return forget + forget.square() / 4 - template
    return forget + F.softplus(-forget) + F.softplus(-template) - 2 * math.log(2)


@dataclass(frozen=True)
class FLAT(Hyperparameters):
    """FLAT, mean over examples (Wang et al. 2025, "LLM Unlearning via Loss Adjustment with Only Forget Data"): learns
    the alternate answer and unlearns the forget answer, without retain rows and without a reference policy.

    ``divergence`` is one of the paper's four; total variation is the default of its code. Departure: that code averages
    the probabilities over a batch (and over positions without a label) before ``f*`` and ``g``, which would make the
    loss depend on the batch's size; here both act on each pair, as the paper's expectation says.
    """

    divergence: Divergence = choice("TV", ("TV", "KL", "JS", "Pearson"))

    @property
    def needs(self) -> Needs:
        """Batches of two splits."""
        return Needs(frozenset({"forget", "alternate"}))

    def __call__(self, ctx: StepContext) -> LossTerms:
        """See :meth:`unfed.objectives.base.Objective.__call__`."""
        template, forget = _mean_probability(ctx, "alternate"), _mean_probability(ctx, "forget")
        loss = ctx.example_mean("forget", flat_loss(template, forget, self.divergence))
        return LossTerms(loss, {"forget": loss.detach()}, {"forget": loss})


def _mean_probability(ctx: StepContext, split: Split) -> Tensor:
    summed = sum_by_example(ctx.token_logps(split).exp(), ctx.label_mask(split))
    return summed / ctx.num_tokens(split).clamp(min=1).to(summed.device)
