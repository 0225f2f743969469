"""Token-level arithmetic on logits: the pure functions under every objective."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from unfed.base.types import IGNORE_INDEX


def labelled_positions(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the labelled tokens of ``labels`` ``(B, T)`` are predicted.

    Returns ``(rows, positions, targets)``, each ``(N,)`` int64 and ordered by row, then position:
    ``logits[rows, positions]`` predicts ``targets``. A label at position 0 has no prediction.
    """
    rows, positions = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
    return rows, positions, labels[rows, positions + 1]


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def target_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of ``targets`` ``(N,)`` under ``logits`` ``(N, V)``: ``(N,)``, at least float32."""
    return -F.cross_entropy(_at_least_float32(logits), targets, reduction="none")


def sum_by_row(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Sums of ``values`` ``(N,)`` over the entries of each row: ``(num_rows,)``; 0 for a row without any."""
    return values.new_zeros(num_rows).index_add(0, rows, values)


def kl_divergence(reference_logits: Tensor, policy_logits: Tensor) -> Tensor:
    """KL(reference || policy) at each position, in nats: ``(..., V)`` twice to ``(...)``, at least float32."""
    reference = F.log_softmax(_at_least_float32(reference_logits), dim=-1)
    policy = F.log_softmax(_at_least_float32(policy_logits), dim=-1)
    return F.kl_div(policy, reference, reduction="none", log_target=True).sum(dim=-1)
