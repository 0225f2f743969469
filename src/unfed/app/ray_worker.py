"""A worker's part of a run whose clients are dealt to workers: a base model, everybody's rows, one errand at a time."""

from __future__ import annotations

import logging
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from unfed.app.errands import Done, done_message, read_errand, read_rows
from unfed.app.rundir import versions
from unfed.app.runs import open_model
from unfed.app.wire import over_wire
from unfed.app.worker import make_client, make_local, read_config
from unfed.base.artifacts import write_json, write_tensors
from unfed.base.errors import UnfedError
from unfed.base.types import AdapterState
from unfed.config.schema import RunConfig
from unfed.federated.messages import Message
from unfed.federated.schedule import FitTask
from unfed.federated.store import Carried
from unfed.models.adapter import snapshot
from unfed.models.core import put_cores
from unfed.models.digest import base_facts
from unfed.models.load import LoadedModel
from unfed.models.spec import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from unfed.training.loop import StepEvent

log = logging.getLogger(__name__)
FAILED, ENDS, TRACE = "failed", "ends", "trace"
"""Keys of an answer that is no update: why the client failed, or how the run ends; and where it happened."""
USER, MEMORY, DEVICE = "user", "memory", "device"
"""How a run ends: by what the user can mend, or for lack of memory, the machine's or the device's."""


class RayWorker:
    """Answers errands. ``told``: what is to be known of it before it gets one."""

    def __init__(self, opening: Message) -> None:
        config = read_config(opening.get("config", dict))
        torch.set_num_threads(opening.get("threads", int))
        loaded = _open(config, opening)
        if opening.get("cores", bool):
            assert isinstance(loaded.model, PeftModel)
            put_cores(loaded.model)
        own = snapshot(loaded.model)
        opened = opening.states.get("opened", own)
        if {n: t.shape for n, t in own.items()} != opened.shapes:
            raise UnfedError("the adapter that it opens has another shape than the server's")
        self._store = Carried()
        # Rows are padded with the server's token, whatever tokenizer lies with the base here.
        local = make_local(config, loaded, opening.get("pad", int))
        client = make_client(config, (loaded, local), read_rows(opening), opened, self._store)
        self._client, self._fit = client, over_wire(config, client.fit, self._store)
        facts = base_facts(loaded.model, loaded.tokenizer)
        self.told = Message({"base": facts, "versions": versions(), "opened": opened.digest()})

    def answer(self, message: Message, shared: Message) -> Message:
        """The answer to an errand; what went wrong is told, not raised."""
        try:
            return done_message(self._done(message, shared))
        except Exception as e:  # noqa: BLE001 - whoever asked must be told
            return failed(e)

    def _done(self, message: Message, shared: Message) -> Done:
        errand, events, client = read_errand(message, shared), list[StepEvent](), self._client
        self._store.bring(errand.kept)
        client.curves.clear()

        def stepped(task: FitTask, client_id: str, event: StepEvent) -> None:
            del task, client_id
            events.append(event)

        client.on_step = stepped
        update = self._fit(errand.task, errand.broadcast, errand.client_id)
        (curve,) = client.curves[errand.task.phase.name]
        return Done(update, self._store.taken, curve, events)


def failed(error: Exception) -> Message:
    """What is told of an error, so that it ends the client's part or the run as it would in the server's process."""
    said, trace = str(error), traceback.format_exc()
    if isinstance(error, torch.OutOfMemoryError):
        return Message({ENDS: DEVICE, "said": said})
    if isinstance(error, MemoryError):
        return Message({ENDS: MEMORY, "said": said})
    if isinstance(error, UnfedError):
        return Message({ENDS: USER, "said": said})
    return Message({FAILED: f"{type(error).__name__}: {said}", TRACE: trace})


class Refusing:
    """A worker that could not open the run: it tells why, and does nothing."""

    def __init__(self, error: Exception) -> None:
        self.told = failed(error)

    def answer(self, message: Message, shared: Message) -> Message:
        """The same again."""
        del message, shared
        return self.told


def open_worker(opening: Message) -> RayWorker | Refusing:
    """A worker from what the server sends first."""
    try:
        return RayWorker(opening)
    except Exception as e:
        log.exception("the run cannot be opened")
        return Refusing(e)


def _open(config: RunConfig, opening: Message) -> LoadedModel:
    """The model as the server has it: its base from where that is here, an adapter from the message."""
    args = config.model.model_args
    if opening.get("on_cpu", bool) and torch.cuda.is_available():
        args = replace(args, device_map="cpu")
    elif (args.device_map or "").startswith("cuda:"):
        args = replace(args, device_map="cuda")  # which of the machine's GPUs it has is settled by Ray
    adapter, shape = opening.states.get("adapter"), opening.get("adapter_config", (dict, type(None)))
    with tempfile.TemporaryDirectory(prefix="unfed-") as place:
        if adapter is not None and shape is not None:
            _write(Path(place), adapter, shape)
            args = replace(args, lora_model_path=place)
        return open_model(replace(config, model=replace(config.model, model_args=args)), trainable=True)


def _write(place: Path, adapter: AdapterState, shape: Mapping[str, Any]) -> None:
    write_tensors(place / ADAPTER_WEIGHTS, adapter)
    write_json(place / ADAPTER_CONFIG, shape)
