"""One client's share of a round as a message, and back: what to train on, with which objective, from which adapter.

A worker on another machine needs no plan and no history: whatever a recipe decided for this client and round is in the
message. Objectives and constraints travel as their class's name and fields; only the classes named here are made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from unfed.base.types import AdapterState, Broadcast
from unfed.federated.messages import Message, MessageError, broadcast_message, read_broadcast
from unfed.federated.schedule import FitTask, Phase, Work
from unfed.objectives.distill import Distill
from unfed.objectives.proximal import Proximal
from unfed.objectives.pruning import Pruning
from unfed.objectives.registry import OBJECTIVES
from unfed.objectives.wrappers import WRAPPERS
from unfed.unlearning.pga import Ball

PARTS: Mapping[str, type[Any]] = MappingProxyType(
    {**OBJECTIVES, **WRAPPERS, **{cls.__name__: cls for cls in (Proximal, Pruning, Distill, Ball)}}
)
"""What a client's work is made of."""
MOST_ROUNDS = 100_000
"""Of a run; what is kept by round has names of five digits."""
_CLASS = "is"
_STATE = "state"


def task_message(task: FitTask, broadcast: Broadcast, client_id: str, packed: bytes | None = None) -> Message:
    """What ``client_id`` has to know for its part of ``task``. ``packed``: see :func:`broadcast_message`."""
    head, states = work_of(task, client_id)
    message = broadcast_message(head, broadcast, client_id, packed)
    return Message(message.head, {**message.states, **states})


def work_of(task: FitTask, client_id: str) -> tuple[dict[str, Any], dict[str, AdapterState]]:
    """What ``client_id`` is to do in ``task``, as a message's head, and the adapters that its work names."""
    phase, states = task.phase, {}
    work = _plain(phase.work[client_id], states)
    head = {
        "do": "fit",
        "round": task.round,
        "phase": phase.name,
        "rounds": phase.rounds,
        "phase_round": task.phase_round,
        "work": work,
    }
    return head, states


def read_work(message: Message, client_id: str) -> FitTask:
    """The task of :func:`work_of`. Raises what :func:`read_task` raises."""
    number, rounds, phase_round = (message.get(key, int) for key in ("round", "rounds", "phase_round"))
    work = _made(message.get("work", dict), message.states)
    if not isinstance(work, Work) or not 0 <= phase_round < rounds or not 0 <= number < MOST_ROUNDS:
        raise MessageError("the message is no task")
    return FitTask(Phase(message.get("phase", str), rounds, {client_id: work}), number, phase_round)


def read_task(message: Message, opened: AdapterState) -> tuple[FitTask, Broadcast, str]:
    """The task, what it starts from, and whose it is. ``opened``: the adapter that the run began with.

    Raises ``MessageError`` for a message that is no task, and ``ConfigError`` for a hyperparameter out of its limits.
    """
    client, broadcast = read_broadcast(message, opened)
    return read_work(message, client), broadcast, client


def _plain(value: Any, states: dict[str, AdapterState]) -> Any:
    """``value`` as JSON can say it; adapters are put among ``states`` and named."""
    if isinstance(value, AdapterState):
        name = f"part{len(states)}"
        states[name] = value
        return {_STATE: name}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = type(value).__name__
        if type(value) is not Work and PARTS.get(kind) is not type(value):
            raise TypeError(f"{kind} is no part of a client's work that could be sent")
        fields = {f.name: _plain(getattr(value, f.name), states) for f in dataclasses.fields(value) if f.init}
        return {_CLASS: kind, **fields}
    if isinstance(value, Mapping):
        return {str(k): _plain(v, states) for k, v in value.items()}
    return [_plain(v, states) for v in value] if isinstance(value, list | tuple) else value


def _made(value: Any, states: Mapping[str, AdapterState]) -> Any:
    """The counterpart of :func:`_plain`; lists become tuples, as frozen dataclasses have them."""
    if isinstance(value, list):
        return tuple(_made(v, states) for v in value)
    if not isinstance(value, dict):
        return value
    if set(value) == {_STATE}:
        if value[_STATE] not in states:
            raise MessageError("the message lacks an adapter that its work names")
        return states[value[_STATE]]
    made = {k: _made(v, states) for k, v in value.items() if k != _CLASS}
    if _CLASS not in value:
        return made
    kind = value[_CLASS]
    cls: Any = Work if kind == "Work" else PARTS.get(kind)
    if cls is None:
        raise MessageError(f"the message's work is made of something unknown, {str(kind)[:80]!r}")
    try:
        return cls(**made)
    except TypeError as e:
        raise MessageError(f"the message's {kind} does not fit this release: {e}") from e
