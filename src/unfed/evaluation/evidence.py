"""What the one pass over a model leaves behind, for every metric to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from unfed.base.errors import DataError
from unfed.base.types import Example
from unfed.evaluation.scoring import Column
from unfed.metrics.probability import avg_loss
from unfed.metrics.stats import Array, TokenStats


@dataclass(frozen=True)
class Answers:
    """The scored answers of one column.

    ``counts`` ``(rows,)`` says how many answers belong to each row; ``listed`` that the data holds a list
    there. ``cut`` counts the answers that ``max_length`` shortened; ``texts`` has what was left of them.
    ``reference`` and ``gradient_norms`` are there where they were asked for (and a reference model exists).
    """

    stats: TokenStats
    texts: tuple[str, ...]
    counts: Array
    listed: bool
    cut: int
    reference: TokenStats | None = None
    gradient_norms: Array | None = None

    @property
    def losses(self) -> Array:
        """``avg_loss`` of each answer, in the order of rows."""
        return avg_loss(self.stats)

    @property
    def losses_by_row(self) -> list[Array]:
        """``avg_loss`` of each row's answers."""
        return np.split(self.losses, np.cumsum(self.counts)[:-1])


@dataclass(frozen=True)
class Generations:
    """Prompts (as text) and generated answers of one split, in the order of rows.

    ``answers``: by column, what the generations are compared with; a text for each row, or a list of texts.
    ``under_base``: statistics of the generated text under the base model, where they were asked for.
    """

    prompts: tuple[str, ...]
    answers: Mapping[str, tuple[str | Sequence[str], ...]]
    texts: tuple[str, ...]
    under_base: TokenStats | None = None


@dataclass(frozen=True)
class Evidence:
    """All that the metrics look at. ``missing`` says why a column or a split's generations are not there."""

    answers: Mapping[Column, Answers]
    generations: Mapping[str, Generations]
    missing: Mapping[Column, str] = field(default_factory=dict)


def column_problem(rows: Sequence[Example], split: str, column: str) -> str | None:
    """Why a column cannot be scored: the split has no rows, or none of them has the column.

    Raises ``DataError`` when only some rows have it, or when one holds something else than text.
    """
    if not rows:
        return f"there are no rows for {split}"
    without = [i for i, row in enumerate(rows) if column not in row]
    if len(without) == len(rows):
        return f"the {split} rows have no column {column!r}"
    if without:
        raise DataError(f"{split}: row {without[0] + 1} has no column {column!r}, though other rows have it")
    listed = isinstance(rows[0][column], list)
    for i, row in enumerate(rows):
        value = row[column]
        texts = value if isinstance(value, list) else [value]
        if isinstance(value, list) != listed or not texts or not all(isinstance(t, str) for t in texts):
            kind = "a list of texts" if listed else "a text"
            raise DataError(f"{split}: row {i + 1} has no answer in {column!r}; it should be {kind}")
    return None
