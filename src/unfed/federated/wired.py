"""The two ends of a wire: what is sent becomes bytes and is read back from them, and clients remember what was lost.

Up goes a client's change, its adapter less what it received, in the format of :mod:`unfed.federated.wire`; the server
adds it to what it has itself, so that a broadcast in 16 bits does not round the server's adapter. What the format lost
stays at the client and is added to its next change (error feedback: Seide et al. 2014, "1-Bit Stochastic Gradient
Descent"; Karimireddy et al. 2019, "Error Feedback Fixes SignSGD", algorithm 2). There it is a gradient that is encoded;
here it is the change of a round, whose step size is in it already.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from safetensors.torch import load, save
from torch import Tensor

from unfed.aggregation.tree import floats, inner, moved, working_dtype
from unfed.base.seeding import torch_generator
from unfed.base.types import SERVER, AdapterState, Broadcast, ClientUpdate
from unfed.federated.schedule import FitTask
from unfed.federated.store import ClientStore
from unfed.federated.transport import Fit
from unfed.federated.wire import Wire

LOST = "wire"
"""Kind of what a client keeps of it: what its last messages lost, by tensor."""
_ADAPTER, _RESIDUAL, _BUFFER = "adapter.", "residual.", "buffer."


def pack_broadcast(wire: Wire, broadcast: Broadcast, client_id: str) -> bytes | None:
    """What goes to a client: tensors by name, floating ones in the dtype of ``wire.down``, without those that are its
    own (``Broadcast.local``). ``None``: they go as they are, and nothing is to be packed."""
    if wire.down == "float32":
        return None
    parts = {_ADAPTER: broadcast.start(client_id).without(broadcast.local | broadcast.known)}
    if broadcast.residual is not None:
        parts[_RESIDUAL] = broadcast.residual
    named = {prefix + n: t for prefix, state in parts.items() for n, t in state.items()}
    return save({n: _narrowed(t).contiguous() for n, t in named.items()})


def _narrowed(tensor: Tensor) -> Tensor:
    return tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor


def unpack_broadcast(data: bytes, like: Broadcast, client_id: str) -> Broadcast:
    """What a client reads. ``like``: names, dtypes (float32 where it has no such tensor), and the tensors that do not
    travel (they are the client's own).

    Raises ``SafetensorError`` for bytes that are no such message.
    """
    arrays = load(data)
    known = like.start(client_id)
    start = _named(arrays, _ADAPTER, known).filled(known)
    residual = None if like.residual is None else _named(arrays, _RESIDUAL, like.residual)
    if client_id in like.own:
        return replace(like, residual=residual, own={client_id: start})
    return replace(like, adapter=start, residual=residual, own={})


def _named(arrays: Mapping[str, Tensor], prefix: str, like: AdapterState) -> AdapterState:
    found = {n.removeprefix(prefix): t for n, t in arrays.items() if n.startswith(prefix)}
    return AdapterState({n: t.to(like[n].dtype if n in like else torch.float32) for n, t in found.items()})


def unpack_update(wire: Wire, data: bytes, returned: AdapterState) -> AdapterState:
    """What the server reads: its own ``returned`` tensors (:meth:`Broadcast.returned`) moved by the decoded change.

    Raises ``ValueError`` or ``SafetensorError`` for bytes that are no such message.
    """
    arrays = load(data)
    like = AdapterState({n: returned[n] for n in floats(returned)})
    buffers = {n.removeprefix(_BUFFER): t for n, t in arrays.items() if n.startswith(_BUFFER)}
    if buffers.keys() != returned.keys() - like.keys():
        raise ValueError(f"the message has other buffers than the adapter: {', '.join(buffers) or 'none'}")
    return moved(returned, wire.decode(arrays, like), 1.0, AdapterState(buffers))


def received_update(wire: Wire, update: ClientUpdate, data: bytes, broadcast: Broadcast) -> ClientUpdate:
    """``update`` with the adapter that the server reads from its bytes: see :func:`unpack_update`."""
    adapter = unpack_update(wire, data, broadcast.returned(update.client_id))
    return replace(update, adapter=adapter, nbytes=len(data))


def counted(update: ClientUpdate, down: int, broadcast: Broadcast) -> ClientUpdate:
    """``update``, whose client was sent ``down`` bytes; a control variate goes beside them as it is."""
    return replace(update, nbytes_down=down + (0 if broadcast.control is None else broadcast.control.nbytes))


@dataclass(frozen=True)
class Packed:
    """A message of a client: its bytes, and how much of the change they lost (``||lost|| / ||change||``)."""

    data: bytes
    lost: float


@dataclass(frozen=True)
class ClientEnd:
    """A client's end of the wire. ``store``: where clients keep what was lost; ``seed``: of rounding at random."""

    wire: Wire
    store: ClientStore = field(default_factory=ClientStore)
    seed: int = 0

    def pack(self, task: FitTask, client_id: str, received: AdapterState, after: AdapterState) -> Packed:
        """``after``, less what was ``received``, as bytes; the tensors of both have the same names and shapes.

        What was lost in earlier rounds of the phase is added to tensors that travel this round and have kept their
        shape, and waits for the others. A phase begins without memory: what an objective missed is not owed to the
        next one, and a server rule may have turned the sign of what arrived (task arithmetic). A change that is not
        finite is sent as it is and leaves no memory.
        """
        round_, since = task.round, task.round - task.phase_round
        change = {n: _wide(after[n]) - _wide(received[n]) for n in floats(after)}
        memory = self.store.get(client_id, LOST, round_, since) if self.wire.remembers else None
        for name, lost in (memory or {}).items():
            if name in change and change[name].shape == lost.shape:
                change[name] = change[name] + lost
        wanted = AdapterState(change)
        arrays = self.wire.encode(wanted, torch_generator(self.seed, "wire", round_, client_id))
        buffers = {_BUFFER + n: t for n, t in after.items() if n not in change}
        data = save({n: t.contiguous() for n, t in {**arrays, **buffers}.items()})
        read = self.wire.decode(load(data), wanted)
        lost = AdapterState({n: t - read[n] for n, t in wanted.items()})
        share = _share(lost, wanted)
        if self.wire.remembers and math.isfinite(share):
            self.store.put(client_id, LOST, round_, AdapterState({**(memory or {}), **lost}))
        return Packed(data, share)

    def sent(self, task: FitTask, received: Broadcast, update: ClientUpdate) -> tuple[ClientUpdate, bytes | None]:
        """``update`` with what its bytes have lost among its metrics, and the bytes. ``None``: its names or shapes are
        wrong, and it is passed on as it is, for the server to say so."""
        returned = received.returned(update.client_id)
        if update.adapter.shapes != returned.shapes:
            return update, None
        packed = self.pack(task, update.client_id, returned, update.adapter)
        metrics = {**update.metrics, "wire_lost": packed.lost} if math.isfinite(packed.lost) else update.metrics
        return replace(update, metrics=metrics), packed.data


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(working_dtype(tensor.dtype))


def _share(lost: AdapterState, wanted: AdapterState) -> float:
    """NaN or infinite where one of the values is; 0/0 is 0."""
    missed, whole = inner(lost, lost), inner(wanted, wanted)
    return math.sqrt(missed / whole) if whole else math.sqrt(missed)


class Wired:
    """A :data:`unfed.federated.transport.Fit` with a wire on both sides of another one: what it returns is what the
    server has read from bytes, with their number."""

    def __init__(self, fit: Fit, end: ClientEnd) -> None:
        self._fit, self._end = fit, end

    def __call__(self, task: FitTask, broadcast: Broadcast, client_id: str) -> ClientUpdate:
        """See :data:`unfed.federated.transport.Fit`. What the server trains itself (:data:`unfed.base.types.SERVER`)
        does not travel."""
        if client_id == SERVER:
            return self._fit(task, broadcast, client_id)
        wire, down = self._end.wire, pack_broadcast(self._end.wire, broadcast, client_id)
        received = broadcast if down is None else unpack_broadcast(down, broadcast, client_id)
        update, data = self._end.sent(task, received, self._fit(task, received, client_id))
        update = update if data is None else received_update(wire, update, data, broadcast)
        return update if down is None else counted(update, len(down), broadcast)
