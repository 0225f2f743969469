"""Back from a full matrix to LoRA factors of a given rank, near given ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FULL_SVD = 512
"""Up to this smaller side the singular value decomposition is the full one."""
OVERSAMPLED, ITERATIONS = 10, 4
FLOOR = 0.1


def truncated_svd(matrix: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The leading ``U`` ``(m, q)``, ``S`` ``(q,)`` and ``V`` ``(n, q)`` of ``matrix`` ``(m, n)``, ``q <= rank``.

    Exact up to a smaller side of 512; beyond that a randomised range with 10 extra directions and 4 subspace iterations
    (Halko, Martinsson and Tropp 2011, Algorithms 4.4 and 5.1), drawn from ``generator``.
    """
    q = min(rank, *matrix.shape)
    if min(matrix.shape) <= max(FULL_SVD, rank + OVERSAMPLED):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :q], s[:q], vh[:q].T
    probe = torch.randn(matrix.shape[1], rank + OVERSAMPLED, generator=generator, dtype=matrix.dtype)
    basis, _ = torch.linalg.qr(matrix @ probe)
    for _ in range(ITERATIONS):
        other, _ = torch.linalg.qr(matrix.T @ basis)
        basis, _ = torch.linalg.qr(matrix @ other)
    u, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ u)[:, :q], s[:q], vh[:q].T


def near_factors(matrix: Tensor, a_like: Tensor, b_like: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``A`` ``(r, n)`` and ``B`` ``(m, r)`` whose product is the best approximation of ``matrix`` of rank ``r``.

    Of the many such pairs, one that training can go on from. ``A`` is ``a_like`` turned into the row space of the
    approximation (filled up with directions of ``a_like`` where that has a lower rank, so that no row of ``A`` dies),
    with the singular values that ``a_like`` has, of at least a tenth of their root mean square; ``B`` makes up for the
    rest. So ``A`` neither grows nor shrinks, ``B`` is at most ``10 sqrt(r) / ||a_like||_F`` times as long as the
    matrix, and of ``b_like a_like`` both factors come back as they were, where ``a_like`` is well-conditioned. An
    optimizer's steps have the length of the learning rate in either factor: a balance that drifts from round to round
    would end in divergence. Where ``a_like`` is zero (LoRA on embeddings begins so), ``A`` and ``B`` change places.
    """
    if not bool(a_like.any()) and bool(b_like.any()):
        b, a = near_factors(matrix.T, b_like.T, a_like.T, generator)
        return a.T, b.T
    rank, n = a_like.shape
    u, s, v = truncated_svd(matrix, rank, generator)
    kept = s > (s[0] if s.numel() else 0.0) * max(matrix.shape) * torch.finfo(matrix.dtype).eps
    u, s, v = u[:, kept], s[kept], v[:, kept]
    width = min(rank, n)
    basis = v
    if v.shape[1] < width:
        _, _, more = torch.linalg.svd(a_like - (a_like @ v) @ v.T, full_matrices=False)
        basis, _ = torch.linalg.qr(torch.cat([v, more[: width - v.shape[1]].T], dim=1))
    turn_u, inside, turn_vh = torch.linalg.svd(a_like @ basis, full_matrices=False)
    floor = FLOOR * float(a_like.norm()) / math.sqrt(width) or 1.0
    lengths = torch.linalg.svdvals(a_like)[: len(inside)].clamp(min=floor)
    a = (turn_u * lengths) @ turn_vh @ basis.T
    b = (u * s) @ (v.T @ basis) @ (turn_vh.T / lengths) @ turn_u.T  # u s v^T times the pseudo-inverse of A
    return a, b
