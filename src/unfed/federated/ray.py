"""Workers as Ray actors, on this machine or on a cluster that runs already.

Written against Ray 2.60. Ray pickles what passes between this process and its own actors, so a cluster is trusted. What
passes here is bytes (:class:`unfed.federated.messages.Message`), numbers, and the function that makes a worker, by its
name: nothing of a client's is unpickled.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported, and by what it starts
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # a worker without a GPU sees none; silences a notice

import numpy as np
import ray  # pyright: ignore[reportMissingImports]
from ray.exceptions import RayError, RayTaskError  # pyright: ignore[reportMissingImports]

from unfed.base.errors import UnfedError
from unfed.base.stopping import named
from unfed.federated.child import end_with_parent
from unfed.federated.messages import Message
from unfed.federated.pool import WorkerDiedError

LARGEST = 1 << 62
"""Bytes of a message that are read at most: within a trusted cluster, any."""
_SHORT = "/tmp" if Path("/tmp").is_dir() else None  # noqa: S108 - private; the names of sockets below must be short
SECONDS_TO_CONNECT = 10.0
SHARE_OF_MEMORY, LEAST_STORE = 0.3, 128 * 2**20
"""Of the machine's memory, what Ray's object store gets at most; bytes that it gets at least."""


class Answering(Protocol):
    """What a worker is: see :class:`unfed.app.ray_worker.RayWorker`."""

    told: Message

    def answer(self, message: Message, shared: Message) -> Message:
        """The answer to a task; raises nothing."""
        ...


Opener = Callable[[Message], Answering]
"""Makes a worker of the first message, in the worker's process. A function of a module that is installed there."""


@dataclass(frozen=True)
class Place:
    """Where workers are. ``workers``: how many (``None``: one for each GPU, or one); ``gpus``: of each (``None``: 1
    where there is one); ``address``: of a cluster that runs (``None``: one is started here); ``most``: of workers that
    would have something to do; ``memory``: bytes that are in the object store at a time."""

    workers: int | None = None
    gpus: float | None = None
    address: str | None = None
    most: int = 1 << 30
    memory: int = 0

    def sized(self, gpus_there: float, cpus_there: float) -> tuple[int, float]:
        """How many workers there are, and the GPUs of each. ``UnfedError``: there is no room for them."""
        each = (1.0 if gpus_there else 0.0) if self.gpus is None else self.gpus
        room = math.floor(gpus_there / each + 1e-6) if each else None
        wanted = (max(1, room) if room is not None else 1) if self.workers is None else self.workers
        if room is not None and wanted > room:
            raise UnfedError(
                f"engine.workers={wanted}: there are {gpus_there:g} GPUs, and engine.gpus_per_worker={each:g}; take "
                f"{room} workers, or fewer GPUs for each (0: on CPUs)"
            )
        needed = min(wanted, max(1, self.most))
        if needed > cpus_there:
            raise UnfedError(f"engine.workers={wanted}: the cluster has {cpus_there:g} CPUs, and each worker takes one")
        return needed, each


@contextmanager
def connected(place: Place) -> Iterator[tuple[int, float]]:
    """Ray at hand, inside: how many workers there are to be, and the GPUs of each.

    A cluster that was started here is stopped at the end, and its files, which may hold updates, are deleted; one that
    ran before goes on. In a process that uses Ray already, that one is used. ``UnfedError``: there is none, or no room.
    """
    if ray.is_initialized():
        yield _sized(place)
        return
    own = tempfile.mkdtemp(prefix="unfed-", dir=_SHORT)
    try:
        with _signals_as_they_are():
            _begin(place, own)
        yield _sized(place)
    except KeyboardInterrupt as e:
        raise named(e) from None
    finally:
        ray.shutdown()
        shutil.rmtree(own, ignore_errors=True)


