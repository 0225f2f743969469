"""What travels between a server and its clients' machines: JSON for what is said, safetensors for tensors.

A message is the length of a JSON text (8 bytes, little endian), the text (``{"head": ..., "states": [[name, tensors],
...]}``), and for every tensor the length of a safetensors file and the file. So it can be written and read tensor by
tensor. Nothing is unpickled, and whatever does not have this form is refused with :class:`MessageError`, which no run
dies of.
"""

from __future__ import annotations

import io
import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from unfed.base.errors import ClientError
from unfed.base.types import AdapterState, Broadcast, ClientUpdate
from unfed.federated.wired import unpack_broadcast

LARGEST_HEAD = 16 * 2**20
"""Bytes of JSON that are read at most: the ids of some hundred thousand rows."""
LARGEST = 4 * 2**30
"""Bytes of a message that are read at most, where nobody says otherwise."""
DEEPEST, BITS = 64, 64
"""Lists and objects of a head within one another; what is written to a record is written with less care than it is
read; and bits of its whole numbers."""
FLOATS, WHOLE = ("float64", "float32", "float16", "bfloat16"), ("int64", "int32", "int16", "int8", "uint16", "uint8")
KNOWN_DTYPES = frozenset(getattr(torch, name) for name in (*FLOATS, *WHOLE, "bool"))
"""Dtypes of tensors that are read: those of an adapter, a wire, and rows. Not all of torch's can be looked at."""
DOWN, UP = "down", "up"
"""Names of what the format of a wire has made of a broadcast and of a client's change: bytes, as one tensor."""
_LENGTH = struct.Struct("<Q")


class MessageError(ClientError):
    """Bytes that are no message, or a message that does not say what it should."""


@dataclass(frozen=True)
class Message:
    """``head``: plain data. ``states``: adapters by name, in order."""

    head: Mapping[str, Any]
    states: Mapping[str, AdapterState] = field(default_factory=dict)

    def get(self, key: str, kind: type[Any] | tuple[type[Any], ...]) -> Any:
        """An entry of the head that must be of a kind; ``MessageError`` when it is not (a bool is no number)."""
        value = self.head.get(key)
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise MessageError(f"the message's {key} is {type(value).__name__}, not {kinds[0].__name__}")
        return value

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors: about what travels."""
        return sum(state.nbytes for state in self.states.values())

    def parts(self) -> Iterator[bytes]:
        """The message's bytes, at most a tensor at a time."""
        states = [[name, len(state)] for name, state in self.states.items()]
        text = json.dumps({"head": self.head, "states": states}, allow_nan=False).encode()
        yield _LENGTH.pack(len(text)) + text
        for state in self.states.values():
            for name, tensor in state.items():
                blob = safetensors.torch.save({name: tensor.contiguous()})
                yield _LENGTH.pack(len(blob))
                yield blob

    def pack(self) -> bytes:
        """The message as one ``bytes``."""
        return b"".join(self.parts())

    @staticmethod
    def peek(data: bytes) -> Mapping[str, Any]:
        """The head of a message alone, for whoever passes it on. ``MessageError``: no message."""
        length = int.from_bytes(data[: _LENGTH.size], "little")
        if length > min(LARGEST_HEAD, len(data) - _LENGTH.size):
            raise MessageError("the message is cut short")
        try:
            head = _said(bytes(data[_LENGTH.size : _LENGTH.size + length]))["head"]
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise MessageError(f"these bytes are no message ({type(e).__name__})") from e
        if not isinstance(head, dict):
            raise MessageError("these bytes are no message")
        return head

    @classmethod
    def read(cls, stream: BinaryIO, largest: int = LARGEST) -> Message:
        """The message that ``stream`` gives next. ``MessageError``: more than ``largest`` bytes, or no message."""
        left = [largest]
        try:
            said = _said(_sized(stream, left, LARGEST_HEAD))
            head, states = said["head"], {}
            for name, count in said["states"]:
                if not isinstance(name, str) or type(count) is not int or count < 0 or name in states:
                    raise MessageError("these bytes are no message (states)")
                tensors: dict[str, Tensor] = {}
                for _ in range(count):
                    more = safetensors.torch.load(_sized(stream, left, largest))
                    if more.keys() & tensors or any(t.dtype not in KNOWN_DTYPES for t in more.values()):
                        raise MessageError("these bytes are no message (tensors)")
                    tensors |= more
                states[name] = AdapterState(tensors)
        except (ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError) as e:
            raise MessageError(f"these bytes are no message ({type(e).__name__})") from e
        if not isinstance(head, dict):
            raise MessageError("these bytes are no message (head)")
        return cls(head, states)

    @classmethod
    def unpack(cls, data: bytes, largest: int = LARGEST) -> Message:
        """The message that ``data`` holds and nothing else: see :meth:`read`."""
        stream = io.BytesIO(data)
        message = cls.read(stream, largest)
        if stream.tell() != len(data):
            raise MessageError("these bytes are no message (something is left over)")
        return message


