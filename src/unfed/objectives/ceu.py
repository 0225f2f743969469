"""Cross-entropy unlearning."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from unfed.base.params import number, whole
from unfed.base.types import LossTerms
from unfed.objectives.base import Needs, StepContext
from unfed.objectives.retain import WithRetain
from unfed.objectives.tokens import at_least_float32, token_index


def ceu_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the model to its own distribution without the label: ``(N, V)`` and ``(N,)`` to ``(N,)``, in
    nats (Yang 2025). The target is constant: it carries no gradient."""
    logits = at_least_float32(logits)
    target = logits.detach().scatter(-1, labels.unsqueeze(-1), float("-inf")).softmax(dim=-1)
    return -(target * F.log_softmax(logits, dim=-1)).sum(dim=-1)


@dataclass(frozen=True)
class CEU(WithRetain):
    """CE-U on the forget answers, mean over the labelled tokens that count (Yang 2025, "CE-U: Cross Entropy
    Unlearning").

    The first ``ignore_first_n_answer_tokens`` of each answer do not count (a footnote of the paper; the default, 1, is
    the author's in OpenUnlearning). The paper has no retain term; ``alpha`` above 0 adds one.
    """

    alpha: float = number(0.0, at_least=0)
    ignore_first_n_answer_tokens: int = whole(1, at_least=0)

    @property
    def needs(self) -> Needs:
        """Batches of ``forget``, and of ``retain`` unless ``alpha`` is 0."""
        return self._needs(False)

    def __call__(self, ctx: StepContext) -> LossTerms:
        """See :meth:`unfed.objectives.base.Objective.__call__`."""
        skipped = self.ignore_first_n_answer_tokens
        counts = token_index(ctx.row("forget")) >= skipped
        losses = ceu_loss(ctx.logits("forget")[counts], ctx.labels("forget")[counts])
        return self._total(ctx, losses.sum() / ctx.count_after("forget", skipped))
