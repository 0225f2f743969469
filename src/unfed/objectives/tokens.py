"""Token-level arithmetic: on logits, and between tokens and the examples that they belong to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """16-bit values in float32, others as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def token_index(rows: Tensor) -> Tensor:
    """Which of its example's labelled tokens each entry is, from 0: ``(N,)`` to ``(N,)``, int64.

    ``rows`` holds the example of each token, in ascending order (``StepContext.row``).
    """
    counts = torch.bincount(rows)
    starts = counts.cumsum(0) - counts
    return torch.arange(len(rows), device=rows.device) - starts[rows]


def sum_by_example(values: Tensor, label_mask: Tensor) -> Tensor:
    """Sum values ``(N,)`` of the labelled tokens by example: ``(B,)``, in a fixed order of addition.

    ``label_mask`` ``(B, T)`` is ``StepContext.label_mask``; a label at the first position has no value.
    """
    mask = label_mask[:, 1:].to(values.device)
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values).sum(dim=1)


def kl_divergence(reference_logits: Tensor, policy_logits: Tensor) -> Tensor:
    """KL(reference || policy) at each position, in nats: ``(..., V)`` twice to ``(...)``, at least float32."""
    reference = F.log_softmax(at_least_float32(reference_logits), dim=-1)
    policy = F.log_softmax(at_least_float32(policy_logits), dim=-1)
    return F.kl_div(policy, reference, reduction="none", log_target=True).sum(dim=-1)
