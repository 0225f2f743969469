"""The wire of a run: its format from the configuration, and the clients' end of it."""

from __future__ import annotations

from pathlib import Path

from unfed.config.schema import RunConfig
from unfed.federated.store import ClientStore
from unfed.federated.transport import Fit
from unfed.federated.wire import Float32, Wire, build_wire
from unfed.federated.wired import ClientEnd, Wired


def wire_of(config: RunConfig) -> Wire:
    """The format that updates travel in; float32 where none is named."""
    return Float32() if config.wire is None else build_wire(config.wire.name, config.wire.params)


def wire_store(config: RunConfig) -> ClientStore:
    """Where the clients keep what a wire lost: in the run's directory. A run may resume at any checkpoint that is kept,
    and needs what the clients had then."""
    return ClientStore(Path(config.paths.output_dir), config.engine.keep_checkpoints + 1)


def over_wire(config: RunConfig, fit: Fit, store: ClientStore | None = None) -> Fit:
    """``fit`` with the run's wire around it. ``store``: what the clients keep of it (``None``: :func:`wire_store`)."""
    wire = wire_of(config)
    if wire.as_it_is:
        return fit
    return Wired(fit, ClientEnd(wire, wire_store(config) if store is None else store, config.seed))
