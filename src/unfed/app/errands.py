"""A client's share of a round for a worker that keeps nothing of anybody: what all are sent, what the client is sent
beside (its work, an adapter of its own, what it has kept so far), and back.

So a client may be dealt to another worker in every round. The whole broadcast goes to the worker, as a client in the
server's process has it: nothing is kept from a worker, which is the server's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from unfed.app.tasks import read_work, work_of
from unfed.base.types import AdapterState, Broadcast, ClientUpdate, Split
from unfed.data.chat import EncodedExample
from unfed.federated.client import ClientData
from unfed.federated.messages import Message, MessageError, read_update, update_message
from unfed.federated.schedule import FitTask
from unfed.training.loop import StepEvent

_KEPT, _OWN = "kept.", "own"
_BESIDE = ("residual", "control")
_NAMES = ("frozen", "local", "known")


def shared_message(broadcast: Broadcast) -> Message:
    """What all clients of a round are sent."""
    beside = {name: state for name in _BESIDE if (state := getattr(broadcast, name)) is not None}
    return Message({n: sorted(getattr(broadcast, n)) for n in _NAMES}, {"adapter": broadcast.adapter, **beside})


def errand_message(task: FitTask, broadcast: Broadcast, client_id: str, kept: Mapping[str, AdapterState]) -> Message:
    """What one client is sent beside. ``kept``: what it has kept so far, by kind."""
    head, states = work_of(task, client_id)
    if client_id in broadcast.own:
        states[_OWN] = broadcast.own[client_id]
    return Message({**head, "client": client_id}, {**states, **{_KEPT + kind: s for kind, s in kept.items()}})


@dataclass(frozen=True)
class Errand:
    """What a worker is to do."""

    task: FitTask
    broadcast: Broadcast
    client_id: str
    kept: Mapping[str, AdapterState]


def read_errand(message: Message, shared: Message) -> Errand:
    """The counterpart of :func:`shared_message` and :func:`errand_message`."""
    client = message.get("client", str)
    own = {client: message.states[_OWN]} if _OWN in message.states else {}
    frozen, local, known = (frozenset(shared.get(name, list)) for name in _NAMES)
    residual, control = (shared.states.get(name) for name in _BESIDE)
    broadcast = Broadcast(shared.states["adapter"], residual, frozen, local, own, known, control)
    kept = {n.removeprefix(_KEPT): s for n, s in message.states.items() if n.startswith(_KEPT)}
    return Errand(read_work(message, client), broadcast, client, kept)


@dataclass(frozen=True)
class Done:
    """What comes back: the update, what the client keeps from now on (by kind), and what its steps told of themselves.

    ``curve``: the loss of every step; ``events``: those that a progress line or a tracker is told of.
    """

    update: ClientUpdate
    kept: Mapping[str, AdapterState] = field(default_factory=dict)
    curve: tuple[float, ...] = ()
    events: Sequence[StepEvent] = ()


def done_message(done: Done) -> Message:
    """A worker's answer. Numbers that may not be finite travel as tensors, which JSON could not say."""
    update = update_message(done.update)
    steps = [[e.step, e.total] for e in done.events]
    seen = [[e.loss, e.lr] for e in done.events]
    told = AdapterState({"curve": _floats(done.curve), "events": _floats(seen)})
    kept = {_KEPT + kind: state for kind, state in done.kept.items()}
    return Message(
        {**update.head, "steps": steps, "nbytes_down": done.update.nbytes_down}, {**update.states, **kept, "told": told}
    )


def read_done(message: Message, client_id: str) -> Done:
    """The counterpart of :func:`done_message`. ``MessageError``: it is none, or of another client."""
    if "told" not in message.states:
        raise MessageError("the answer is no update")
    own = {name: s for name, s in message.states.items() if name != "told" and not name.startswith(_KEPT)}
    kept = {n.removeprefix(_KEPT): s for n, s in message.states.items() if n.startswith(_KEPT)}
    told, steps = message.states["told"], message.get("steps", list)
    events = [
        StepEvent(step, total, loss, lr)
        for (step, total), (loss, lr) in zip(steps, told["events"].reshape(-1, 2).tolist(), strict=True)
    ]
    down = message.get("nbytes_down", (int, type(None)))
    update = replace(read_update(Message(message.head, own), client_id), nbytes_down=down)
    return Done(update, kept, tuple(told["curve"].tolist()), events)


def _floats(values: Sequence[object]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


_EXAMPLE = ("input_ids", "labels")


def rows_message(clients: Mapping[str, ClientData]) -> Message:
    """Every client's encoded rows: each row once, and by client and split which ones they are."""
    rows: dict[int, int] = {}
    examples: list[EncodedExample] = []
    splits: list[tuple[str, str]] = []
    places: dict[str, torch.Tensor] = {}
    for client, data in clients.items():
        for split, own in data.splits.items():
            for e in own:
                if rows.setdefault(id(e), len(examples)) == len(examples):
                    examples.append(e)
            places[str(len(splits))] = torch.tensor([rows[id(e)] for e in own], dtype=torch.int64)
            splits.append((client, split))
    columns = {name: [v for e in examples for v in getattr(e, name)] for name in _EXAMPLE}
    columns |= {name: [getattr(e, name) for e in examples] for name in ("prompt_len", "truncated")}
    columns["length"] = [len(e) for e in examples]
    tensors = {name: torch.tensor(values, dtype=torch.int64) for name, values in columns.items()}
    head = {"clients": list(clients), "splits": splits, "ids": [e.example_id for e in examples]}
    return Message(head, {"rows": AdapterState(tensors), "splits": AdapterState(places)})


def read_rows(message: Message) -> dict[str, ClientData]:
    """The counterpart of :func:`rows_message`."""
    rows, places = message.states["rows"], message.states["splits"]
    lengths = rows["length"].tolist()
    tokens, labels = (rows[name].split(lengths) for name in _EXAMPLE)
    facts = zip(rows["prompt_len"].tolist(), rows["truncated"].tolist(), message.get("ids", list), strict=True)
    examples = [
        EncodedExample(tuple(t.tolist()), tuple(la.tolist()), prompt, bool(cut), name)
        for t, la, (prompt, cut, name) in zip(tokens, labels, facts, strict=True)
    ]
    found: dict[str, dict[Split, list[EncodedExample]]] = {c: {} for c in message.get("clients", list)}
    for number, (client, split) in enumerate(message.get("splits", list)):
        found[client][split] = [examples[i] for i in places[str(number)].tolist()]
    return {client: ClientData(client, own) for client, own in found.items()}
