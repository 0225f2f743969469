"""Rounds whose clients are dealt to workers, each with a base model: who is free, who died, whose turn it is."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from unfed.base.errors import ClientError, UnfedError
from unfed.base.types import Broadcast, ClientFailure, ClientUpdate
from unfed.federated.messages import Message
from unfed.federated.schedule import FitTask

log = logging.getLogger(__name__)
TRIES = 2
"""How often a client is given to a worker that dies of it, or with it; and how often in a row a worker is started."""
AHEAD = 16
"""Clients, beyond one for each worker, that are begun while an earlier one's update is waited for: so many updates wait
for their turn."""
Handle = Hashable
"""Something that a pool is asked about later."""


class WorkerDiedError(ClientError):
    """A worker's process ended before it had answered."""


class Pool(Protocol):
    """Processes that answer messages, numbered from 0. Each does one thing at a time."""

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def start(self, worker: int) -> Handle:
        """Start a worker, ending the process that it was before; its answer is what it tells of itself."""
        ...

    def share(self, message: Message) -> Any:
        """Put what several tasks need where every worker can read it, for as long as what is returned is held."""
        ...

    def begin(self, worker: int, message: Message, shared: Any) -> Handle:
        """Give a worker a task."""
        ...

    def wait(self, handles: Sequence[Handle], seconds: float) -> Handle | None:
        """One that has come to an end, good or bad; ``None``: there is none after ``seconds``."""
        ...

    def check(self, handle: Handle) -> None:
        """Raise ``WorkerDiedError`` where what has come to an end is no answer. The answer stays where it is."""
        ...

    def answer(self, handle: Handle) -> Message:
        """The answer. ``WorkerDiedError``: it is lost."""
        ...


class Errands(Protocol):
    """How a client's share of a round becomes a message, and a worker's answer an update."""

    def share(self, broadcast: Broadcast) -> Message:
        """What all clients of a round are sent."""
        ...

    def encode(self, task: FitTask, broadcast: Broadcast, client_id: str) -> Message:
        """What one client is sent beside."""
        ...

    def decode(self, task: FitTask, client_id: str, answer: Message) -> ClientUpdate | ClientFailure:
        """What came back, called once for each client in the order of the round. What ends the run is raised."""
        ...


@dataclass(frozen=True)
class _Given:
    """A task that a worker has, or a worker that starts (no client); ``until``: on the monotonic clock."""

    worker: int
    until: float
    client: str = ""


