"""Where one call of the local loop lies within a longer run: in its learning-rate schedule, in its rows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """Call number ``index`` of ``count`` to :func:`unfed.training.loop.Local.train` that make up one whole."""

    index: int = 0
    count: int = 1

    def extent(self, steps: int) -> Extent:
        """The whole's extent when every call takes so many steps."""
        return Extent(steps * self.count, steps * self.index)

    def steps(self, total: int) -> tuple[int, int]:
        """First step of this call and the one after its last, when all calls together take ``total``."""
        return total * self.index // self.count, total * (self.index + 1) // self.count


@dataclass(frozen=True)
class Extent:
    """Optimizer steps of a learning-rate schedule: ``total``, and those taken ``before`` this call."""

    total: int
    before: int
