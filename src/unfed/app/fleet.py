"""Where a run's clients are: in this process, or wherever an engine has them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from unfed.app import build, encode, hostile, ownership, recipes, server_rows
from unfed.app.rundir import RunDir
from unfed.app.wire import over_wire
from unfed.base.errors import ConfigError
from unfed.base.types import AdapterState
from unfed.config.schema import RunConfig
from unfed.data.partition import Partition
from unfed.federated.client import Client, ClientData
from unfed.federated.transport import InProcess, Transport
from unfed.models.load import LoadedModel


@dataclass(frozen=True)
class Mission:
    """What the clients of a run are to know before its first round. ``client`` runs tasks in this process;
    ``opened`` is the adapter that the run began with, ``clients`` are their rows; ``directory``: the run's."""

    config: RunConfig
    loaded: LoadedModel
    client: Client
    rows: build.Rows
    partition: Partition
    opened: AdapterState
    directory: RunDir
    clients: Mapping[str, ClientData] = field(default_factory=dict)


class Fleet:
    """The clients in this process. Engines for other machines replace what differs there.

    ``has_rows``: whether the clients' rows can be read here; if not, rows are known by their ids alone.
    """

    has_rows = True

    def resolved(self, config: RunConfig) -> RunConfig:
        """The configuration with what only the clients know: which of their rows it names."""
        return config

    def rows(self, config: RunConfig) -> tuple[build.Rows, Partition, str]:
        """The rows, whose they are, and a sentence on where that comes from."""
        rows = server_rows.apart(config, build.read_rows(config))
        encode.alternates_of(config, rows)  # a file that does not serve is found before the model is opened
        partition, where = build.settle_partition(config, rows)
        return rows, partition, where

    def clients(
        self, config: RunConfig, loaded: LoadedModel, rows: build.Rows, partition: Partition
    ) -> Mapping[str, ClientData]:
        """Every client's rows by split, encoded where they can be."""
        clients = encode.encode_clients(config, loaded, rows, partition)
        return recipes.with_proxy(config, rows, hostile.wronged(config, loaded, rows, partition, clients))

    def keep(self, place: Path, rows: build.Rows, partition: Partition) -> Mapping[str, Any]:
        """Write who owns what into the run's directory; what is to be recorded of it."""
        return ownership.keep(place, rows, partition)

    @contextmanager
    def transport(self, mission: Mission) -> Iterator[Transport]:
        """What brings tasks to the clients, for the length of the rounds."""
        yield InProcess(over_wire(mission.config, mission.client.fit))

    def measured(self, state: AdapterState, residual: AdapterState | None) -> Mapping[str, Any]:
        """What the clients tell of how well a model knows their rows, for the record (nothing, where rows are here)."""
        del state, residual
        return {}


HERE: Final = Fleet()
"""In this process; it has no state."""


def fleet_of(config: RunConfig) -> Fleet:
    """The fleet of an engine that a run starts by itself. ``ConfigError``: one that has to be there before;
    ``UnfedError``: one that is not installed."""
    if config.engine.name == "nvflare":
        raise ConfigError(["engine=nvflare: a run over a network is started by unfed network submit"])
    if config.engine.name == "ray":
        from unfed.app.ray_fleet import RayFleet

        return RayFleet()
    return HERE
