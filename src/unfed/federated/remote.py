"""Rounds with clients on other machines, whatever carries the messages: who answers, who is late, who is gone."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Protocol

from unfed.base.errors import ClientError
from unfed.base.types import Broadcast, ClientFailure, ClientUpdate
from unfed.federated.messages import Message, read_update
from unfed.federated.schedule import FitTask

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Patience:
    """Seconds, and how often.

    ``work``: for one message's work. ``poll``: how long a site may hold one question whether it is done. A site that
    leaves ``misses`` such questions in a row unanswered, each for ``ping`` seconds more than that, is gone. ``rate``:
    bytes a second that a connection carries at least, for the time that a message may take on its way.
    """

    work: float = 3600.0
    poll: float = 2.0
    ping: float = 3.0
    misses: int = 2
    rate: float = 1e6

    def transfer(self, nbytes: int) -> float:
        """Seconds that ``nbytes`` may take."""
        return 10.0 + nbytes / self.rate


@dataclass(frozen=True)
class State:
    """Where a client is with its work: ``working``, ``done`` (``nbytes`` of answer) or ``failed`` (``reason``)."""

    kind: str
    reason: str = ""
    nbytes: int = 0


class Link(Protocol):
    """Carries messages to clients. Whatever goes wrong on the way is a ``ClientError``; what ends the run is not."""

    def begin(self, client_id: str, message: Message) -> Callable[[], int]:
        """Put a client's message on its way; what is returned waits for the ticket that the client gives for it."""
        ...

    def state(self, client_id: str, ticket: int, wait: float) -> State:
        """Ask a client, which may think about it for ``wait`` seconds. No answer is a ``ClientError``."""
        ...

    def answer(self, client_id: str, ticket: int, nbytes: int) -> BinaryIO:
        """The answer of a client that is done."""
        ...


UNDER_WAY = 64 * 2**20
"""Bytes that are sent at a time, where that is more than one message."""
Encode = Callable[[FitTask, Broadcast, str], Message]
"""A client's share of a round as a message."""
Decode = Callable[[Message, Broadcast, str], ClientUpdate]
"""A client's answer to what was sent. ``MessageError``: it is none."""


class Remote:
    """A :class:`unfed.federated.transport.Transport` over a link.

    All clients work at the same time; each keeps its answer until it is asked for, so one update is in the server's
    memory at a time, in the order of the names.
    """

    def __init__(
        self, link: Link, encode: Encode, patience: Patience = Patience(), decode: Decode | None = None
    ) -> None:
        self._link, self._encode, self._patience = link, encode, patience
        self._decode = decode or (lambda message, _, client: read_update(message, client))

    def fit(
        self, task: FitTask, broadcast: Broadcast, client_ids: Sequence[str]
    ) -> Iterator[ClientUpdate | ClientFailure]:
        """See the protocol. A client that is late, gone, or answers with something else fails; the round goes on."""
        messages = ((c, self._encode(task, broadcast, c)) for c in client_ids)
        for client, answer in self.ask(messages):
            try:
                if isinstance(answer, ClientError):
                    raise answer
                update = self._decode(answer, broadcast, client)
            except ClientError as e:
                log.warning("client %s failed in round %d: %s", client, task.round + 1, e)
                yield ClientFailure(client, str(e))
                continue
            del answer  # neither may stay in memory beside the next one
            yield update
            del update

    def ask(self, messages: Iterable[tuple[str, Message]]) -> Iterator[tuple[str, Message | ClientError]]:
        """Send every client its message and yield the answers in the same order."""
        began = time.monotonic()
        for client, ticket in self._begun(messages):
            try:
                if isinstance(ticket, ClientError):
                    raise ticket
                nbytes = self._wait(client, ticket, began + self._patience.work)
                answer = _opened(Message.read(self._link.answer(client, ticket, nbytes)))
            except ClientError as e:
                yield client, e
                continue
            yield client, answer
            del answer  # or it would stay in memory beside the next one

    def _begun(self, messages: Iterable[tuple[str, Message]]) -> list[tuple[str, int | ClientError]]:
        """All clients at work: their tickets, or what went wrong. Few bytes are on their way at a time."""
        found: list[tuple[str, int | ClientError]] = []
        under_way: deque[tuple[str, int, Callable[[], int]]] = deque()

        def arrived() -> None:
            client, _, ticket = under_way.popleft()
            try:
                found.append((client, ticket()))
            except ClientError as e:
                found.append((client, e))

        for client, message in messages:
            size = message.nbytes
            while under_way and size + sum(n for _, n, _ in under_way) > UNDER_WAY:
                arrived()
            try:
                under_way.append((client, size, self._link.begin(client, message)))
            except ClientError as e:
                found.append((client, e))
        while under_way:
            arrived()
        return found

    def _wait(self, client: str, ticket: int, until: float) -> int:
        """The size of a client's answer, when it has one."""
        patience, missed = self._patience, 0
        while True:
            wait = max(0.0, min(patience.poll, until - time.monotonic()))
            try:
                state = self._link.state(client, ticket, wait)
                missed = 0
            except ClientError as e:
                missed += 1
                if missed >= patience.misses:
                    raise ClientError(f"it does not answer any more ({e})") from e
                continue
            if state.kind == "done":
                return state.nbytes
            if state.kind == "failed":
                raise ClientError(state.reason)
            if time.monotonic() >= until:
                raise ClientError(f"it was not done after {patience.work:g} s")


def _opened(message: Message) -> Message:
    """A message that is an answer, not a refusal."""
    if "refused" in message.head:
        raise ClientError(message.get("refused", str)[:1000])
    return message
