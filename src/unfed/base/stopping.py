"""SIGTERM and SIGINT end a run between two states that are whole: what is being saved is saved first."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

STOPS = (signal.SIGINT, signal.SIGTERM)
"""What ends a run: Ctrl-C, and what ``kill``, a batch system or a shutdown sends."""


class Stopped(KeyboardInterrupt):
    """A signal asked for the end; libraries let it pass, as they do Ctrl-C.

    ``where``: how to go on, as far as somebody on the way knows it.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number
        self.where: str | None = None

    @property
    def code(self) -> int:
        """The exit code that shells give to a process that such a signal ended: 130 or 143."""
        return 128 + self.number


_held: list[int] = []
"""An entry for each :func:`whole` that is open."""
_waiting: list[int] = []
"""A signal that came meanwhile."""
_last: list[int] = []
"""The signal that ends the run."""


def _on_signal(number: int, _frame: FrameType | None) -> None:
    if _held and not _waiting:
        _waiting.append(number)
        return
    _last[:] = [number]
    raise Stopped(number)  # the second one is not asked to wait


def named(error: KeyboardInterrupt) -> KeyboardInterrupt:
    """``error``, or the :class:`Stopped` that a library in C has made a plain ``KeyboardInterrupt`` of."""
    return error if isinstance(error, Stopped) or not _last else Stopped(_last[0])


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM and SIGINT raise :class:`Stopped` in the main thread; afterwards they do what they did before.

    Elsewhere than in the main thread nothing changes, nor for a signal that is ignored (``nohup``) or handled already.
    """
    before = {}
    _last.clear()
    if threading.current_thread() is threading.main_thread():
        usual = (signal.SIG_DFL, signal.default_int_handler)
        before = {n: old for n in STOPS if (old := signal.getsignal(n)) in usual}
    for number in before:
        signal.signal(number, _on_signal)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def whole() -> Iterator[None]:
    """What is done here is done to its end; a signal that comes meanwhile acts afterwards, a second one at once."""
    _held.append(1)
    done = False
    try:
        yield
        done = True
    finally:
        _held.pop()
        number = _waiting.pop() if _waiting and not _held else None
        if done and number is not None:
            raise Stopped(number)
