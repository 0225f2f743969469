"""The inverted hinge loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unfed.base.types import LossTerms
from unfed.objectives.base import Needs, StepContext
from unfed.objectives.retain import WithRetain
from unfed.objectives.tokens import at_least_float32


def ihl_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """``1 + p_y - max over v != y of p_v`` of each token: ``(N, V)`` and ``(N,)`` to ``(N,)`` (Cha et al. 2025).

    Between 0 (all on one other token) and 2 (all on the label).
    """
    logits = at_least_float32(logits)
    norm = torch.logsumexp(logits, dim=-1)
    index = labels.unsqueeze(-1)
    label = logits.gather(-1, index).squeeze(-1)
    other = logits.scatter(-1, index, float("-inf")).amax(dim=-1)
    return 1 + (label - norm).exp() - (other - norm).exp()


@dataclass(frozen=True)
class IHL(WithRetain):
    """The inverted hinge loss on the forget answers, mean over labelled tokens, plus a retain term (Cha et al. 2025,
    "Towards Robust and Parameter-Efficient Knowledge Unlearning for LLMs"; LoKU's loss, without its Fisher-weighted
    initialisation of the adapter). Both terms have weight 1 as in the paper."""

    @property
    def needs(self) -> Needs:
        """Batches of ``forget``, and of ``retain`` unless ``alpha`` is 0."""
        return self._needs(False)

    def __call__(self, ctx: StepContext) -> LossTerms:
        """See :meth:`unfed.objectives.base.Objective.__call__`."""
        losses = ihl_loss(ctx.logits("forget"), ctx.labels("forget"))
        return self._total(ctx, ctx.token_mean("forget", losses))
