"""A machine's part of a run: one base model, the rows of some clients, and their tasks as they come in as messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unfed.app import build
from unfed.app.privacy import privacy_of
from unfed.app.tasks import read_task
from unfed.base.errors import ConfigError
from unfed.base.types import AdapterState
from unfed.config.schema import RunConfig
from unfed.config.shape import validate
from unfed.federated.client import Client, ClientData
from unfed.federated.messages import Message, update_message
from unfed.federated.store import ClientStore
from unfed.federated.wired import ClientEnd
from unfed.models.adapter import snapshot
from unfed.models.load import LoadedModel
from unfed.training.args import loop_args
from unfed.training.loop import Local


def read_config(plain: Mapping[str, Any]) -> RunConfig:
    """A configuration as :func:`unfed.app.rundir.plain` gives it. ``ConfigError`` with every problem."""
    config, problems = validate(plain)
    if config is None or problems:
        raise ConfigError(problems or ["no configuration"])
    return config


def make_local(config: RunConfig, loaded: LoadedModel, pad: int | None = None) -> Local:
    """The local loop on the one model. ``pad``: see :func:`unfed.app.build.collation`."""
    assert config.trainer is not None
    args = loop_args(config.trainer.args)
    return Local(loaded.model, args, build.collation(config, loaded, pad), config.seed)


def make_client(
    config: RunConfig,
    on: tuple[LoadedModel, Local],
    data: Mapping[str, ClientData],
    opened: AdapterState | None = None,
    store: ClientStore | None = None,
) -> Client:
    """What runs the tasks of every client in ``data`` on the one model. ``opened``: the adapter that the run began with
    (``None``: the one that the model has now)."""
    assert config.trainer is not None
    loaded, local = on
    by_phase = config.trainer.method_args.lr_schedule == "phase"
    reference = snapshot(loaded.model) if opened is None else opened
    client = Client(local, data, reference, lr_per_phase=by_phase, store=store or ClientStore())
    client.privacy = privacy_of(config)
    return client


@dataclass
class Worker:
    """Answers tasks. ``opened``: the adapter that the run began with, the same on every machine. ``end``: the clients'
    end of the run's wire (``None``: adapters travel as they are)."""

    client: Client
    opened: AdapterState
    end: ClientEnd | None = None

    def answer(self, message: Message) -> Message:
        """The update of the client whose task ``message`` is. Raises what :func:`read_task` and the training raise."""
        task, broadcast, client_id = read_task(message, self.opened)
        update = self.client.fit(task, broadcast, client_id)
        return update_message(update) if self.end is None else update_message(*self.end.sent(task, broadcast, update))
