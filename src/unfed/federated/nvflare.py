"""Messages carried by NVFlare's Collab calls: mutual TLS, a certificate for each site's name.

Written against NVFlare 2.9. A call lasts as long as a message takes on its way, never as long as the work: NVFlare
would notice a killed site only at the call's end.
"""

from __future__ import annotations

import ctypes
import gc
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from nvflare.collab import collab  # pyright: ignore[reportMissingImports]
from nvflare.collab.api.exceptions import RunAborted  # pyright: ignore[reportMissingImports]
from nvflare.fuel.utils import buffer_list  # pyright: ignore[reportMissingImports]

from unfed.base.errors import ClientError
from unfed.federated.child import Child, Desk
from unfed.federated.messages import LARGEST, Message, MessageError
from unfed.federated.remote import Patience, State

SERVER = "server"
"""NVFlare's name for the job's server, whatever its host is called."""
PIECE = 12 * 2**20
"""Bytes of a message that travel in one call."""


def _without_bytes_in_logs() -> None:
    """Keep NVFlare from spelling out what a site receives.

    ``Adapter.call`` of NVFlare 2.9 formats the bytes of every request for a line of its debug log, whether that is
    written or not: three characters a byte, a third or more of the CPU time that a round takes at all parties.
    """
    received: Any = getattr(buffer_list, "ConsumableBufferList", None)
    if received is not None:
        received.__repr__ = lambda self: f"<{len(self)} pieces>"


_without_bytes_in_logs()


_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def _give_back() -> None:
    """Return freed memory to the system, where the C library can (glibc).

    The pieces of a message and NVFlare's copies are freed in the heaps of many threads, where few of their gaps are
    of use to the next ones, and some only when garbage is collected: without this a server at 100 MB holds half as much
    again.
    """
    gc.collect()
    if _TRIM is not None:
        _TRIM(0)


class CollabLink:
    """A :class:`unfed.federated.remote.Link`; to be used inside ``@collab.main``, in its own thread.

    Messages travel in pieces, for NVFlare holds several copies of whatever it sends or gets. An aborted job raises
    NVFlare's ``RunAborted``, which is no client's failure and ends the run.
    """

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        gc.collect()
        gc.freeze()  # what libraries have made so far: each collection from here on is short

    @staticmethod
    def sites() -> list[str]:
        """The sites of the job."""
        return sorted(str(c.name) for c in collab.clients)

    def begin(self, client_id: str, message: Message) -> Callable[[], int]:
        """See the protocol."""
        piece, first = bytearray(), True
        for part in message.parts():
            piece += part
            while len(piece) > PIECE:
                now = bytes(memoryview(piece)[:PIECE])
                self._call(client_id, self._patience.transfer(PIECE), "put", data=now, first=first)()
                del piece[:PIECE]
                first = False
                _give_back()
        given = {"data": bytes(piece), "first": first}
        arrived = self._call(client_id, self._patience.transfer(len(piece)), "begin", **given)
        return lambda: _whole(arrived(), -1)

    def state(self, client_id: str, ticket: int, wait: float) -> State:
        """See the protocol."""
        found = self._call(client_id, wait + self._patience.ping, "state", ticket=ticket, wait=float(wait))()
        if not isinstance(found, list | tuple) or len(found) != 3:
            raise MessageError("the site's answer is no state")
        kind, reason, nbytes = found
        return State(str(kind), str(reason)[:1000], _whole(nbytes, 0))

    def answer(self, client_id: str, ticket: int, nbytes: int) -> BinaryIO:
        """See the protocol. Pieces are fetched as they are read."""

        def fetch(offset: int) -> bytes:
            if offset:
                _give_back()
            most = min(PIECE, nbytes - offset)
            found = self._call(client_id, self._patience.transfer(most), "answer", ticket=ticket, offset=offset)()
            if not isinstance(found, bytes) or len(found) != most:
                raise MessageError("the site's answer is no message")
            return found

        return io.BufferedReader(_Pieces(fetch, nbytes))

    def _call(self, client_id: str, timeout: float, method: str, **given: Any) -> Callable[[], Any]:
        """Start a call at one site; what is returned waits for it."""
        if collab.is_aborted:
            raise RunAborted("the job was aborted")
        try:
            site = collab.get_clients([client_id])
        except RuntimeError as e:
            raise ClientError("it takes no part in this job") from e
        results = getattr(site(blocking=False, timeout=timeout), method)(**given)

        def wait() -> Any:
            for _, value in results:
                return value
            if collab.is_aborted:
                raise RunAborted("the job was aborted")
            error = results.failures.get(client_id)
            cause = getattr(error, "cause", None)
            if isinstance(cause, RunAborted):
                raise RunAborted("the job was aborted") from cause
            raise ClientError(f"no answer to {method} within {timeout:g} s" if _late(cause) else _words(cause))

        return wait


