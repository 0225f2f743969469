"""Who owns which example: decided once, written to ``partition.json``, read again by every later run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unfed.base.artifacts import digest_json, read_json, write_json
from unfed.base.errors import ArtifactError, DataError, nearest
from unfed.base.seeding import numpy_generator
from unfed.base.types import Example
from unfed.data.datasets import data_digest
from unfed.data.dealers import DEALERS, Dealt
from unfed.data.topics import Topic, default_topics, find_topics

AUTHOR_ROWS = 20
"""Rows of one person in TOFU, one after the other; used where the rows have no ``author``."""


@dataclass(frozen=True)
class PartitionSpec:
    """How to deal rows; the fields are those of ``partition`` in the configuration, and the target client.

    ``target``: client ``target_client_idx`` owns every forget row, and the other rows are dealt to all clients
    (the target too, unless ``target_shares`` is false) by ``rest``. ``iid``: equal shares at random. ``author``:
    whole people, equally many. ``topic``: whole topics, so that clients have about as many rows. ``dirichlet``: the
    rows of each person (``over``: ``author``) or topic (``topic``) spread over the clients by Dirichlet(``alpha``).
    ``quantity``: rows at random, client sizes from Dirichlet(``alpha``).

    ``topics``: how many (:func:`unfed.data.topics.find_topics`); ``None``: :func:`unfed.data.topics.default_topics`.
    """

    scheme: str = "target"
    rest: str = "iid"
    alpha: float = 0.5
    target_client_idx: int = 0
    target_shares: bool = True
    over: str = "author"
    topics: int | None = None

    @property
    def by_topic(self) -> bool:
        """Whether the rows, or those beside the target's, are dealt by topic."""
        scheme = self.rest if self.scheme == "target" else self.scheme
        return scheme == "topic" or (scheme == "dirichlet" and self.over == "topic")


@dataclass(frozen=True)
class Partition:
    """Clients and their examples: ``clients`` maps ``client_0``, ``client_1``, ... to example ids in data order.

    ``data_digest`` is :func:`unfed.data.datasets.data_digest` of the rows that were dealt. ``topics``: those that they
    were dealt by; empty where they were not.
    """

    clients: Mapping[str, tuple[str, ...]]
    scheme: str
    seed: int
    data_digest: str
    topics: tuple[Topic, ...] = ()

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
        topics = (*self.topics, *dealt.topics) if self.topics and dealt.topics else ()
        return Partition(clients, self.scheme, self.seed, digest_json([self.data_digest, dealt.data_digest]), topics)

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
            topics = tuple(Topic(str(t["words"]), tuple(map(str, t["ids"]))) for t in raw.get("topics", ()))
            partition = cls(clients, str(raw["scheme"]), int(raw["seed"]), str(raw["data_digest"]), topics)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise ArtifactError(f"{path} is not a partition manifest ({type(e).__name__}: {e})") from e
        if raw.get("digest") != digest_json(partition._body()):
            raise ArtifactError(f"{path} was altered after it was written: its digest does not match its content")
        ids = [i for rows in clients.values() for i in rows]
        if len(ids) != len(set(ids)) or not all(clients.values()) or not clients:
            raise ArtifactError(f"{path} deals a row twice, or has a client without rows")
        return partition

    def _body(self) -> dict[str, Any]:
        topics = [{"words": t.words, "ids": list(t.ids)} for t in self.topics]
        return {
            "format": "unfed-partition-1",
            "scheme": self.scheme,
            "seed": self.seed,
            "data_digest": self.data_digest,
            "clients": {c: list(ids) for c, ids in self.clients.items()},
            **({"topics": topics} if topics else {}),
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
    topics: tuple[Topic, ...] = ()
    if spec.by_topic:
        count = default_topics(len(ids), num_clients) if spec.topics is None else spec.topics
        topics = find_topics(examples, count, seed)
        topic = {i: n for n, t in enumerate(topics) for i in t.ids}
        groups = [topic[i] for i in ids]
    else:
        groups = people_of(examples)
    if spec.scheme == "target":
        dealt = _deal_target(ids, groups, num_clients, spec, set(forget_ids), rng)
    else:
        dealt = DEALERS[spec.scheme](list(range(len(ids))), groups, num_clients, spec.alpha, rng)
    clients = {f"client_{c}": tuple(ids[i] for i in sorted(rows)) for c, rows in enumerate(dealt)}
    return Partition(clients, spec.scheme, seed, data_digest(examples), topics)


def _check(ids: Sequence[str], num_clients: int, spec: PartitionSpec) -> None:
    if len(set(ids)) != len(ids):
        raise DataError("two examples have the same id; a partition needs ids that differ")
    if num_clients < 1:
        raise DataError(f"num_clients={num_clients}; at least one client is needed")
    if num_clients > len(ids):
        raise DataError(f"num_clients={num_clients} is more than the {len(ids)} examples there are to deal")
    for key, name, known in (
        ("scheme", spec.scheme, SCHEMES),
        ("rest", spec.rest, tuple(DEALERS)),
        ("over", spec.over, GROUPS),
    ):
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
    groups: Sequence[Any],
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
        shares = DEALERS[spec.rest](rest, groups, len(receivers), spec.alpha, rng) if rest else []
        for client, rows in zip(receivers, shares, strict=False):
            dealt[client] = rows
    dealt[target] = dealt[target] + [n for n, i in enumerate(ids) if i in forget]
    return dealt


SCHEMES = ("target", *DEALERS)
GROUPS = ("author", "topic")
"""What ``partition=dirichlet`` spreads over the clients (``partition.over``)."""
