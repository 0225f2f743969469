"""Sums of products ``sum_k L_k R_k`` without a matrix of their size: norms, and the fewest factors that give the same.

Everything goes through QR decompositions of the factors side by side, in float64: ``[L_1 L_2 ..] = Q S``,
``[R_1; R_2; ..]^T = P T``, so that the sum is ``Q (S T^T) P^T``, whose middle is small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CUT = 1e-7
"""Singular values below this share of the largest are dropped: less than float32 keeps of their sum."""


@dataclass(frozen=True)
class Products:
    """``sum_k L_k R_k`` as ``left`` ``(m, k)`` and ``right`` ``(k, n)``, float64."""

    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, pairs: Sequence[tuple[Tensor, Tensor]]) -> Products:
        """Of pairs ``(L_k, R_k)``."""
        return cls(
            torch.cat([left.double() for left, _ in pairs], dim=1), torch.cat([r.double() for _, r in pairs], dim=0)
        )

    def plus(self, other: Products, scale: float = 1.0) -> Products:
        """The sum with ``scale`` times another."""
        return Products(torch.cat([self.left, scale * other.left], 1), torch.cat([self.right, other.right], 0))

    def norm(self) -> float:
        """The Frobenius norm of the sum; what cancels in the sum costs rounding of the parts, not of their squares."""
        return float(torch.linalg.matrix_norm(self._core()[1]))

    def smallest(self, rank: int | None = None) -> Products:
        """The same matrix as ``(U sqrt(S), sqrt(S) V^T)`` of its own rank (of its best approximation of ``rank``)."""
        q, core, p = self._core()
        u, s, vt = torch.linalg.svd(core, full_matrices=False)
        kept = int((s > CUT * float(s.max())).sum()) if s.numel() and float(s.max()) > 0 else 0
        kept = max(1, kept if rank is None else min(kept, rank))
        root = s[:kept].sqrt()
        return Products((q @ u[:, :kept]) * root, root[:, None] * (vt[:kept] @ p.T))

    def _core(self) -> tuple[Tensor, Tensor, Tensor]:
        q, s = torch.linalg.qr(self.left)
        p, t = torch.linalg.qr(self.right.T)
        return q, s @ t.T, p
