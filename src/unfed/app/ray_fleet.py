"""The server's side of a run whose clients are dealt to workers (``engine=ray``): what workers are told, what they must
agree on, and what the clients keep from round to round, which stays here."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from unfed.app.agreement import refuse_other_base, refuse_other_versions
from unfed.app.errands import errand_message, read_done, rows_message, shared_message
from unfed.app.fleet import Fleet, Mission
from unfed.app.progress import say
from unfed.app.ray_worker import DEVICE, ENDS, FAILED, MEMORY, TRACE, open_worker
from unfed.app.rundir import plain
from unfed.app.wire import wire_of, wire_store
from unfed.base.artifacts import read_json, read_tensors
from unfed.base.errors import UnfedError
from unfed.base.types import SERVER, AdapterState, Broadcast, ClientFailure, ClientUpdate
from unfed.config.schema import RunConfig
from unfed.federated.client import OWN, Client
from unfed.federated.control import CONTROL
from unfed.federated.messages import Message
from unfed.federated.pool import AHEAD, Dealt, Pool
from unfed.federated.schedule import FitTask
from unfed.federated.store import ClientStore
from unfed.federated.transport import Transport
from unfed.federated.wired import LOST
from unfed.models.core import has_cores
from unfed.models.digest import base_facts
from unfed.models.spec import ADAPTER_CONFIG, ADAPTER_WEIGHTS

log = logging.getLogger(__name__)
Pools = Callable[[RunConfig, Message, int], AbstractContextManager[Pool]]
"""Workers for a run, from what each is sent first and how many would have something to do."""


def need_ray() -> None:
    """``UnfedError`` where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise UnfedError('engine=ray needs Ray, which is not installed: pip install "unfed[ray]"')


def _on_cpu(config: RunConfig) -> bool:
    args = config.trainer.args if config.trainer is not None else {}
    return bool(args.get("use_cpu")) or config.model.model_args.device_map == "cpu"


def _place(config: RunConfig, most: int = 1 << 30, memory: int = 0) -> Any:
    from unfed.federated.ray import Place

    engine = config.engine
    gpus = 0.0 if engine.gpus_per_worker is None and _on_cpu(config) else engine.gpus_per_worker
    return Place(engine.workers, gpus, engine.address, most, memory)


@contextmanager
def ray_pool(config: RunConfig, opening: Message, most: int) -> Iterator[Pool]:
    """Workers as Ray actors, ended at the end; and the cluster with them, where it was started for them."""
    from unfed.federated.ray import RayPool, connected

    adapter = max(state.nbytes for state in opening.states.values())
    memory = opening.nbytes + 3 * adapter * ((config.engine.workers or 8) + AHEAD)
    with connected(_place(config, most, memory)) as (workers, gpus):
        head = {**opening.head, "on_cpu": gpus == 0}
        pool = RayPool(workers, gpus, open_worker, Message(head, opening.states))
        where = "this machine" if config.engine.address is None else f"the cluster at {config.engine.address}"
        each = f"{gpus:g} GPU" if gpus else f"{opening.head['threads']} CPU thread(s)"
        say(f"ray: {workers} worker{'s' * (workers != 1)} with {each} and a base model each, on {where}")
        try:
            yield pool
        finally:
            pool.close()


class RayFleet(Fleet):
    """Clients whose rows are here and who train on workers. ``pools``: what makes those (``None``: Ray)."""

    def __init__(self, pools: Pools | None = None) -> None:
        if pools is None:
            need_ray()
        self._pools = pools

    def resolved(self, config: RunConfig) -> RunConfig:
        """As it is; ``UnfedError``: the cluster cannot be reached, or has no room. Found before a model is opened."""
        if self._pools is None:
            from unfed.federated.ray import connected

            if config.engine.address is None:
                _place(config).sized(float(torch.cuda.device_count()), float("inf"))
            else:
                with connected(_place(config)):
                    pass
        return config

    @contextmanager
    def transport(self, mission: Mission) -> Iterator[Transport]:
        """Open the run at every worker, refuse what does not agree, and deal the clients."""
        config, client = mission.config, mission.client
        opening = opening_message(mission)
        adapted = isinstance(mission.loaded.model, PeftModel)
        facts = base_facts(mission.loaded.model, mission.loaded.tokenizer)
        kept = ("weights", "config") if adapted else ("config",)
        expected = {key: facts[key] for key in kept} | {"adapter": mission.opened.digest()}

        def greet(number: int, told: Message) -> None:
            who = f"worker {number + 1}"
            _raise_what_ends(told)
            if FAILED in told.head:
                raise UnfedError(f"{who} cannot open the run: {told.get(FAILED, str)}")
            there = {**told.get("base", dict), "adapter": told.get("opened", str)}
            refuse_other_versions({who: told.get("versions", dict)}, strict=config.engine.same_versions)
            refuse_other_base(who, there, expected)

        lost = wire_store(config) if wire_of(config).remembers else None
        with (self._pools or ray_pool)(config, opening, len(client.data)) as pool:
            dealt = Dealt(pool, Errands(client, lost), config.engine.timeout, greet)
            dealt.open()
            yield dealt


