"""The wire of a run: its format from the configuration, and its two ends, in one process or over a network."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import safetensors

from unfed.app.tasks import task_message
from unfed.base.types import Broadcast, ClientUpdate
from unfed.config.schema import RunConfig
from unfed.federated.messages import Message, MessageError, packed_change, read_update
from unfed.federated.schedule import FitTask
from unfed.federated.store import ClientStore
from unfed.federated.transport import Fit
from unfed.federated.wire import Float32, Wire, build_wire
from unfed.federated.wired import ClientEnd, Wired, counted, pack_broadcast, received_update


def wire_of(config: RunConfig) -> Wire:
    """The format that updates travel in; float32 where none is named."""
    return Float32() if config.wire is None else build_wire(config.wire.name, config.wire.params)


def wire_store(config: RunConfig) -> ClientStore:
    """Where the clients keep what a wire lost: in the run's directory."""
    engine = config.engine
    return ClientStore(Path(config.paths.output_dir), engine.entries_kept, every=engine.keep_every)


def over_wire(config: RunConfig, fit: Fit, store: ClientStore | None = None) -> Fit:
    """``fit`` with the run's wire around it. ``store``: what the clients keep of it (``None``: :func:`wire_store`)."""
    wire = wire_of(config)
    if wire.as_it_is:
        return fit
    return Wired(fit, ClientEnd(wire, wire_store(config) if store is None else store, config.seed))


def client_end(config: RunConfig, store: ClientStore) -> ClientEnd | None:
    """The end of clients on another machine, who keep what was lost in ``store``."""
    wire = wire_of(config)
    return None if wire.as_it_is else ClientEnd(wire, store, config.seed)


@dataclass(frozen=True)
class ServerEnd:
    """The server's end where clients are on other machines: tasks as messages, updates from them."""

    wire: Wire
    _down: dict[str, int] = field(default_factory=dict)

    def encode(self, task: FitTask, broadcast: Broadcast, client_id: str) -> Message:
        """See :data:`unfed.federated.remote.Encode`."""
        packed = pack_broadcast(self.wire, broadcast, client_id)
        if packed is not None:
            self._down[client_id] = len(packed)
        return task_message(task, broadcast, client_id, packed)

    def decode(self, message: Message, broadcast: Broadcast, client_id: str) -> ClientUpdate:
        """See :data:`unfed.federated.remote.Decode`."""
        update, data = read_update(message, client_id), packed_change(message)
        if data is None and update.nbytes is not None and update.nbytes > update.adapter.nbytes:
            raise MessageError(f"the answer's nbytes is {update.nbytes}, more than its tensors have")
        try:
            update = update if data is None else received_update(self.wire, update, data, broadcast)
        except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as e:  # safetensors knows other dtypes
            raise MessageError(f"its change is not what wire={self.wire.name} makes: {str(e)[:200]}") from e
        down = self._down.get(client_id)
        return update if down is None else counted(update, down, broadcast)
