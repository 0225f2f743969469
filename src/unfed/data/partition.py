"""Who owns which example: decided once, written to ``partition.json``, read again by every later run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unfed.base.artifacts import digest_json, read_json, write_json
from unfed.base.errors import ArtifactError, DataError, nearest
from unfed.base.seeding import numpy_generator
from unfed.base.types import Example
from unfed.data.datasets import data_digest

AUTHOR_ROWS = 20
"""Rows of one person in TOFU, one after the other; used where the rows have no ``author``."""

Dealt = list[list[int]]
"""Row numbers of each client."""


@dataclass(frozen=True)
class PartitionSpec:
    """How to deal rows; the fields are those of ``partition`` in the configuration, and the target client.

    ``target``: client ``target_client_idx`` owns every forget row, and the other rows are dealt to all clients
    (the target too, unless ``target_shares`` is false) by ``rest``. ``iid``: equal shares at random. ``author``:
    whole people, equally many. ``dirichlet``: each person's rows spread over the clients by Dirichlet(``alpha``).
    ``quantity``: rows at random, client sizes from Dirichlet(``alpha``).
    """

    scheme: str = "target"
    rest: str = "iid"
    alpha: float = 0.5
    target_client_idx: int = 0
    target_shares: bool = True


@dataclass(frozen=True)
class Partition:
    """Clients and their examples: ``clients`` maps ``client_0``, ``client_1``, ... to example ids in data order.

    ``data_digest`` is :func:`unfed.data.datasets.data_digest` of the rows that were dealt.
    """

    clients: Mapping[str, tuple[str, ...]]
    scheme: str
    seed: int
    data_digest: str

    @property
    def client_ids(self) -> tuple[str, ...]:
        """The clients' names in order of their number."""
        return tuple(self.clients)

    def owner(self, example_id: str) -> str | None:
        """The client that owns an example, or ``None``."""
        return next((c for c, ids in self.clients.items() if example_id in ids), None)

    def rows_of(self, client_id: str) -> tuple[str, ...]:
        """The ids of a client's examples."""
        if client_id not in self.clients:
            raise DataError(f"the partition has no client {client_id!r}{nearest(client_id, self.clients)}")
        return self.clients[client_id]

    def owners(self, example_ids: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Which of ``example_ids`` (forget rows, say) each client owns; clients that own none are left out.

        Raises ``DataError`` when an id belongs to nobody: that row was not in the fine-tuning data.
        """
        wanted = list(example_ids)
        home = {i: client for client, ids in self.clients.items() for i in ids}
        lost = [i for i in wanted if i not in home]
        if lost:
            raise DataError(
                f"{len(lost)} of {len(wanted)} rows belong to no client of the partition (the first: {lost[0]}); "
                "they were not among the rows that were dealt for fine-tuning"
            )
        found: dict[str, list[str]] = {}
        for i in wanted:
            found.setdefault(home[i], []).append(i)
        return {c: tuple(found[c]) for c in self.clients if c in found}

    def unknown(self, examples: Sequence[Example]) -> list[Example]:
        """The examples that belong to nobody yet."""
        known = {i for ids in self.clients.values() for i in ids}
        return [e for e in examples if e["id"] not in known]

    def extended(self, dealt: Partition) -> Partition:
        """Everybody keeps what they own, and gets their rows of ``dealt``, a partition of other rows."""
        clients = {c: (*ids, *dealt.clients[c]) for c, ids in self.clients.items()}
        return Partition(clients, self.scheme, self.seed, digest_json([self.data_digest, dealt.data_digest]))

    def write(self, path: Path | str) -> None:
        """Write the manifest, atomically."""
        body = self._body()
        write_json(path, {**body, "digest": digest_json(body)})

    @classmethod
    def read(cls, path: Path | str) -> Partition:
        """Read a manifest; ``ArtifactError`` when it is missing, malformed, altered, or deals a row twice."""
        raw = read_json(path)
        try:
            clients = {str(c): tuple(str(i) for i in ids) for c, ids in raw["clients"].items()}
            partition = cls(clients, str(raw["scheme"]), int(raw["seed"]), str(raw["data_digest"]))
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise ArtifactError(f"{path} is not a partition manifest ({type(e).__name__}: {e})") from e
        if raw.get("digest") != digest_json(partition._body()):
            raise ArtifactError(f"{path} was altered after it was written: its digest does not match its content")
        ids = [i for rows in clients.values() for i in rows]
        if len(ids) != len(set(ids)) or not all(clients.values()) or not clients:
            raise ArtifactError(f"{path} deals a row twice, or has a client without rows")
        return partition

    def _body(self) -> dict[str, Any]:
        return {
            "format": "unfed-partition-1",
            "scheme": self.scheme,
            "seed": self.seed,
            "data_digest": self.data_digest,
            "clients": {c: list(ids) for c, ids in self.clients.items()},
        }


def make_partition(
    examples: Sequence[Example],
    num_clients: int,
    spec: PartitionSpec = PartitionSpec(),
    forget_ids: Iterable[str] = (),
    seed: int = 0,
) -> Partition:
    """Deal every example to exactly one of ``num_clients`` clients, each of which gets at least one.

    ``forget_ids`` matter to the scheme ``target`` alone, which needs them. Depends on the arguments alone.
    """
    ids = [e["id"] for e in examples]
    _check(ids, num_clients, spec)
    rng = numpy_generator(seed, "partition", spec.scheme)
    people = people_of(examples)
    if spec.scheme == "target":
        dealt = _deal_target(ids, people, num_clients, spec, set(forget_ids), rng)
    else:
        dealt = DEALERS[spec.scheme](list(range(len(ids))), people, num_clients, spec.alpha, rng)
    clients = {f"client_{c}": tuple(ids[i] for i in sorted(rows)) for c, rows in enumerate(dealt)}
    return Partition(clients, spec.scheme, seed, data_digest(examples))


def _check(ids: Sequence[str], num_clients: int, spec: PartitionSpec) -> None:
    if len(set(ids)) != len(ids):
        raise DataError("two examples have the same id; a partition needs ids that differ")
    if num_clients < 1:
        raise DataError(f"num_clients={num_clients}; at least one client is needed")
    if num_clients > len(ids):
        raise DataError(f"num_clients={num_clients} is more than the {len(ids)} examples there are to deal")
    for key, name, known in (("scheme", spec.scheme, SCHEMES), ("rest", spec.rest, tuple(DEALERS))):
        if name not in known:
            raise DataError(f"partition.{key}={name!r} is unknown{nearest(name, known)}")
    if not spec.alpha > 0:
        raise DataError(f"partition.alpha={spec.alpha}; a Dirichlet concentration is above 0")
    if not 0 <= spec.target_client_idx < num_clients:
        raise DataError(
            f"target_client_idx={spec.target_client_idx} with num_clients={num_clients}: use 0 to {num_clients - 1}"
        )


def people_of(examples: Sequence[Example]) -> list[Any]:
    """Whose row each is: column ``author`` where every row has one, else blocks of 20 rows."""
    if all("author" in e for e in examples):
        return [e["author"] for e in examples]
    return [n // AUTHOR_ROWS for n in range(len(examples))]


def _deal_target(
    ids: Sequence[str],
    people: Sequence[Any],
    num_clients: int,
    spec: PartitionSpec,
    forget: set[str],
    rng: np.random.Generator,
) -> Dealt:
    if not forget:
        raise DataError("partition.scheme=target needs forget rows (data.forget), and there are none")
    absent = forget - set(ids)
    if absent:
        raise DataError(
            f"{len(absent)} of {len(forget)} forget rows are not among the {len(ids)} training rows; "
            "data.forget must be a part of data.train"
        )
    rest = [n for n, i in enumerate(ids) if i not in forget]
    if len(rest) < num_clients - 1:
        raise DataError(f"{len(rest)} rows beside the forget set are too few for {num_clients - 1} other clients")
    target = spec.target_client_idx
    others = [c for c in range(num_clients) if c != target]
    # With very few rows left, the target client has its forget rows and goes without a share.
    receivers = list(range(num_clients)) if spec.target_shares and len(rest) >= num_clients else others
    if rest and not receivers:
        raise DataError(
            f"partition.target_shares=false: {len(rest)} rows beside the forget set are left, and with num_clients=1 "
            "nobody to deal them to"
        )
    dealt: Dealt = [[] for _ in range(num_clients)]
    if receivers:
        shares = DEALERS[spec.rest](rest, people, len(receivers), spec.alpha, rng) if rest else []
        for client, rows in zip(receivers, shares, strict=False):
            dealt[client] = rows
    dealt[target] = dealt[target] + [n for n, i in enumerate(ids) if i in forget]
    return dealt


def _iid(rows: list[int], people: Sequence[Any], n: int, alpha: float, rng: np.random.Generator) -> Dealt:
    return [part.tolist() for part in np.array_split(rng.permutation(rows), n)]


def _author(rows: list[int], people: Sequence[Any], n: int, alpha: float, rng: np.random.Generator) -> Dealt:
    groups = _by_person(rows, people)
    if len(groups) < n:
        raise DataError(
            f"scheme 'author' keeps people together: {len(groups)} people are too few for {n} clients; "
            "use fewer clients or scheme 'iid'"
        )
    return [[i for g in part for i in groups[g]] for part in np.array_split(rng.permutation(len(groups)), n)]


def _dirichlet(rows: list[int], people: Sequence[Any], n: int, alpha: float, rng: np.random.Generator) -> Dealt:
    dealt: Dealt = [[] for _ in range(n)]
    for group in _by_person(rows, people):
        owners = np.repeat(np.arange(n), rng.multinomial(len(group), _proportions(n, alpha, rng)))
        for i, owner in zip(rng.permutation(group).tolist(), owners, strict=True):
            dealt[owner].append(i)
    return _fill_empty(dealt)


def _quantity(rows: list[int], people: Sequence[Any], n: int, alpha: float, rng: np.random.Generator) -> Dealt:
    ends = np.rint(np.cumsum(_proportions(n, alpha, rng)) * len(rows)).astype(int)[:-1]
    return _fill_empty([part.tolist() for part in np.split(rng.permutation(rows), ends)])


def _proportions(n: int, alpha: float, rng: np.random.Generator) -> np.ndarray:
    p = rng.dirichlet([alpha] * n)
    if np.isfinite(p).all() and p.sum() > 0:
        return p / p.sum()
    # All the gamma draws underflowed (alpha near 0): the limit is one client taken at random.
    return np.eye(n)[rng.integers(n)]


def _by_person(rows: list[int], people: Sequence[Any]) -> list[list[int]]:
    groups: dict[Any, list[int]] = {}
    for i in rows:
        groups.setdefault(people[i], []).append(i)
    return list(groups.values())


def _fill_empty(dealt: Dealt) -> Dealt:
    """Give each client without rows one row of the largest client (a departure from the pure draw)."""
    for rows in dealt:
        if not rows:
            rows.append(max(dealt, key=len).pop())
    return dealt


DEALERS: Mapping[str, Callable[[list[int], Sequence[Any], int, float, np.random.Generator], Dealt]] = {
    "iid": _iid,
    "author": _author,
    "dirichlet": _dirichlet,
    "quantity": _quantity,
}
SCHEMES = ("target", *DEALERS)