class Dealt:
    """A :class:`unfed.federated.transport.Transport` over a pool.

    A client goes to the next worker that is free. Updates come back as they are done and wait with the pool until it is
    their turn: one is in this process's memory at a time, in the order of the clients. A worker that dies is started
    again, and its client tried once more; dying twice, it has failed in this round. So has one that takes longer than
    ``timeout`` seconds. ``greet`` is called with a worker's number and what it tells, whenever one is started.
    """

    def __init__(
        self, pool: Pool, errands: Errands, timeout: float, greet: Callable[[int, Message], None] = lambda *_: None
    ) -> None:
        self._pool, self._errands, self._timeout, self._greet = pool, errands, timeout, greet
        self._free: list[int] = []
        self._astray: list[int] = []
        self._starting: dict[Handle, _Given] = {}
        self._failed_starts: Counter[int] = Counter()

    def open(self) -> int:
        """Start every worker and wait for all of them; how many there are. ``UnfedError``: none could be started."""
        for worker in range(self._pool.size):
            self._start(worker)
        while self._starting:
            self._started(self._pool.wait(list(self._starting), self._left(self._starting)))
        if not self._free:
            raise UnfedError("no worker could be started: each died as it opened the model (too little memory?)")
        return len(self._free)

    def fit(
        self, task: FitTask, broadcast: Broadcast, client_ids: Sequence[str]
    ) -> Iterator[ClientUpdate | ClientFailure]:
        """See the protocol."""
        while self._astray:
            self._start(self._astray.pop())
        shared = self._pool.share(self._errands.share(broadcast))
        round_ = _Round(deque(client_ids))
        try:
            for place, client in enumerate(client_ids):
                answer = self._answer(round_, (task, broadcast, shared), client, place)
                if isinstance(answer, Message):
                    answer = self._errands.decode(task, client, answer)
                if isinstance(answer, ClientFailure):
                    log.warning("client %s failed in round %d: %s", client, task.round + 1, answer.reason)
                yield answer
                del answer  # or it would stay in memory beside the next one
        finally:
            self._astray += [given.worker for given in round_.running.values()]  # the round was given up

    def _answer(
        self, round_: _Round, sent: tuple[FitTask, Broadcast, Any], client: str, place: int
    ) -> Message | ClientFailure:
        """What ``client``, the ``place``-th of its round, gives back; others are dealt and collected meanwhile."""
        task, broadcast, shared = sent
        while True:
            while client not in round_.done:
                while self._free and round_.may_begin(place, self._pool.size + AHEAD):
                    worker, other = self._free.pop(0), round_.waiting.popleft()
                    message = self._errands.encode(task, broadcast, other)
                    handle = self._pool.begin(worker, message, shared)
                    round_.running[handle] = _Given(worker, time.monotonic() + self._timeout, other)
                self._collect(round_)
            found = round_.done.pop(client)
            if isinstance(found, ClientFailure):
                return found
            worker, handle = found
            try:
                return self._pool.answer(handle)
            except WorkerDiedError as e:  # its machine went with the answer on it
                round_.died(client, e)
                if worker in self._free:  # or the client would be given to it again, and die a second time of one fault
                    self._free.remove(worker)
                    self._start(worker)

    def _collect(self, round_: _Round) -> None:
        """Wait for the next worker that is done or ready, or too late."""
        watched = {**self._starting, **round_.running}
        if not watched:
            raise UnfedError("no worker is left: each one died again as it was started (too little memory?)")
        handle = self._pool.wait(list(watched), self._left(watched))
        if handle is None or handle in self._starting:
            self._started(handle)
        if handle is None:
            now = time.monotonic()
            for late in [h for h, given in round_.running.items() if given.until <= now]:
                given = round_.running.pop(late)
                round_.done[given.client] = ClientFailure(given.client, f"it was not done after {self._timeout:g} s")
                self._start(given.worker)
        elif handle in round_.running:
            given = round_.running.pop(handle)
            try:
                self._pool.check(handle)
            except WorkerDiedError as e:
                log.warning("worker %d died at client %s: %s", given.worker, given.client, e)
                round_.died(given.client, e)
                self._start(given.worker)
            else:
                round_.done[given.client] = (given.worker, handle)
                self._free.append(given.worker)

    def _start(self, worker: int) -> None:
        self._starting[self._pool.start(worker)] = _Given(worker, time.monotonic() + self._timeout)

    def _started(self, handle: Handle | None) -> None:
        """A worker that was started is ready, or is not: it died, or (no handle) one is too late. Then it is tried once
        more, and after that done without."""
        now = time.monotonic()
        ended = [handle] if handle is not None else [h for h, given in self._starting.items() if given.until <= now]
        for one in ended:
            worker = self._starting.pop(one).worker
            try:
                if handle is None:
                    raise WorkerDiedError(f"it was not ready after {self._timeout:g} s")
                self._pool.check(one)
                self._greet(worker, self._pool.answer(one))
            except WorkerDiedError as e:
                self._failed_starts[worker] += 1
                log.warning("worker %d could not be started: %s", worker, e)
                if self._failed_starts[worker] < TRIES:
                    self._start(worker)
                continue
            self._failed_starts[worker] = 0
            self._free.append(worker)

    @staticmethod
    def _left(watched: dict[Handle, _Given]) -> float:
        return max(0.0, min(given.until for given in watched.values()) - time.monotonic())


class _Round:
    """Where the clients of one round are: waiting, running, or done (who has their answer, under which handle; or
    why there is none)."""

    def __init__(self, waiting: deque[str]) -> None:
        self.waiting, self._order = waiting, {c: n for n, c in enumerate(waiting)}
        self.running: dict[Handle, _Given] = {}
        self.done: dict[str, tuple[int, Handle] | ClientFailure] = {}
        self._deaths: Counter[str] = Counter()

    def may_begin(self, place: int, window: int) -> bool:
        """Whether the next one is near enough to the one whose turn it is."""
        return bool(self.waiting) and self._order[self.waiting[0]] < place + window

    def died(self, client: str, why: WorkerDiedError) -> None:
        """A worker died at a client, which is tried again first of all, or has failed."""
        self._deaths[client] += 1
        if self._deaths[client] < TRIES:
            self.waiting.appendleft(client)
        else:
            reason = f"its worker died, and again when it was tried once more ({why})"
            self.done[client] = ClientFailure(client, reason)
