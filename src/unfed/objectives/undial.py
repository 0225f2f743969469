"""Self-distillation from adjusted logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unfed.base.params import number
from unfed.base.types import IGNORE_INDEX, LossTerms
from unfed.objectives.base import Needs, StepContext
from unfed.objectives.retain import WithRetain
from unfed.objectives.tokens import at_least_float32


def undial_loss(policy_logits: Tensor, reference_logits: Tensor, labels: Tensor, beta: float) -> Tensor:
    """Cross-entropy of the policy to the reference whose logit of the label is lowered by ``beta`` (Dong et al.
    2025): logits ``(..., V)`` twice and labels ``(...)`` to ``(...)``, in nats.

    Its minimum is the entropy of that target, where the policy equals it.
    """
    lowered = torch.full_like(labels, -beta, dtype=torch.float32).to(reference_logits.device).unsqueeze(-1)
    target = at_least_float32(reference_logits)
    target = target.scatter_add(-1, labels.to(target.device).unsqueeze(-1), lowered.to(target.dtype)).softmax(dim=-1)
    return -(target * F.log_softmax(at_least_float32(policy_logits), dim=-1)).sum(dim=-1)


@dataclass(frozen=True)
class UNDIAL(WithRetain):
    """UNDIAL on the forget answers, mean over labelled tokens, plus an optional retain term (Dong et al. 2025,
    "UNDIAL: Self-Distillation with Adjusted Logits for Robust Unlearning in Large Language Models").

    ``beta`` is the strength of the adjustment. The defaults, ``beta`` 10 and ``alpha`` 0, are the authors' in
    OpenUnlearning. ``parity="openunlearning"`` averages over every
    position but the last, prompt and padding included, as the code there does: a position without a label then has
    the logit of token ``V - 100`` lowered, since its label, -100, is used as an index.
    """

    alpha: float = number(0.0, at_least=0)
    beta: float = number(10.0, above=0)

    @property
    def needs(self) -> Needs:
        """Batches of ``forget`` and the reference's whole distribution; ``retain`` unless ``alpha`` is 0."""
        return self._needs(False, reference_distribution=True)

    def __call__(self, ctx: StepContext) -> LossTerms:
        """See :meth:`unfed.objectives.base.Objective.__call__`."""
        if self.parity == "openunlearning":
            return self._total(ctx, self._everywhere(ctx))
        reference = ctx.reference_logits("forget")
        losses = undial_loss(ctx.logits("forget"), reference, ctx.labels("forget"), self.beta)
        return self._total(ctx, ctx.token_mean("forget", losses))

    def _everywhere(self, ctx: StepContext) -> Tensor:
        policy, reference = ctx.logits("forget", "all")[:, :-1], ctx.reference_logits("forget", "all")[:, :-1]
        labelled, labels = ctx.label_mask("forget")[:, 1:], ctx.labels("forget")
        nowhere = IGNORE_INDEX % policy.shape[-1]
        targets = torch.full(labelled.shape, nowhere, device=labelled.device).masked_scatter(labelled, labels)
        losses = undial_loss(policy, reference, targets, self.beta)
        return losses.sum() / max(1, ctx.count("forget", "all") - ctx.count("forget", "examples"))
