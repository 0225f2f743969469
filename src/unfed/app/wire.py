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


def over_wire(config: RunConfig, fit: Fit) -> Fit:
    """``fit`` with the run's wire around it; what the clients keep lies in the run's directory."""
    wire = wire_of(config)
    if wire.as_it_is:
        return fit
    # A run may resume at any checkpoint that is kept, and needs what the clients had then.
    engine, place = config.engine, Path(config.paths.output_dir)
    store = ClientStore(place, engine.keep_checkpoints + 1, every=engine.keep_every)
    return Wired(fit, ClientEnd(wire, store, config.seed))
