"""Robust rules that work entry by entry: coordinate-wise median and trimmed mean (Yin et al. 2018).

``over=factors`` takes the entries of A and B, as the literature on federated LoRA does. ``over=effective`` (the
default) takes those of each module's effective step ``B_k A_k - B_0 A_0``: the entries of one module are formed at a
time, by blocks of rows over all clients, and what comes out is added to ``B_0 A_0`` and brought back to factors of the
adapter's rank by a truncated singular value decomposition, near the same statistic of the clients' factors. What that
loses is said, as ``truncation_error``: the Frobenius norm of what is lost over that of the robust step, all modules
together (1: nothing of the step is left).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unfed.aggregation.base import Weighted
from unfed.aggregation.geometry import Space
from unfed.aggregation.lora import scale_of
from unfed.aggregation.near_factors import near_factors
from unfed.aggregation.robust import Notes, RobustRule
from unfed.aggregation.tree import working_dtype
from unfed.base.params import number
from unfed.base.seeding import torch_generator
from unfed.base.types import AdapterState, ClientUpdate

BLOCK = 2**22
"""Entries that are sorted at once, over all clients."""


@dataclass(frozen=True)
class Entrywise(RobustRule):
    """One synthetic update out of a statistic of each entry over the clients. Unweighted."""

    def statistic(self, entries: Tensor) -> Tensor:
        """Of ``(n, ...)`` sorted along the first dimension; without it."""
        raise NotImplementedError

    def judge(self, space: Space, held: Sequence[Weighted], round_: int) -> tuple[list[Weighted], Notes]:
        """See :meth:`RobustRule.judge`. Notes: the truncation error, over effective steps."""
        adapters = [w.update.adapter for w in held]
        tensors = dict(adapters[0])  # buffers that are no numbers come from the first
        for name in space.plain:
            tensors[name] = self._over_entries([a[name] for a in adapters])
        lost = wanted = 0.0
        for module in space.pairs:
            generator = torch_generator(self.seed, "robust", round_, module)
            found, squares = self._over_module(space, adapters, module, generator)
            tensors |= found
            lost, wanted = lost + squares[0], wanted + squares[1]
        update = ClientUpdate(self.title, AdapterState(tensors), sum(w.update.num_examples for w in held))
        notes = {"truncation_error": math.sqrt(lost / wanted) if wanted > 0.0 else 0.0} if space.pairs else {}
        return [Weighted(update, 1.0)], notes

    def _over_entries(self, tensors: Sequence[Tensor]) -> Tensor:
        flat = [t.flatten().to(working_dtype(t.dtype)) for t in tensors]
        parts = [
            self.statistic(torch.stack([t[rows] for t in flat]).sort(dim=0).values)
            for rows in _blocks(flat[0].numel(), len(flat))
        ]
        return torch.cat(parts).view(tensors[0].shape).to(tensors[0].dtype) if parts else tensors[0]

    def _over_module(
        self, space: Space, adapters: Sequence[AdapterState], module: str, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], tuple[float, float]]:
        """The module's factors after the round; the squared norms of what is lost and of the robust step."""
        a_name, b_name = space.pairs[module]
        a_0, b_0 = (space.start[n].flatten(1).float() for n in (a_name, b_name))
        factors = [(u[a_name].flatten(1).float(), u[b_name].flatten(1).float()) for u in adapters]
        step = self._step(factors, a_0, b_0)
        if all(torch.equal(a, a_0) for a, _ in factors):  # A was held fixed: B alone may answer for the step
            a, b = a_0, b_0 + step @ torch.linalg.pinv(a_0)
        elif all(torch.equal(b, b_0) for _, b in factors):
            a, b = a_0 + torch.linalg.pinv(b_0) @ step, b_0
        else:
            like = [self._over_entries([f[k] for f in factors]) for k in (0, 1)]
            a, b = near_factors(b_0 @ a_0 + step, like[0], like[1], generator)
        scale = scale_of(space.scaling, module) ** 2
        wanted = scale * float(step.square().sum(dtype=torch.float64))
        lost = scale * float((b_0 @ a_0 + step - b @ a).square().sum(dtype=torch.float64))
        made = {n: t.reshape(space.start[n].shape).to(space.start[n].dtype) for n, t in ((a_name, a), (b_name, b))}
        return made, (lost, wanted)

    def _step(self, factors: Sequence[tuple[Tensor, Tensor]], a_0: Tensor, b_0: Tensor) -> Tensor:
        """The statistic of every entry of ``B_k A_k - B_0 A_0``, ``(m, n)``, float32."""
        steps = [(b - b_0, a, a - a_0) for a, b in factors]
        result = torch.empty(b_0.shape[0], a_0.shape[1])
        for rows in _blocks(b_0.shape[0], len(steps) * a_0.shape[1]):
            entries = torch.stack([d_b[rows] @ a + b_0[rows] @ d_a for d_b, a, d_a in steps])
            result[rows] = self.statistic(entries.sort(dim=0).values)
        return result


def _blocks(count: int, width: int) -> Iterator[slice]:
    size = max(1, BLOCK // max(1, width))
    return (slice(i, i + size) for i in range(0, count, size))


@dataclass(frozen=True)
class Median(Entrywise):
    """The median of each entry (Yin et al. 2018, Definition 1); of an even number the mean of the middle two."""

    title: ClassVar[str] = "median"

    def complaint(self, count: int) -> str | None:
        """Of two the median is the mean."""
        return None if count >= 3 else f"the median of {count} updates leaves nobody out; it needs 3"

    def statistic(self, entries: Tensor) -> Tensor:
        """The middle."""
        low, high = (len(entries) - 1) // 2, len(entries) // 2
        return entries[low] if low == high else (entries[low] + entries[high]) / 2


@dataclass(frozen=True)
class TrimmedMean(Entrywise):
    """Yin et al. 2018, Definition 2: the mean of each entry without its ``trim * n`` (rounded down) smallest and as
    many largest values. ``trim`` is the paper's beta, below 1/2 and at least the share of hostile clients; it has no
    default there, here it leaves out 1 of 5 and 2 of 10 at either end."""

    title: ClassVar[str] = "trimmed_mean"
    trim: float = number(0.2, above=0, below=0.5)

    def cut(self, count: int) -> int:
        """How many values are left out at either end; ``0.3 * 10`` is 3, whatever floating point makes of it."""
        return math.floor(self.trim * count + 1e-9)

    def complaint(self, count: int) -> str | None:
        """A trim that leaves nobody out defends against nobody."""
        if self.cut(count):
            return None
        if count < 3:
            return f"of {count} updates none can be left out at either end; it needs 3"
        return (
            f"trim={self.trim:g} of {count} updates leaves none out; take at least {math.ceil(1000 / count) / 1000:g}"
        )

    def statistic(self, entries: Tensor) -> Tensor:
        """The mean of what is left."""
        cut = self.cut(len(entries))
        return entries[cut : len(entries) - cut].mean(dim=0)
