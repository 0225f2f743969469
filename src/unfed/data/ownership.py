"""Who owns how many rows of which group (person or topic), and how far that is from equal shares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.spatial.distance import jensenshannon

from unfed.base.artifacts import read_sealed, write_sealed
from unfed.base.errors import ArtifactError
from unfed.base.types import Example
from unfed.data.partition import Partition, people_of

OWNERSHIP_FILE = "ownership.json"
"""What a run directory says of its clients' rows by group."""


@dataclass(frozen=True)
class Heterogeneity:
    """How unlike the clients of a partition are.

    ``distance`` is the mean over clients c of ``JSD(p_c, q)``: ``p_c[g]`` is the share of group g in the rows of client
    c, ``q[g]`` its share in all rows, and ``JSD(p, q) = sqrt((KL(p || m) + KL(q || m)) / 2)`` with ``m = (p + q) / 2``
    and logarithms to base 2 (Endres and Schindelin 2003, "A new metric for probability distributions"). Every client
    counts once, whatever its size; clients without rows are left out. 0: each has the groups in the same shares; 1 is
    approached when each has groups of its own that are few among all.

    ``size_variation`` is the coefficient of variation of the clients' row counts: standard deviation (of all clients,
    divided by their number) over mean. 0: equal sizes.
    """

    by: str
    clients: int
    groups: int
    distance: float
    size_variation: float

    def line(self) -> str:
        """In one sentence."""
        what = self.by if self.groups == 1 else f"{self.by}s"
        return (
            f"heterogeneity: Jensen-Shannon distance {self.distance:.2f} of a client from the whole over {self.groups} "
            f"{what} (0 alike, 1 nothing in common); sizes vary by {self.size_variation:.0%} of their mean"
        )


@dataclass(frozen=True)
class Ownership:
    """Rows by client and group.

    ``by``: ``author`` or ``topic``; ``groups``: their names; ``counts``: client -> rows of each group, in that order;
    ``forget``: client -> how many of its rows are to be forgotten (clients with none may be left out).
    """

    by: str
    groups: tuple[str, ...]
    counts: Mapping[str, tuple[int, ...]]
    forget: Mapping[str, int]

    @property
    def table(self) -> np.ndarray:
        """Rows by client and group, of shape ``(clients, groups)``."""
        return np.array(list(self.counts.values()), dtype=np.int64).reshape(len(self.counts), len(self.groups))

    @property
    def sizes(self) -> dict[str, int]:
        """Rows of each client."""
        return {c: sum(n) for c, n in self.counts.items()}

    @property
    def distances(self) -> dict[str, float]:
        """Jensen-Shannon distance of each client that has rows to the whole; see :class:`Heterogeneity`."""
        table = self.table
        whole = table.sum(axis=0)
        found = {c: jensenshannon(own, whole, base=2) for c, own in zip(self.counts, table, strict=True) if own.any()}
        # Rounding can make the divergence of equal distributions negative by 1e-17, and its root NaN.
        return {c: 0.0 if np.isnan(d) else float(d) for c, d in found.items()}

    @property
    def heterogeneity(self) -> Heterogeneity:
        """In two numbers."""
        distances, sizes = list(self.distances.values()), np.array(list(self.sizes.values()), dtype=np.float64)
        return Heterogeneity(
            self.by,
            len(self.counts),
            len(self.groups),
            float(np.mean(distances)) if distances else 0.0,
            float(sizes.std() / sizes.mean()) if sizes.any() else 0.0,
        )

    def write(self, path: Path | str) -> None:
        """Write it as JSON, atomically; of a client only the groups that it has rows of, by their number."""
        own = {c: {str(g): n for g, n in enumerate(counts) if n} for c, counts in self.counts.items()}
        body = {"format": "unfed-ownership-1", "by": self.by, "groups": list(self.groups)}
        write_sealed(path, {**body, "clients": own, "forget": dict(self.forget)})

    @classmethod
    def read(cls, path: Path | str) -> Ownership:
        """Read what :meth:`write` wrote; ``ArtifactError`` when it is missing, malformed or altered."""
        raw = read_sealed(path)
        try:
            groups = tuple(str(g) for g in raw["groups"])
            counts = {}
            for client, own in raw["clients"].items():
                row = [0] * len(groups)
                for g, n in own.items():
                    row[int(g)] = int(n)
                counts[str(client)] = tuple(row)
            forget = {str(c): int(n) for c, n in raw["forget"].items()}
            return cls(str(raw["by"]), groups, counts, forget)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
            raise ArtifactError(f"{path} is not a table of who owns what ({type(e).__name__}: {e})") from e


def ownership_of(partition: Partition, examples: Sequence[Example], forget_ids: Iterable[str] = ()) -> Ownership:
    """Count the rows of each client by topic, where the rows were dealt by topic, else by author
    (:func:`unfed.data.partition.people_of`). Examples that belong to nobody are not counted."""
    home = {i: c for c, ids in partition.clients.items() for i in ids}
    names, group = _groups(partition, examples)
    width = len(names)
    counts = {c: [0] * width for c in partition.clients}
    for example, g in zip(examples, group, strict=True):
        if (owner := home.get(example["id"])) is not None:
            counts[owner][g] += 1
    forget = Counter(home[i] for i in forget_ids if i in home)
    by = "topic" if partition.topics else "author"
    return Ownership(by, names, {c: tuple(n) for c, n in counts.items()}, dict(forget))


def _groups(partition: Partition, examples: Sequence[Example]) -> tuple[tuple[str, ...], list[int]]:
    """The groups' names, and the number of each example's group."""
    if partition.topics:
        topic = {i: n for n, t in enumerate(partition.topics) for i in t.ids}
        names = [t.words for t in partition.topics]
        strange = [e for e in examples if e["id"] not in topic]
        return (*names, *(["no topic"] if strange else [])), [topic.get(e["id"], len(names)) for e in examples]
    people = people_of(examples)
    number = {p: n for n, p in enumerate(dict.fromkeys(people))}
    named = all("author" in e for e in examples)
    return tuple(str(p) if named else f"author {p + 1}" for p in number), [number[p] for p in people]
