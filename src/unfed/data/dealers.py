"""The schemes that deal rows to clients, each a function of the rows, the group of each row, and a generator."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np

from unfed.base.errors import DataError

Dealt = list[list[int]]
"""Row numbers of each client."""

Dealer = Callable[[list[int], Sequence[Hashable], int, float, np.random.Generator], Dealt]
"""``(rows, groups, clients, alpha, rng)``: the numbers of the rows to deal; the group (a person, a topic) of every row
that there is, by its number; how many clients; a Dirichlet concentration; a generator. Each row goes to one client."""


def _iid(rows: list[int], groups: Sequence[Hashable], n: int, alpha: float, rng: np.random.Generator) -> Dealt:
    return [part.tolist() for part in np.array_split(rng.permutation(rows), n)]


def _author(rows: list[int], groups: Sequence[Hashable], n: int, alpha: float, rng: np.random.Generator) -> Dealt:
    people = _by_group(rows, groups)
    if len(people) < n:
        raise DataError(
            f"scheme 'author' keeps people together: {len(people)} people are too few for {n} clients; "
            "use fewer clients or scheme 'iid'"
        )
    return [[i for g in part for i in people[g]] for part in np.array_split(rng.permutation(len(people)), n)]


def _topic(rows: list[int], groups: Sequence[Hashable], n: int, alpha: float, rng: np.random.Generator) -> Dealt:
    """Whole topics, the longest first, each to the client that has the fewest rows so far (Graham 1969, "Bounds on
    multiprocessing timing anomalies"): two clients differ by the rows of the largest topic at most."""
    topics = _by_group(rows, groups)
    if len(topics) < n:
        raise DataError(
            f"scheme 'topic' keeps topics together: {len(topics)} topics are too few for {n} clients; "
            "use fewer clients, more of partition.topics, or partition=dirichlet partition.over=topic"
        )
    dealt: Dealt = [[] for _ in range(n)]
    for g in sorted(rng.permutation(len(topics)).tolist(), key=lambda g: -len(topics[g])):
        min(dealt, key=len).extend(topics[g])
    return [dealt[c] for c in rng.permutation(n)]  # the first client is not always the one with the largest topic


def _dirichlet(rows: list[int], groups: Sequence[Hashable], n: int, alpha: float, rng: np.random.Generator) -> Dealt:
    dealt: Dealt = [[] for _ in range(n)]
    for group in _by_group(rows, groups):
        owners = np.repeat(np.arange(n), rng.multinomial(len(group), _proportions(n, alpha, rng)))
        for i, owner in zip(rng.permutation(group).tolist(), owners, strict=True):
            dealt[owner].append(i)
    return _fill_empty(dealt)


def _quantity(rows: list[int], groups: Sequence[Hashable], n: int, alpha: float, rng: np.random.Generator) -> Dealt:
    ends = np.rint(np.cumsum(_proportions(n, alpha, rng)) * len(rows)).astype(int)[:-1]
    return _fill_empty([part.tolist() for part in np.split(rng.permutation(rows), ends)])


def _proportions(n: int, alpha: float, rng: np.random.Generator) -> np.ndarray:
    p = rng.dirichlet([alpha] * n)
    if np.isfinite(p).all() and p.sum() > 0:
        return p / p.sum()
    # All the gamma draws underflowed (alpha near 0): the limit is one client taken at random.
    return np.eye(n)[rng.integers(n)]


def _by_group(rows: list[int], groups: Sequence[Hashable]) -> list[list[int]]:
    found: dict[Hashable, list[int]] = {}
    for i in rows:
        found.setdefault(groups[i], []).append(i)
    return list(found.values())


def _fill_empty(dealt: Dealt) -> Dealt:
    """Give each client without rows one row of the largest client (a departure from the pure draw)."""
    for rows in dealt:
        if not rows:
            rows.append(max(dealt, key=len).pop())
    return dealt


DEALERS: Mapping[str, Dealer] = {
    "iid": _iid,
    "author": _author,
    "topic": _topic,
    "dirichlet": _dirichlet,
    "quantity": _quantity,
}
"""By the name that ``partition.scheme`` and ``partition.rest`` give them."""