class _Pieces(io.RawIOBase):
    """A stream of ``nbytes`` whose pieces are fetched when they are needed."""

    def __init__(self, fetch: Callable[[int], bytes], nbytes: int) -> None:
        self._fetch, self._nbytes = fetch, nbytes
        self._piece, self._offset = memoryview(b""), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._piece and self._offset < self._nbytes:
            self._piece = memoryview(self._fetch(self._offset))
            self._offset += len(self._piece)
        count = min(len(buffer), len(self._piece))
        buffer[:count] = self._piece[:count]
        self._piece = self._piece[count:]
        return count


def _whole(value: Any, least: int) -> int:
    """A number that a site tells."""
    if type(value) is not int or not least <= value <= LARGEST:
        raise MessageError("the site's answer is no number that it could be")
    return value


def _late(cause: Any) -> bool:
    return isinstance(cause, TimeoutError)


def _words(cause: Any) -> str:
    """NVFlare's reason, in one line."""
    return " ".join(str(cause).split())[:200] or "no answer"


class SiteDesk:
    """What a site publishes to the server of a job, and to nobody else: other sites' calls are refused.

    The work is done in a child process, which may die without taking the site's part in the job with it.
    """

    def __init__(self, command: Callable[[str, Path], Sequence[str]], largest: Callable[[Path], int]) -> None:
        self._command, self._read_largest = command, largest
        self._desk: Desk | None = None
        self._largest, self._length, self._pieces = 0, 0, bytearray()

    @collab.init
    def start(self) -> None:
        """Called by NVFlare when the job begins."""
        place = Path(collab.workspace.get_site_config_dir())
        self._largest = self._read_largest(place)
        self._desk = Desk(Child(self._command(str(collab.site_name), place)))

    @collab.final
    def close(self) -> None:
        """Called by NVFlare when the job is over."""
        if self._desk is not None:
            self._desk.close()

    @collab.publish
    def put(self, data: bytes, first: bool) -> None:
        """Take a piece of a message; ``first``: it begins a new one."""
        self._checked()
        if first:
            self._pieces = bytearray()
        # What is too large is not kept, but its length is, so that it will be refused.
        self._length = len(data) + (0 if first else self._length)
        if self._length <= self._largest:
            self._pieces += data

    @collab.publish
    def begin(self, data: bytes, first: bool) -> int:
        """Take the last piece of a message, ``first`` where it is the only one; a ticket, or -1 for one that is too
        large or none."""
        desk = self._checked()
        self.put(data, first)
        whole, self._pieces = bytes(self._pieces), bytearray()
        try:
            opening = Message.peek(whole).get("do") == "open"
        except MessageError:
            return -1
        return desk.begin(whole, opening=opening) if self._length <= self._largest else -1

    @collab.publish
    def state(self, ticket: int, wait: float) -> list[Any]:
        """How far it is: see :meth:`unfed.federated.child.Desk.state`."""
        desk = self._checked()
        if ticket == -1:
            return ["failed", f"it takes messages of at most {self._largest / 1e6:g} MB", 0]
        kind, said = desk.state(int(ticket), min(float(wait), 10.0))
        return [kind, "" if kind == "done" else said, int(said) if kind == "done" else 0]

    @collab.publish
    def answer(self, ticket: int, offset: int) -> bytes:
        """A piece of the answer, from ``offset`` on."""
        begin = max(0, int(offset))
        return self._checked().answer(int(ticket))[begin : begin + PIECE]

    def _checked(self) -> Desk:
        if collab.caller != SERVER:
            raise PermissionError("only the server may ask")
        if self._desk is None:
            raise RuntimeError("the job has not begun")
        return self._desk