@contextmanager
def _signals_as_they_are() -> Iterator[None]:
    """Ray puts a handler of its own in the place of whatever SIGTERM did."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGTERM, before)


def _begin(place: Place, own: str) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if place.address is not None:
            _knock(place.address)
            ray.init(address=place.address, **quiet)
            return
        if "RAY_AUTH_TOKEN_PATH" not in os.environ:
            # Ray listens on every address of the machine, and asks for a token: else for one in the user's home.
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        ray.init(
            address="local",
            # Ray starts as many idle processes at once.
            num_cpus=max(min(place.workers or 1, max(1, place.most)), _gpus_here()),
            include_dashboard=False,
            object_store_memory=_store(place.memory),
            _temp_dir=own,
            **quiet,
        )
    except (RayError, ConnectionError, RuntimeError, ValueError, OSError) as e:  # RayError: it asks for a token
        why = " ".join(str(e).split())[:300]
        if place.address is None:
            raise UnfedError(f"engine=ray: Ray cannot be started here: {why}") from e
        raise UnfedError(f"engine.address={place.address}: no Ray cluster could be reached there: {why}") from e


def _knock(address: str) -> None:
    """``OSError`` where nobody listens: Ray would go on trying for minutes."""
    host, _, port = address.rpartition(":")
    if host:
        socket.create_connection((host.strip("[]"), int(port)), SECONDS_TO_CONNECT).close()


def _gpus_here() -> int:
    import torch

    return torch.cuda.device_count()


def _store(needed: int) -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(LEAST_STORE, min(needed, int(SHARE_OF_MEMORY * total)))


def _sized(place: Place) -> tuple[int, float]:
    there = ray.cluster_resources()
    return place.sized(there.get("GPU", 0.0), there.get("CPU", 0.0))


def _packed(message: Message) -> np.ndarray:
    """A message's bytes ``(n,)``, uint8: of an array Ray makes no copy when it is read."""
    whole = bytearray()  # grows in place, where joined parts would be there twice
    for part in message.parts():
        whole += part
    return np.frombuffer(whole, dtype=np.uint8)


class _Bytes:
    """An array's bytes as a stream, which copies no more than is read."""

    def __init__(self, array: np.ndarray) -> None:
        self._view, self._at = array.data, 0

    def read(self, size: int) -> bytes:
        """The next ``size`` bytes, or what is left."""
        self._at += size
        return bytes(self._view[self._at - size : self._at])


def _unpacked(array: np.ndarray) -> Message:
    stream: Any = _Bytes(array)
    return Message.read(stream, LARGEST)


class UnfedWorker:
    """A worker's process."""

    def __init__(self, opener: Opener, opening: np.ndarray) -> None:
        # Ray's own watch over a killed cluster does not reach a worker that trains.
        threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
        self._worker = opener(_unpacked(opening))
        self._shared = (-1, Message({}))

    def told(self) -> tuple[bool, np.ndarray]:
        """What the worker tells of itself."""
        return True, _packed(self._worker.told)

    def do(self, data: np.ndarray, number: int, shared: Sequence[Any]) -> tuple[bool, np.ndarray]:
        """The answer to a message; ``shared``: what it has in common with others of the same ``number``."""
        if self._shared[0] != number:
            self._shared = (number, _unpacked(ray.get(shared[0])))
        return True, _packed(self._worker.answer(_unpacked(data), self._shared[1]))


@dataclass(frozen=True, eq=False)
class _Ticket:
    """``ended`` says that a call has come to an end, ``answer`` stays where it was made until it is asked for."""

    ended: Any
    answer: Any


class RayPool:
    """A :class:`unfed.federated.pool.Pool` of ``workers`` actors with ``gpus`` GPUs and one CPU each, inside
    :func:`connected`."""

    def __init__(self, workers: int, gpus: float, opener: Opener, opening: Message) -> None:
        self.size = workers
        self._opener, self._opening = opener, ray.put(_packed(opening))
        options = {"num_cpus": 1, "num_gpus": gpus, "max_restarts": 0, "scheduling_strategy": "SPREAD"}
        self._class = ray.remote(UnfedWorker).options(**options)
        self._actors: dict[int, Any] = {}
        self._numbers = itertools.count()

    def start(self, worker: int) -> _Ticket:
        """See the protocol."""
        if worker in self._actors:
            ray.kill(self._actors[worker])
        self._actors[worker] = actor = self._class.remote(self._opener, self._opening)
        return _Ticket(*actor.told.options(num_returns=2).remote())

    def share(self, message: Message) -> tuple[int, Any]:
        """See the protocol."""
        return next(self._numbers), ray.put(_packed(message))

    def begin(self, worker: int, message: Message, shared: tuple[int, Any]) -> _Ticket:
        """See the protocol."""
        number, common = shared
        # In a list: the worker fetches it once a round, not for each of its clients.
        return _Ticket(*self._actors[worker].do.options(num_returns=2).remote(_packed(message), number, [common]))

    def wait(self, handles: Sequence[Any], seconds: float) -> _Ticket | None:
        """See the protocol."""
        ended, _ = ray.wait([ticket.ended for ticket in handles], num_returns=1, timeout=seconds)
        return next((ticket for ticket in handles if ended and ticket.ended == ended[0]), None)

    def check(self, handle: Any) -> None:
        """See the protocol."""
        _got(handle.ended)

    def answer(self, handle: Any) -> Message:
        """See the protocol."""
        return _unpacked(_got(handle.answer))

    def close(self) -> None:
        """End every worker."""
        for actor in self._actors.values():
            ray.kill(actor)


def _got(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError:  # a mistake in what runs there, which is ours
        raise
    except RayError as e:
        raise WorkerDiedError(_why(e)) from e


def _why(error: Exception) -> str:
    """Ray's reason in one line: it adds advice, ids and logs below."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]
