"""Where one call of the local loop lies within a longer run: in its learning-rate schedule, in its rows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """Where a call to :func:`train` lies in its learning-rate schedule: ``index`` of ``count`` equal calls."""

    index: int = 0
    count: int = 1

    def extent(self, steps: int) -> Extent:
        """The schedule's extent when every call takes so many steps."""
        return Extent(steps * self.count, steps * self.index)


@dataclass(frozen=True)
class Extent:
    """Optimizer steps of a learning-rate schedule: ``total``, and those taken ``before`` this call."""

    total: int
    before: int


@dataclass(frozen=True)
class Part:
    """Which share of one longer run over the rows a call to :func:`train` is: ``index`` of ``count``."""

    index: int = 0
    count: int = 1

    def steps(self, total: int) -> tuple[int, int]:
        """First step and the one after the last, of ``total``."""
        return total * self.index // self.count, total * (self.index + 1) // self.count
