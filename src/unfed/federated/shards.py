"""Training in shards that never see each other: each from the same start by its own clients, kept one by one.

What is kept is an adapter of a few clients alone, so it is personal data as single updates are: directories have mode
0700 and files 0600.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unfed.aggregation.base import Aggregator
from unfed.base.artifacts import (
    atomic_dir,
    digest_file,
    read_sealed,
    read_tensors,
    write_json,
    write_sealed,
)
from unfed.base.errors import ArtifactError
from unfed.base.seeding import derive_seed
from unfed.base.types import AdapterState, ServerState
from unfed.federated.checkpoint import RoundRecord
from unfed.federated.history import private_dir, write_private
from unfed.federated.rounds import RoundListener, RoundsConfig, RunKeeper, run_rounds
from unfed.federated.schedule import FitTask, Schedule
from unfed.federated.transport import Transport

SHARDS_DIR = "shards"
_MANIFEST, _ADAPTER = "shard.json", "adapter.safetensors"


@dataclass(frozen=True)
class Shard:
    """Clients that train together, and the ids of the rows that each trains on. ``index`` is the same for the life of
    a federation, whichever shards are dropped."""

    index: int
    rows: Mapping[str, tuple[str, ...]]

    @property
    def name(self) -> str:
        """For phases and directories."""
        return f"shard_{self.index:05d}"

    def weight(self, of: Callable[[int], float]) -> float:
        """The sum of its clients' weights; ``of`` gives one from a number of rows."""
        return sum(of(len(ids)) for ids in self.rows.values())


class ShardStore:
    """The shards under ``directory/shards``. Files are checked against their digests (``ArtifactError``)."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / SHARDS_DIR

    def shards(self) -> list[Shard]:
        """All that are kept, by index."""
        names = sorted(d.name for d in self.root.glob("shard_*") if d.is_dir()) if self.root.is_dir() else []
        found = [self._manifest(name) for name in names]
        return [Shard(int(m["index"]), {c: tuple(ids) for c, ids in m["rows"].items()}) for m in found]

    def has(self, shard: Shard) -> bool:
        """Whether this shard, trained on these rows, is there."""
        return shard in self.shards()

    def adapter(self, shard: Shard) -> AdapterState:
        """A shard's adapter."""
        place, manifest = self.root / shard.name, self._manifest(shard.name)
        if not (place / _ADAPTER).is_file() or digest_file(place / _ADAPTER) != manifest["file"]:
            raise ArtifactError(f"{place / _ADAPTER} is missing or was altered")
        return read_tensors(place / _ADAPTER)

    def start(self, shard: Shard) -> str:
        """Digest of the adapter that the shard began with."""
        return str(self._manifest(shard.name)["start"])

    def put(self, shard: Shard, adapter: AdapterState, start: str) -> None:
        """Keep a shard; it is there when it is whole."""
        private_dir(self.root)
        with atomic_dir(self.root / shard.name) as part:
            write_private(part / _ADAPTER, adapter)
            body = {"index": shard.index, "rows": shard.rows, "start": start, "file": digest_file(part / _ADAPTER)}
            write_sealed(part / _MANIFEST, body)
            (part / _MANIFEST).chmod(0o600)
        (self.root / shard.name).chmod(0o700)

    def finish(self, served: Sequence[tuple[Shard, float]], stack: AdapterState) -> None:
        """Say what is served: the shards in order with their weights. Shards that are no part of it are removed."""
        names = {s.name for s in self.shards()} - {s.name for s, _ in served}
        for name in names:
            shutil.rmtree(self.root / name, ignore_errors=True)
        told = {s.name: {"weight": w, "clients": list(s.rows), "start": self.start(s)} for s, w in served}
        write_json(self.root / "shards.json", {"stack": stack.digest(), "shards": told})
        (self.root / "shards.json").chmod(0o600)

    def _manifest(self, name: str) -> dict[str, Any]:
        return read_sealed(self.root / name / _MANIFEST)


@dataclass(frozen=True)
class Shifted(RoundListener):
    """Tells a listener of a shard's rounds as rounds of the whole run."""

    inner: RoundListener
    by: int

    def round_started(self, task: FitTask, clients: list[str]) -> None:
        """Before the first client."""
        self.inner.round_started(replace(task, round=task.round + self.by), clients)

    def round_ended(self, record: RoundRecord, state: ServerState) -> None:
        """After the checkpoint."""
        moved = replace(state, round=state.round + self.by)
        self.inner.round_ended(replace(record, round=record.round + self.by), moved)


@dataclass
class ShiftedKeeper(RunKeeper):
    """Keeps a shard's rounds as rounds of the whole run, so that one series of checkpoints serves all shards."""

    by: int = 0

    def save(self, state: ServerState) -> None:
        """Checkpoint the round that has just ended."""
        self.records[-1] = replace(self.records[-1], round=state.round - 1 + self.by)
        super().save(replace(state, round=state.round + self.by))


@dataclass(frozen=True)
class ShardWork:
    """Shards to train, each in the phase of ``schedule`` at its place, from ``start``; they are kept in ``store``."""

    schedule: Schedule
    shards: Sequence[Shard]
    start: AdapterState
    store: ShardStore


def run_shards(
    work: ShardWork,
    transport: Transport,
    aggregator: Aggregator,
    state: ServerState,
    config: RoundsConfig,
    keep: RunKeeper,
) -> ServerState:
    """Train the shards one after the other, each as a run of its own: rounds and seeds begin anew.

    So a shard's adapter depends on its index, its clients and their rows alone. ``state`` counts rounds over all
    shards; a resumed run goes on within the shard that it was in. Raises as
    :func:`unfed.federated.rounds.run_rounds` does, and ``ArtifactError`` when a finished shard is gone.
    """
    offset = 0
    for phase, shard in zip(work.schedule.phases, work.shards, strict=True):
        end = offset + phase.rounds
        if state.round > end or (state.round == end and work.store.has(shard)):
            if not work.store.has(shard):
                raise ArtifactError(f"{work.store.root / shard.name} is gone; start afresh with overwrite=true")
            offset = end
            continue
        own = ServerState(0, work.start)
        if state.round > offset:
            own = replace(state, round=state.round - offset)
        seeds = replace(config, seed=derive_seed(config.seed, "shard", shard.index))
        listener = Shifted(keep.listener, offset)
        shifted = ShiftedKeeper(keep.records, listener, keep.checkpoints, keep.on_save, by=offset)
        own = run_rounds(Schedule((phase,)), transport, aggregator, own, seeds, shifted)
        work.store.put(shard, own.adapter, work.start.digest())
        state, offset = replace(own, round=end), end
    return state
