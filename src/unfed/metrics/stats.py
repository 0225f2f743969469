"""What one forward pass leaves behind for every metric, and what a metric is when it is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Score:
    """One metric's result, or the reason (``why``) that there is none.

    ``per_example`` holds one dictionary for each row, in the order of the rows; a row without a score has
    ``None`` in it. ``extra`` goes into the result file beside ``agg_value``. ``why`` may also stand beside a
    value, as a remark on it. ``higher_is_better`` is meant for a model that has been made to forget; ``None``
    where neither end is good in itself.
    """

    value: float | None
    per_example: tuple[Mapping[str, Any], ...] | None = None
    why: str | None = None
    higher_is_better: bool | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenStats:
    """Statistics of the labelled tokens of ``n`` answers, one flat array for each kind.

    Answer ``i`` owns the entries ``offsets[i]:offsets[i + 1]`` (``offsets``: int64, length ``n + 1``).
    ``logp``: log-probability of the label (nats). The others are ``None`` when nobody asked for them:
    ``is_argmax``: the label is the most probable token (the first one among equals); ``mean`` and ``var``: of
    the vocabulary's log-probabilities under the model's own distribution at that position
    (``sum_v p_v log p_v`` and its variance).
    """

    logp: Array
    offsets: Array
    example_ids: tuple[str, ...]
    is_argmax: Array | None = None
    mean: Array | None = None
    var: Array | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Array:
        """Labelled tokens of each answer (``L``; the end-of-sequence token counts), shape ``(n,)``."""
        return np.diff(self.offsets)

    def _keep(self, tokens: Array | slice, offsets: Array, ids: tuple[str, ...]) -> TokenStats:
        others = [None if a is None else a[tokens] for a in (self.is_argmax, self.mean, self.var)]
        return TokenStats(self.logp[tokens], offsets, ids, *others)

    def slice(self, start: int, stop: int) -> TokenStats:
        """The answers ``start`` to ``stop - 1``, as views."""
        first, last = int(self.offsets[start]), int(self.offsets[stop])
        return self._keep(slice(first, last), self.offsets[start : stop + 1] - first, self.example_ids[start:stop])

    def without_last(self) -> TokenStats:
        """Every answer without its very last token (``L' = L - 1``): what memorisation metrics look at."""
        keep = np.ones(len(self.logp), dtype=bool)
        keep[self.offsets[1:][self.lengths > 0] - 1] = False
        offsets = np.concatenate([[0], np.cumsum(np.maximum(self.lengths - 1, 0))])
        return self._keep(keep, offsets, self.example_ids)

    def per_token(self, values: Array) -> list[Array]:
        """Cut a flat array (one entry for each token) into one array for each answer."""
        return [values[a:b] for a, b in zip(self.offsets[:-1], self.offsets[1:], strict=True)]

    def means(self, values: Array) -> Array:
        """Mean over each answer's tokens in float64, shape ``(n,)``; NaN for an answer without tokens."""
        out = np.full(len(self), np.nan)
        full = self.lengths > 0
        if full.any():
            # Answers without tokens take no room, so the starts of the others delimit them exactly.
            sums = np.add.reduceat(values.astype(np.float64), self.offsets[:-1][full])
            out[full] = sums / self.lengths[full]
        return out


def number(value: float) -> float | None:
    """A float for a result file: ``None`` in place of NaN and infinity, which JSON cannot hold."""
    return float(value) if np.isfinite(value) else None


def from_rows(values: Array, per_row: Array | None = None, key: str = "score", why_none: str = "") -> Score:
    """A metric that is the mean of one number for each row.

    ``values`` ``(n,)`` are averaged; ``per_row`` (default: ``values``) is what the result file shows for each
    row under ``key``. Rows with NaN are left out of the mean and counted in ``why``; when every row is NaN
    there is no value. Infinite numbers count as NaN.
    """
    shown = values if per_row is None else per_row
    rows = tuple({key: number(v)} for v in shown)
    good = np.isfinite(values)
    if not len(values):
        return Score(None, rows, why="there are no rows")
    reason = why_none or "no labelled token, or a log-probability that is not finite"
    missing = int((~good).sum())
    why = f"{missing} of {len(values)} rows have no score: {reason}" if missing else None
    return Score(float(values[good].mean()) if good.any() else None, rows, why=why)


def as_rows(flat: Sequence[float] | Array, counts: Array) -> list[Array]:
    """Group a flat array of answers by row: ``counts[i]`` answers belong to row ``i``."""
    return np.split(np.asarray(flat, dtype=np.float64), np.cumsum(counts)[:-1])