def _said(text: bytes) -> Any:
    """JSON that can be written again, and counted with: numbers are finite and have at most ``BITS``, text is Unicode
    (no half of a surrogate pair), and it is not too deep. ``ValueError``: it is other."""
    said = json.loads(text)
    level, depth = [said], 0
    while level:
        depth += 1
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += value.values()
                "".join(value).encode()  # UnicodeEncodeError is a ValueError
            elif isinstance(value, list):
                below += value
            elif isinstance(value, str):
                value.encode()
            elif isinstance(value, float) and not math.isfinite(value):
                raise ValueError("a number that is not finite")
            elif isinstance(value, int) and value.bit_length() > BITS:
                raise ValueError("a number that is too large")
        if depth > DEEPEST:
            raise ValueError("too deep")
        level = below
    return said


def _sized(stream: BinaryIO, left: list[int], most: int) -> bytes:
    """The next piece of a stream, whose length stands before it; ``left``: bytes that may still be read."""
    before = stream.read(_LENGTH.size)
    (length,) = _LENGTH.unpack(before) if len(before) == _LENGTH.size else (0,)
    left[0] -= _LENGTH.size + length
    if left[0] < 0 or length > most:
        raise MessageError("the message is larger than what is taken")
    data = stream.read(length)
    if len(before) < _LENGTH.size or len(data) < length:
        raise MessageError("the message is cut short")
    return data


def _as_state(data: bytes) -> AdapterState:
    return AdapterState({"bytes": torch.frombuffer(bytearray(data), dtype=torch.uint8)})


def _as_bytes(state: AdapterState) -> bytes:
    if set(state) != {"bytes"} or state["bytes"].dtype != torch.uint8:
        raise MessageError("the message's bytes are none")
    return state["bytes"].numpy().tobytes()


def broadcast_message(
    head: Mapping[str, Any], broadcast: Broadcast, client_id: str, packed: bytes | None = None
) -> Message:
    """What one client gets of a round's broadcast, with ``head`` beside it. Tensors that stay at the client are left
    out: it has them. ``packed``: adapter and residual as the wire's format has them
    (:func:`unfed.federated.wired.pack_broadcast`)."""
    if packed is None:
        begin = broadcast.start(client_id).without(broadcast.local)
        beside = {"adapter": begin, "residual": broadcast.residual, "control": broadcast.control}
    else:
        beside = {DOWN: _as_state(packed), "control": broadcast.control}
    states = {name: state for name, state in beside.items() if state is not None}
    said = {"frozen": sorted(broadcast.frozen), "local": sorted(broadcast.local), "own": client_id in broadcast.own}
    return Message({**head, "client": client_id, **said}, states)


