"""What a client keeps for itself from round to round: a factor of its own, a control variate, an error of the wire.

It is kept by round, so that a run which resumes at an earlier round finds what the client had then.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from urllib.parse import quote

from unfed.base.artifacts import read_tensors
from unfed.base.types import AdapterState
from unfed.federated.history import private_dir, write_private

CLIENTS_DIR = "clients"
_NAME = re.compile(r"round_(\d{5})\.safetensors")


def client_dir(client_id: str) -> str:
    """A client's directory below ``clients``: its name, with ``%XX`` for what a file's name may not hold."""
    name = quote(client_id, safe=" ")
    return "%2E" + name[1:] if name.startswith(".") else name


class ClientStore:
    """Adapters of clients by kind and round: in memory, or, with a directory, as files that their owner alone may read.

    ``keep``: entries of a client and kind that stay; a run that resumes goes back by one round less at most, or to the
    end of an ``every``-th round (``None``: to no other), so what the client had then stays as well. ``before``: what a
    client has of a kind (client, kind) before it has put anything.
    """

    def __init__(
        self,
        directory: Path | None = None,
        keep: int = 3,
        before: Callable[[str, str], AdapterState | None] = lambda client_id, kind: None,
        every: int | None = None,
    ) -> None:
        self._root = None if directory is None else directory / CLIENTS_DIR
        self._keep, self._every = max(2, keep), every
        self._before = before
        self._held: dict[tuple[str, str], dict[int, AdapterState]] = {}

    def get(self, client_id: str, kind: str, round_: int, since: int = 0) -> AdapterState | None:
        """The newest of a client and kind that was put before round ``round_`` began, and not before round ``since``;
        ``None`` where there is none.

        ``ArtifactError``: the file cannot be read.
        """
        entries = self._entries(client_id, kind)
        known = [n for n in entries if since <= n < round_]
        return entries[max(known)]() if known else self._before(client_id, kind)

    def put(self, client_id: str, kind: str, round_: int, state: AdapterState) -> None:
        """Keep ``state`` as what the client has after round ``round_`` (from 0); what is of later rounds is dropped."""
        if self._root is None:
            held = self._held.setdefault((client_id, kind), {})
            held[round_] = state
            for old in held.keys() - self._staying(held, round_):
                del held[old]
            return
        place = self._place(client_id, kind)
        private_dir(self._root)
        private_dir(place.parent)
        private_dir(place)
        write_private(place / f"round_{round_:05d}.safetensors", state)
        there = dict(self._files(place))
        for old in there.keys() - self._staying(there, round_):
            there[old].unlink(missing_ok=True)

    def _staying(self, rounds: Iterable[int], now: int) -> set[int]:
        """Of the rounds of entries, those that a run may still ask for after round ``now``."""
        known = sorted(n for n in rounds if n <= now)
        ends = range(self._every, now + 2, self._every) if self._every else ()
        before = [bisect_left(known, end) for end in ends]  # the newest entry that was there by then
        return {*known[-self._keep :], *(known[n - 1] for n in before if n)}

    def _place(self, client_id: str, kind: str) -> Path:
        assert self._root is not None
        return self._root / client_dir(client_id) / kind

    def _files(self, place: Path) -> Iterator[tuple[int, Path]]:
        for file in sorted(place.glob("round_*.safetensors")) if place.is_dir() else ():
            if match := _NAME.fullmatch(file.name):
                yield int(match[1]), file

    def _entries(self, client_id: str, kind: str) -> dict[int, Callable[[], AdapterState]]:
        if self._root is None:
            return {n: partial(_same, s) for n, s in self._held.get((client_id, kind), {}).items()}
        return {n: partial(read_tensors, f) for n, f in self._files(self._place(client_id, kind))}


class Carried(ClientStore):
    """What one client has for one task, where its store is on another machine: brought with the task, and taken back.

    ``taken``: what is to be taken back, by kind.
    """

    def __init__(self) -> None:
        super().__init__()
        self._brought: Mapping[str, AdapterState] = {}
        self.taken: dict[str, AdapterState] = {}

    def bring(self, kept: Mapping[str, AdapterState]) -> None:
        """What the next client has, by kind; nothing of the one before is left."""
        self._brought, self.taken = kept, {}

    def get(self, client_id: str, kind: str, round_: int, since: int = 0) -> AdapterState | None:
        """What was brought."""
        del client_id, round_, since
        return self._brought.get(kind)

    def put(self, client_id: str, kind: str, round_: int, state: AdapterState) -> None:
        """See :class:`Carried`."""
        del client_id, round_
        self.taken[kind] = state


def _same(state: AdapterState) -> AdapterState:
    return state
