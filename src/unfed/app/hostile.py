"""Hostile clients in a run, for studies of robust rules: who they are, and what they train on or send."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from unfed.app.build import Rows
from unfed.app.encode import encoded
from unfed.app.progress import say
from unfed.base.errors import ConfigError, nearest
from unfed.base.seeding import numpy_generator
from unfed.config.schema import RunConfig
from unfed.data.labels import exchanged_answers
from unfed.data.partition import Partition
from unfed.federated.client import ClientData
from unfed.federated.hostile import ATTACKS, Hostile
from unfed.federated.transport import Transport
from unfed.models.load import LoadedModel


def hostile_clients(config: RunConfig, clients: Iterable[str]) -> tuple[str, ...]:
    """The hostile ones of a run's clients. ``ConfigError`` for one that is not there, and where none would be
    honest."""
    given, names = config.hostile, tuple(clients)
    if given is None:
        return ()
    found, problems = [], []
    for asked in given.clients:
        name = f"client_{asked}" if isinstance(asked, int) or asked.isdecimal() else asked
        found.append(name)
        if name not in names:
            problems.append(f"hostile.clients={asked}: no such client{nearest(name, names)}")
    chosen = [c for c in names if c in found] if found else list(names[-given.count :])
    if not problems and len(chosen) >= len(names):
        problems.append(f"hostile: {len(chosen)} of {len(names)} clients; one at least is honest")
    if problems:
        raise ConfigError(problems)
    return tuple(chosen)


def warning(config: RunConfig, partition: Partition) -> list[str]:
    """What has to be said of a run with hostile clients."""
    if config.hostile is None:
        return []
    who = ", ".join(hostile_clients(config, partition.clients))
    return [f"FOR STUDY ONLY: hostile={config.hostile.name}, {who} did harm on purpose; do not use this adapter"]


def wronged(
    config: RunConfig, loaded: LoadedModel, rows: Rows, partition: Partition, clients: Mapping[str, ClientData]
) -> dict[str, ClientData]:
    """The clients, with the hostile ones named aloud, and their answers exchanged under ``label_flip``."""
    for line in warning(config, partition):
        say(line)
    if config.hostile is None or config.hostile.name != "label_flip":
        return dict(clients)
    kept = {e["id"]: e for e in (rows.train or rows.retain)}
    changed = dict(clients)
    for client in hostile_clients(config, partition.clients):
        own = [kept[i] for i in partition.clients[client] if i in kept]
        wrong = exchanged_answers(own, numpy_generator(config.seed, "hostile", client))
        found = encoded(config, loaded, "train" if rows.train else "retain", wrong)
        splits = {s: [e for i in found for e in found[i]] for s in ("train", "retain") if s in clients[client].splits}
        changed[client] = replace(clients[client], splits={**clients[client].splits, **splits})
    return changed


def on_the_wire(config: RunConfig, clients: Iterable[str], transport: Transport) -> Transport:
    """The transport, with what hostile clients send instead of their updates."""
    given = config.hostile
    if given is None or given.name not in ATTACKS:
        return transport
    factor = 1.0 if given.factor is None else given.factor
    return Hostile(transport, given.name, frozenset(hostile_clients(config, clients)), factor, config.seed)


def note(config: RunConfig, partition: Partition) -> dict[str, Any]:
    """For ``run.json``."""
    return {"hostile_clients": hostile_clients(config, partition.clients)} if config.hostile is not None else {}