def opening_message(mission: Mission) -> Message:
    """What a worker is sent first: the configuration, everybody's rows, and the adapter that the run goes on from.

    The base model is opened where it is at the worker; adapters travel, so no directory of a run needs to be there.
    """
    config, loaded = mission.config, mission.loaded
    args = replace(config.model.model_args, pretrained_model_name_or_path=loaded.base, base_model_name_or_path=None)
    states, shape = {}, None
    if loaded.adapter_path is not None:
        place = Path(loaded.adapter_path)
        states["adapter"], shape = read_tensors(place / ADAPTER_WEIGHTS), read_json(place / ADAPTER_CONFIG)
        args = replace(args, lora_model_path=None)  # the worker writes it to a place of its own
    adapted = isinstance(loaded.model, PeftModel)
    if adapted:  # else it is the whole model, which the worker opens for itself
        states["opened"] = mission.opened
    rows = rows_message(mission.client.data)
    whole = replace(config, model=replace(config.model, model_args=args))
    head = {
        "config": plain(whole),
        "adapter_config": shape,
        "cores": adapted and has_cores(loaded.model),
        "pad": loaded.tokenizer.pad_token_id,
        "threads": config.engine.threads or torch.get_num_threads(),
        "on_cpu": True,
    }
    return Message({**head, **rows.head}, {**states, **rows.states})


@dataclass(frozen=True)
class Errands:
    """See :class:`unfed.federated.pool.Errands`. ``client``: whose store holds what clients keep, and who is told of
    their steps; ``lost``: where they keep what a wire lost (``None``: it remembers nothing)."""

    client: Client
    lost: ClientStore | None = None

    def share(self, broadcast: Broadcast) -> Message:
        """See the protocol."""
        return shared_message(broadcast)

    def encode(self, task: FitTask, broadcast: Broadcast, client_id: str) -> Message:
        """See the protocol."""
        return errand_message(task, broadcast, client_id, self._kept(task, broadcast, client_id))

    def decode(self, task: FitTask, client_id: str, answer: Message) -> ClientUpdate | ClientFailure:
        """See the protocol."""
        _raise_what_ends(answer)
        if FAILED in answer.head:
            log.warning("client %s at its worker:\n%s", client_id, answer.head.get(TRACE, ""))
            return ClientFailure(client_id, answer.get(FAILED, str))
        done = read_done(answer, client_id)
        for kind, state in done.kept.items():
            store = self.lost if kind == LOST and self.lost is not None else self.client.store
            store.put(client_id, kind, task.round, state)
        if self.client.on_step is not None:
            for event in done.events:
                self.client.on_step(task, client_id, event)
        self.client.curves.setdefault(task.phase.name, []).append(done.curve)
        return done.update

    def _kept(self, task: FitTask, broadcast: Broadcast, client_id: str) -> Mapping[str, AdapterState]:
        store, round_, found = self.client.store, task.round, dict[str, AdapterState | None]()
        if broadcast.local:
            found[OWN] = store.get(client_id, OWN, round_)
        if broadcast.control is not None:
            found[CONTROL] = store.get(client_id, CONTROL, round_)
        if self.lost is not None and client_id != SERVER:
            found[LOST] = self.lost.get(client_id, LOST, round_, round_ - task.phase_round)
        return {kind: state for kind, state in found.items() if state is not None}


def _raise_what_ends(told: Message) -> None:
    """Raise what ends a run, as it would be raised in this process."""
    how, said = told.head.get(ENDS), str(told.head.get("said", ""))
    if how == MEMORY:
        raise MemoryError(said)
    if how == DEVICE:
        raise torch.OutOfMemoryError(said)
    if how is not None:
        raise UnfedError(said)
