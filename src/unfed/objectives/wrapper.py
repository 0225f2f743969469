"""What goes around an objective: objectives with an ``inner`` one, and what is left of the innermost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from unfed.base.params import Hyperparameters
from unfed.base.types import LossTerms, Split
from unfed.objectives.base import Needs, Objective, StepContext
from unfed.objectives.retain import WithRetain


@dataclass(frozen=True)
class Wrapper(Hyperparameters):
    """An objective that is its ``inner`` one, made or used in another way.

    ``splits``: batches that the inner objective must ask for, for there is nothing to tell apart without them.
    ``own_gradient``: the training loop makes a step's gradient in another way than by one backward pass of the total.
    """

    splits: ClassVar[frozenset[Split]] = frozenset({"forget"})
    own_gradient: ClassVar[bool] = True

    inner: Objective

    @property
    def title(self) -> str:
        """The wrapper's published name."""
        return type(self).__name__

    @property
    def name(self) -> str:
        """The inner objective's name, marked."""
        return f"{self.inner.name}+{self.title}"

    @property
    def needs(self) -> Needs:
        """As the inner objective."""
        return self.inner.needs

    def __call__(self, ctx: StepContext) -> LossTerms:
        """See :meth:`unfed.objectives.base.Objective.__call__`."""
        return self.inner(ctx)


def layers(objective: Objective) -> Iterator[Objective]:
    """The objective, the one inside it, and so on to the innermost."""
    part: Any = objective
    while part is not None:
        yield part
        part = getattr(part, "inner", None)


def forget_alone(objective: Objective) -> Objective:
    """The innermost objective, without its retain term where it can do without: the same term ``forget``."""
    *_, innermost = layers(objective)
    return innermost.forget_alone() if isinstance(innermost, WithRetain) else innermost