def read_broadcast(message: Message, opened: AdapterState) -> tuple[str, Broadcast]:
    """The client's name and the broadcast as that client sees it.

    ``opened``: the adapter that the run began with. It says the shapes of a client's adapter of another rank, and what
    tensors that never travel begin with.
    """
    client = message.get("client", str)
    frozen, local = (frozenset(_names(message, key)) for key in ("frozen", "local"))
    if DOWN in message.states:
        return client, _unpacked(message, opened, client, (frozen, local))
    if "adapter" not in message.states:
        raise MessageError("the message brings no adapter")
    begin = message.states["adapter"]
    begin = AdapterState({**{n: t for n, t in opened.items() if n in local}, **begin}) if local else begin
    residual, control = message.states.get("residual"), message.states.get("control")
    if message.get("own", bool):
        return client, Broadcast(opened, residual, frozen, local, {client: begin}, control=control)
    return client, Broadcast(begin, residual, frozen, local, control=control)


def _unpacked(
    message: Message, opened: AdapterState, client: str, stay: tuple[frozenset[str], frozenset[str]]
) -> Broadcast:
    own = {client: opened} if message.get("own", bool) else {}
    like = Broadcast(opened, AdapterState({}), *stay, own=own, control=message.states.get("control"))
    try:
        broadcast = unpack_broadcast(_as_bytes(message.states[DOWN]), like, client)
    except safetensors.SafetensorError as e:
        raise MessageError("these bytes are no broadcast") from e
    return broadcast if broadcast.residual else replace(broadcast, residual=None)


def _names(message: Message, key: str) -> list[str]:
    found = message.get(key, list)
    if not all(isinstance(n, str) for n in found):
        raise MessageError(f"the message's {key} holds something else than names")
    return found


def update_message(update: ClientUpdate, packed: bytes | None = None) -> Message:
    """A client's answer. ``packed``: its change as the wire's format has it, in the adapter's place."""
    head = {
        "client": update.client_id,
        "num_examples": update.num_examples,
        "metrics": dict(update.metrics),
        "nbytes": update.nbytes,
    }
    control = {} if update.control is None else {"control": update.control}
    return Message(head, {**({"adapter": update.adapter} if packed is None else {UP: _as_state(packed)}), **control})


def read_update(message: Message, client_id: str) -> ClientUpdate:
    """The answer of ``client_id``; one that is malformed, or speaks for another client, is refused.

    An answer with :func:`packed_change` has no adapter yet.
    """
    if (said := message.get("client", str)) != client_id:
        raise MessageError(f"the answer is of {said[:80]!r}")
    if len(message.states.keys() & {"adapter", UP}) != 1 or message.states.keys() - {"adapter", UP, "control"}:
        raise MessageError("the answer brings no adapter")
    metrics = message.get("metrics", dict)
    if not all(type(v) in (int, float) and math.isfinite(v) for v in metrics.values()):
        raise MessageError("the answer's metrics hold something else than numbers")
    count, nbytes = message.get("num_examples", int), message.get("nbytes", (int, type(None)))
    if nbytes is not None and nbytes < 0:
        raise MessageError(f"the answer's nbytes is {nbytes}")
    adapter, control = message.states.get("adapter", AdapterState({})), message.states.get("control")
    return ClientUpdate(client_id, adapter, count, metrics, nbytes, control)


def packed_change(message: Message) -> bytes | None:
    """What the wire's format has made of the change of a client's answer; ``None``: the adapter is there as it is."""
    return _as_bytes(message.states[UP]) if UP in message.states else None


def write_frame(stream: BinaryIO, data: bytes) -> None:
    """One message to a pipe, its length before it."""
    stream.write(_LENGTH.pack(len(data)))
    stream.write(data)
    stream.flush()


def read_frame(stream: BinaryIO, largest: int = LARGEST) -> bytes | None:
    """The next message of a pipe; ``None`` at its end. ``MessageError``: one too large, or one that breaks off."""
    before = stream.read(_LENGTH.size)
    if not before:
        return None
    (length,) = _LENGTH.unpack(before) if len(before) == _LENGTH.size else (largest + 1,)
    if length > largest:
        raise MessageError(f"a message of {length} bytes, and at most {largest} are taken")
    data = stream.read(length)
    if len(data) < length:
        raise MessageError("the message breaks off")
    return data
