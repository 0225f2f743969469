"""SIGTERM and SIGINT: an exception between two things that are whole, in the main thread alone."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from unfed.base.stopping import STOPS, Stopped, named, stoppable, whole
from unfed.cli.launch import guarded


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(1)  # it comes before this ends, or waits


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_an_exception_that_knows_its_exit_code(number, code, capsys):
    with pytest.raises(Stopped) as raised, stoppable():
        send(number)
    assert raised.value.code == code and isinstance(raised.value, KeyboardInterrupt)
    assert guarded(lambda: send(number) or 0) == code
    said = capsys.readouterr().err
    assert said == f"stopped by {number.name}. A training run goes on from its last finished round with resume=true\n"


def test_what_has_to_be_whole_is_finished_first():
    done = []
    with pytest.raises(Stopped), stoppable():  # noqa: PT012
        with whole():
            with whole():
                send(signal.SIGTERM)
                done.append("inner")
            done.append("outer")
        done.append("after")
    assert done == ["inner", "outer"]


def test_a_second_signal_is_not_kept_waiting():
    done = []
    with pytest.raises(Stopped) as raised, stoppable(), whole():  # noqa: PT012
        send(signal.SIGTERM)
        done.append("first")
        send(signal.SIGINT)
        done.append("second")
    assert done == ["first"] and raised.value.number == signal.SIGINT


def test_an_error_is_not_hidden_by_a_signal_that_waits():
    with stoppable():
        with pytest.raises(ZeroDivisionError), whole():  # noqa: PT012
            send(signal.SIGTERM)
            raise ZeroDivisionError
        with whole():
            pass  # and the signal is forgotten with it


def test_outside_the_main_thread_and_for_signals_that_are_ignored_nothing_changes():
    before = [signal.getsignal(n) for n in STOPS]
    seen = []

    def look():
        with stoppable():
            seen.extend(signal.getsignal(n) for n in STOPS)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == before
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stoppable():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            send(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before[0])
    assert [signal.getsignal(n) for n in STOPS] == before


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_that_a_library_made_an_interrupt_of_has_its_name_again(number):
    with stoppable():
        plain = KeyboardInterrupt()
        assert named(plain) is plain  # nobody sent one
        with pytest.raises(Stopped):
            os.kill(os.getpid(), number)
        found = named(plain)
        assert isinstance(found, Stopped) and found.code == 128 + number
        assert named(found) is found
    with stoppable():
        assert named(plain) is plain
