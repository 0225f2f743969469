"""Token-level arithmetic on logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def kl_divergence(reference_logits: Tensor, policy_logits: Tensor) -> Tensor:
    """KL(reference || policy) at each position, in nats: ``(..., V)`` twice to ``(...)``, at least float32."""
    reference = F.log_softmax(_at_least_float32(reference_logits), dim=-1)
    policy = F.log_softmax(_at_least_float32(policy_logits), dim=-1)
    return F.kl_div(policy, reference, reduction="none", log_target=True).sum(dim=-1)
