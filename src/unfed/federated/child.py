"""Work done in a child process, so that its death is one client's failure and not the end of its machine's part.

The child reads messages from its standard input and answers each on its standard output (see
:func:`unfed.federated.messages.write_frame`); what it prints goes to standard error.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

from unfed.base.errors import ClientError
from unfed.federated.messages import Message, MessageError, read_frame, write_frame

STOP_SECONDS = 5.0
PARENT = "UNFED_PARENT"
"""Environment variable: who started a child, which may be gone before the child can ask."""


class ChildDiedError(ClientError):
    """The child process ended before it had answered."""


class Child:
    """A child process that answers messages; started when the first one is sent, and again after it has died.

    ``opening``: sent first to every new child, so that a new one knows what the old one was told.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._command = list(command)
        self._environment = {**(os.environ if environment is None else environment), PARENT: str(os.getpid())}
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self.opening: bytes | None = None

    @property
    def pid(self) -> int | None:
        """Its process id, while there is one."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def ask(self, data: bytes) -> bytes:
        """The child's answer to one message. ``ChildDiedError``: it ended instead."""
        with self._lock:
            process, new = self._process, self.pid is None
            if process is None or new:
                process = self._started()
                if self.opening is not None and self.opening is not data:
                    self._exchange(process, self.opening)
            return self._exchange(process, data)

    def stop(self) -> None:
        """End it, also in the middle of its work."""
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _started(self) -> subprocess.Popen[bytes]:
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self._environment
        )
        return self._process

    def _exchange(self, process: subprocess.Popen[bytes], data: bytes) -> bytes:
        assert process.stdin is not None
        assert process.stdout is not None
        answer = None
        with contextlib.suppress(OSError, MessageError):  # a broken pipe; what it wrote in part
            write_frame(process.stdin, data)  # pyright: ignore[reportArgumentType]
            answer = read_frame(process.stdout)  # pyright: ignore[reportArgumentType]
        if answer is None:
            raise ChildDiedError(f"its training process ended ({_how(process)})")
        return answer


def _how(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return "it stopped answering"
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def end_with_parent(parent: int) -> None:
    """End this process when ``parent`` does, which may be killed in the middle of its work; to be run in a thread."""
    while os.getppid() == parent:
        time.sleep(2.0)
    os._exit(1)


def serve(answer: Callable[[Message], Message]) -> None:
    """The child's side: answer messages until the parent closes the pipe. ``answer`` raises nothing."""
    parent = int(os.environ.get(PARENT, os.getppid()))
    threading.Thread(target=end_with_parent, args=(parent,), daemon=True).start()
    # The pipe is kept apart from what libraries print.
    pipe = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    source: BinaryIO = sys.stdin.buffer
    while (data := read_frame(source)) is not None:
        write_frame(pipe, _packed_answer(answer, data))


def _packed_answer(answer: Callable[[Message], Message], data: bytes) -> bytes:
    """No message ends the child, with what it has opened: one that is none is refused, and so is an answer that cannot
    be written."""
    try:
        return answer(Message.unpack(data)).pack()
    except (MessageError, ValueError) as e:
        said = str(e) if isinstance(e, MessageError) else "its answer cannot be written"
        return Message({"refused": said}).pack()


@dataclass
class _Job:
    ticket: int
    answer: bytes | None = None
    error: str | None = None
    done: threading.Event = field(default_factory=threading.Event)


class Desk:
    """Takes one message at a time to a child, and hands out its answer later: nobody holds a connection meanwhile.

    A new message ends the work on the one before, which its sender has given up.
    """

    def __init__(self, child: Child) -> None:
        self._child, self._job, self._lock = child, _Job(0), threading.Lock()
        self._job.done.set()

    def begin(self, data: bytes, *, opening: bool = False) -> int:
        """Start work on a message; the ticket under which its answer can be asked for. ``opening``: see
        :class:`Child`."""
        with self._lock:
            if not self._job.done.is_set():
                self._child.stop()
                self._job.done.wait()
            if opening:
                self._child.opening = data
            self._job = job = _Job(self._job.ticket + 1)
        threading.Thread(target=self._work, args=(job, data), daemon=True).start()
        return job.ticket

    def _work(self, job: _Job, data: bytes) -> None:
        try:
            job.answer = self._child.ask(data)
        except ChildDiedError as e:
            job.error = str(e)
        except Exception as e:  # noqa: BLE001 - whoever asks must be told, not left waiting
            job.error = type(e).__name__
        job.done.set()

    def state(self, ticket: int, wait: float) -> tuple[str, str]:
        """``working``, ``done`` or ``failed`` and why, after ``wait`` seconds at most."""
        job = self._job
        if ticket != job.ticket:
            return "failed", "it was given other work in the meantime"
        if not job.done.wait(wait):
            return "working", ""
        return ("done", str(len(job.answer))) if job.answer is not None else ("failed", job.error or "no answer")

    def answer(self, ticket: int) -> bytes:
        """The answer to the message of ``ticket``, which is done."""
        job = self._job
        if ticket != job.ticket or job.answer is None:
            raise MessageError("there is no such answer")
        return job.answer

    def close(self) -> None:
        """End the child."""
        self._child.stop()
