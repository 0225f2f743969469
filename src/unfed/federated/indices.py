"""Which entries of a vector a message holds, as arrays: positions where they are few, one bit a value where they are
many."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

OFFSETS, COUNTS, MASK = "offsets", "counts", "mask"
BLOCK = 1 << 16
"""Values that an offset of 16 bits reaches: offsets are counted in blocks of so many."""
Checked = Callable[[str, torch.dtype, int], Tensor]
"""An array of a message by name, dtype and size; ``ValueError``: it has no such array."""


def index_bytes(fraction: float) -> float:
    """Bytes for each value of the vector, of which a ``fraction`` is sent: the smaller of both ways."""
    return min(2.0 * fraction, 0.125)


def write_index(index: Tensor, total: int) -> dict[str, Tensor]:
    """``index``: rising positions below ``total``. ``offsets``: uint16, within a block, and ``counts``: int32, how many
    in each block; or ``mask``: uint8 ``(ceil(total / 8),)``, whose lowest bit is the first of eight values."""
    if len(index) * 16 <= total:
        counts = torch.bincount(index // BLOCK, minlength=math.ceil(total / BLOCK))
        return {OFFSETS: (index % BLOCK).to(torch.uint16), COUNTS: counts.to(torch.int32)}
    bits = torch.zeros(8 * math.ceil(total / 8), dtype=torch.uint8)
    bits[index] = 1
    return {MASK: (bits.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1).to(torch.uint8)}


def read_index(arrays: Mapping[str, Tensor], checked: Checked, total: int) -> Tensor:
    """The positions that :func:`write_index` wrote. ``ValueError``: the arrays do not fit a vector of ``total``."""
    if MASK in arrays:
        packed = checked(MASK, torch.uint8, math.ceil(total / 8))
        bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        index = bits.flatten().nonzero().flatten()
    else:
        counts = checked(COUNTS, torch.int32, math.ceil(total / BLOCK)).long()
        if bool((counts < 0).any()):
            raise ValueError(f"{COUNTS} has a number below 0")
        offsets = checked(OFFSETS, torch.uint16, int(counts.sum())).long()
        index = torch.repeat_interleave(torch.arange(len(counts)) * BLOCK, counts) + offsets
    if len(index) and int(index.max()) >= total:
        raise ValueError(f"{MASK if MASK in arrays else OFFSETS} points beyond the {total} values of the adapter")
    return index
