"""What a training has kept so that clients can be forgotten later: whole rounds, single updates, or sums of updates.

All of it is personal data: updates can be inverted to parts of the rows that they were made from. So nothing is kept
unless it was asked for, directories have mode 0700 and files 0600, and it is to be deleted with the data.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from unfed.base.artifacts import (
    atomic_dir,
    digest_file,
    read_json,
    read_sealed,
    read_tensors,
    write_sealed,
    write_tensors,
)
from unfed.base.errors import ArtifactError, WriteError
from unfed.base.types import AdapterState, ServerState
from unfed.federated.checkpoint import RESIDUAL_FILE

HistoryKind = Literal["rounds", "updates", "sums"]
HISTORY_KINDS: tuple[HistoryKind, ...] = ("rounds", "updates", "sums")
HISTORY_DIR = "history"
START_FILE = "start.safetensors"
KEPT_SUMS = 3
"""Rounds whose sums stay: a resumed run may go on from a round before the last."""

_ROUND = re.compile(r"round_(\d{5})")


@dataclass(frozen=True)
class HistorySettings:
    """``rounds``: the server's state before the first round and after each (rollback). ``updates``: every client's
    update in each ``every``-th round, the first one included (FedEraser, PGA). ``sums``: of every client the running
    sum of its share in the global adapter, and of what the others' updates alone would have made (subtraction)."""

    keep: tuple[HistoryKind, ...] = ()
    every: int = 1

    def due(self, round_: int) -> bool:
        """Whether the updates of round ``round_`` (from 0) are kept."""
        return "updates" in self.keep and round_ % self.every == 0

    def nbytes(self, clients: int, rounds: int, adapter: AdapterState, slots: int) -> int:
        """Bytes on disk at the end, with all clients in every round; ``slots`` are those of the server's optimizer."""
        wide = sum(t.numel() * 4 for t in adapter.values())
        size = adapter.nbytes if self.keep else 0
        if "rounds" in self.keep:
            size += (rounds + 1) * (adapter.nbytes + slots * wide)
        if "updates" in self.keep:
            size += -(-rounds // self.every) * clients * wide
        if "sums" in self.keep:
            size += min(rounds, KEPT_SUMS) * 2 * clients * wide
        return size


@dataclass(frozen=True)
class Kept:
    """One client's update of a round: ``delta`` from the adapter that the round began with, and its example count."""

    delta: AdapterState
    num_examples: int


@dataclass(frozen=True)
class Sums:
    """``own``: a client's share of every round's step, added up. ``others``: the steps that the mean of the other
    clients' updates would have made in the same rounds, added up. Both in float32."""

    own: AdapterState
    others: AdapterState


class History:
    """What a run directory has kept. Every file is checked against its digest when it is read (``ArtifactError``)."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._root = directory / HISTORY_DIR

    @property
    def settings(self) -> HistorySettings:
        """What was kept; empty where nothing was."""
        file = self._root / "history.json"
        if not file.is_file():
            return HistorySettings()
        try:
            found = read_json(file)
            keep: tuple[HistoryKind, ...] = tuple(k for k in HISTORY_KINDS if k in found["keep"])
            return HistorySettings(keep, int(found["every"]))
        except (KeyError, TypeError, ValueError) as e:
            raise ArtifactError(f"{file} cannot be read as a history ({e})") from e

    def start(self) -> AdapterState:
        """The adapter before the first round."""
        return _read(self._root, {"files": {START_FILE: self.start_digest()}}, START_FILE)

    def start_digest(self) -> str | None:
        """Digest of the file that holds it, as it was written; ``None`` where nothing was."""
        file = self._root / "history.json"
        found = read_json(file) if file.is_file() else {}
        return found.get("start") if isinstance(found, dict) else None

    def rounds(self) -> list[int]:
        """Numbers of finished rounds after which a state is kept; 0 is before the first."""
        return [n for n, _ in numbered(self._root / "rounds")]

    def state(self, number: int) -> ServerState:
        """The server's state after ``number`` rounds."""
        place = self._root / "rounds" / _name(number)
        manifest = _manifest(place)
        opt_state = {str(s): _read(place, manifest, f"opt_{s}.safetensors") for s in manifest["slots"]}
        kept = RESIDUAL_FILE in manifest["files"]
        residual = _read(place, manifest, RESIDUAL_FILE) if kept else None
        return ServerState(number, _read(place, manifest, "adapter.safetensors"), opt_state, residual)

    def update_rounds(self) -> list[int]:
        """Rounds (from 0) of which the clients' updates are kept."""
        return [n for n, _ in numbered(self._root / "updates")]

    def examples(self, number: int) -> dict[str, int]:
        """Who took part in round ``number`` (from 0) with a kept update, and on how many examples; reads no tensor."""
        return {c: int(n) for c, n in _manifest(self._root / "updates" / _name(number))["num_examples"].items()}

    def updates(self, number: int) -> Iterator[tuple[str, Kept]]:
        """The clients' updates of round ``number`` (from 0), one by one."""
        place = self._root / "updates" / _name(number)
        manifest = _manifest(place)
        for index, (client, examples) in enumerate(manifest["num_examples"].items()):
            yield client, Kept(_read(place, manifest, file_name(index)), int(examples))

    def update_of(self, number: int, client_id: str) -> Kept | None:
        """One client's update of a round, if it took part."""
        place = self._root / "updates" / _name(number)
        manifest = _manifest(place)
        examples: dict[str, int] = manifest["num_examples"]
        if client_id not in examples:
            return None
        return Kept(_read(place, manifest, file_name(list(examples).index(client_id))), examples[client_id])

    def summed_clients(self) -> list[str]:
        """Clients that have sums."""
        found = numbered(self._root / "sums")
        return list(_manifest(found[-1][1])["clients"]) if found else []

    def sum_rounds(self) -> list[int]:
        """Numbers of finished rounds after which sums are kept."""
        return [n for n, _ in numbered(self._root / "sums")]

    def sums(self, client_id: str) -> Sums:
        """A client's sums after the last round. ``ArtifactError`` when it has none."""
        clients = self.summed_clients()
        if client_id not in clients:
            raise ArtifactError(f"{self._root / 'sums'}: nothing is kept of {client_id}")
        place, file = numbered(self._root / "sums")[-1][1], file_name(clients.index(client_id))
        manifest = _manifest(place)
        return Sums(_read(place, manifest, f"own_{file}"), _read(place, manifest, f"others_{file}"))


def _name(number: int) -> str:
    return f"round_{number:05d}"


def file_name(index: int) -> str:
    """Of one client's tensors: clients' names may hold what a file's may not."""
    return f"{index:05d}.safetensors"


def numbered(root: Path) -> list[tuple[int, Path]]:
    """The rounds kept in a directory, by number."""
    if not root.is_dir():
        return []
    found = [(match, d) for d in root.iterdir() if (match := _ROUND.fullmatch(d.name))]
    return sorted((int(match[1]), d) for match, d in found)


def private_dir(path: Path) -> None:
    """Make a directory that its owner alone may read."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)
    except OSError as e:
        raise WriteError(f"cannot write to {path}: {e.strerror or e}") from e


def write_private(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors that their owner alone may read."""
    write_tensors(path, state)
    path.chmod(0o600)


@contextmanager
def round_dir(root: Path, number: int, body: Mapping[str, Any]) -> Iterator[Path]:
    """A directory for one round, with a manifest of its files' digests; it is there when it is whole."""
    private_dir(root)
    with atomic_dir(root / _name(number)) as part:
        yield part
        files = {f.name: digest_file(f) for f in sorted(part.glob("*.safetensors"))}
        whole = {"round": number, **body, "files": files}
        write_sealed(part / "round.json", whole)
        (part / "round.json").chmod(0o600)
    (root / _name(number)).chmod(0o700)


def _manifest(place: Path) -> dict[str, Any]:
    return read_sealed(place / "round.json")


def _read(place: Path, manifest: Mapping[str, Any], name: str) -> AdapterState:
    digest = manifest["files"].get(name)
    if not (place / name).is_file() or digest_file(place / name) != digest:
        raise ArtifactError(f"{place / name} is missing or was altered")
    return read_tensors(place / name)
