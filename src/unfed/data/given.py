"""A partition that the user brings: a manifest of an earlier run, or a plain file of client -> rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unfed.base.artifacts import read_json
from unfed.base.errors import DataError
from unfed.base.types import Example
from unfed.data.datasets import data_digest
from unfed.data.partition import Partition


def read_given(path: Path | str, examples: Sequence[Example], *, numbers: bool = True) -> Partition:
    """Read ``partition.manifest``: a ``partition.json`` as it is (:meth:`Partition.read`), or a JSON object
    ``{"name of a client": [rows], ...}`` in the order of the clients' numbers.

    A row of a plain file is an id, as ``partition.json`` has them, or a number: the place of the row among
    ``examples``, from 0 (``numbers``: whether their order is the one that the file was made for). Raises ``DataError``
    for a number beyond the rows, an id of none of them, a row that is dealt twice or not at all, and a client without
    rows; ``ArtifactError`` when a file cannot be read, is of another form, or a manifest was altered.
    """
    raw = read_json(path)
    if not is_plain(raw):
        return Partition.read(path)
    ids = [e["id"] for e in examples]
    known, dealt, clients = set(ids), {}, {}
    for client, rows in raw.items():
        if not numbers and any(isinstance(row, int) for row in rows):
            raise DataError(
                f"{path}: {client}: row numbers are those of a fine-tuning's data, and this run has other rows; give "
                "the partition.json that the fine-tuning wrote"
            )
        own = [_id(f"{path}: {client}", row, ids, known) for row in rows]
        for i, row in zip(own, rows, strict=True):
            if i in dealt:
                raise DataError(f"{path}: {client}: row {row} belongs to {dealt[i]} already; each row has one owner")
            dealt[i] = client
        if not own:
            raise DataError(f"{path}: {client} has no rows; leave it out")
        clients[client] = tuple(i for i in ids if dealt.get(i) == client)
    left = [n for n, i in enumerate(ids) if i not in dealt]
    if left:
        raise DataError(f"{path}: {len(left)} of {len(ids)} rows belong to no client (the first: {left[0]})")
    return Partition(clients, "file", 0, data_digest(examples))


def clients_of(path: Path | str) -> tuple[str, ...]:
    """The clients that a given file names. Errors as those of :func:`read_given` that show without the rows."""
    raw = read_json(path)
    return tuple(raw) if is_plain(raw) else Partition.read(path).client_ids


def is_plain(raw: Any) -> bool:
    """Whether this is a plain file's content: every value a list, and at least one."""
    return isinstance(raw, Mapping) and bool(raw) and all(isinstance(v, list) for v in raw.values())


def _id(place: str, row: Any, ids: Sequence[str], known: set[str]) -> str:
    if isinstance(row, str) and row in known:
        return row
    if isinstance(row, int) and not isinstance(row, bool) and 0 <= row < len(ids):
        return ids[row]
    raise DataError(
        f"{place}: {row!r} is no row: use numbers from 0 to {len(ids) - 1}, in the order of the data, or ids as in "
        "partition.json"
    )
