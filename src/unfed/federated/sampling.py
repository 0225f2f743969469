"""Which clients a round invites: drawn evenly, in proportion to size, or from those that a file says are there."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from unfed.base.errors import DataError, nearest

Kind = Literal["uniform", "by_size", "trace"]
Trace = Mapping[str, tuple[bool, ...]]
"""Whether a client can be asked, by client and round; after the last round it begins anew."""


@dataclass(frozen=True)
class Sampling:
    """How clients are drawn, always without replacement. ``sizes``: rows by client, for ``by_size``; ``trace``: for
    ``trace``, under which those that are there are drawn evenly."""

    kind: Kind = "uniform"
    sizes: Mapping[str, int] = field(default_factory=dict)
    trace: Trace = field(default_factory=dict)

    def there(self, clients: Sequence[str], round_: int) -> list[str]:
        """Those that can be asked in round ``round_`` (from 0)."""
        if self.kind != "trace":
            return list(clients)
        return [c for c in clients if self.trace[c][round_ % len(self.trace[c])]]

    def draw(self, clients: Sequence[str], size: int, rng: np.random.Generator) -> list[str]:
        """``size`` of ``clients``, which are as many at least."""
        if size == 0:
            return []
        if self.kind != "by_size":
            return [clients[int(i)] for i in rng.choice(len(clients), size=size, replace=False)]
        return by_size(clients, [self.sizes[c] for c in clients], size, rng)


def inclusion(sizes: Sequence[int], size: int) -> list[float]:
    """Probability of each client to be among ``size``: proportional to its size, and 1 for those that this would give
    more; what is left is shared out among the others in the same way."""
    found = [0.0] * len(sizes)
    rest, left = list(range(len(sizes))), size
    while rest:
        total = sum(sizes[i] for i in rest)
        sure = [i for i in rest if left * sizes[i] >= total]
        if not sure:
            for i in rest:
                found[i] = left * sizes[i] / total
            break
        for i in sure:
            found[i] = 1.0
        rest, left = [i for i in rest if i not in sure], left - len(sure)
    return found


def by_size(clients: Sequence[str], sizes: Sequence[int], size: int, rng: np.random.Generator) -> list[str]:
    """Systematic sampling (Madow 1949) of clients in a random order: each is in it with exactly the probability that
    :func:`inclusion` says, which drawing one after the other in proportion to size does not give."""
    order = rng.permutation(len(clients))
    probabilities = inclusion(sizes, size)
    ends = np.cumsum([probabilities[int(i)] for i in order])
    ends[-1] = size  # rounding must not lose the last one
    points = rng.random() + np.arange(size)
    return [clients[int(order[i])] for i in np.searchsorted(ends, points, side="right")]


def read_trace(path: Path, clients: Sequence[str]) -> Trace:
    """The availability of ``clients`` by round.

    JSON: ``{"client_0": [1, 0, 1], ...}``. CSV: a header, then a line for each client: its name, and 0 or 1 for each
    round. Raises ``DataError`` for a file that is something else, or that leaves a client out or names another.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        raw: Any = json.loads(text) if path.suffix.lower() == ".json" else _table(text)
    except (OSError, ValueError) as e:
        raise DataError(f"clients.availability={path}: cannot be read: {e}") from e
    if not isinstance(raw, dict):
        raise DataError(f"clients.availability={path}: should be an object of client -> 0 or 1 by round")
    trace = {str(c): _flags(path, str(c), row) for c, row in raw.items()}
    if unknown := [c for c in trace if c not in clients]:
        raise DataError(
            f"clients.availability={path}: {unknown[0]} is no client of the run{nearest(unknown[0], clients)}"
        )
    if lacking := [c for c in clients if c not in trace]:
        raise DataError(f"clients.availability={path}: says nothing of {', '.join(lacking[:5])}")
    return trace


def _table(text: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if row]
    return {row[0]: row[1:] for row in rows[1:]}


def _flags(path: Path, client: str, row: Any) -> tuple[bool, ...]:
    known = {"0": False, "1": True, "false": False, "true": True}
    cells = [str(cell).lower() for cell in row] if isinstance(row, list) else []
    wrong = [cell for cell in cells if cell not in known]
    if not cells or wrong:
        what = f"{wrong[0]!r} is neither 0 nor 1" if wrong else "has no round"
        raise DataError(f"clients.availability={path}: {client}: {what}")
    return tuple(known[cell] for cell in cells)
