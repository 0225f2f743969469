"""Work in a child process: it may print, die and be replaced, and nobody waits for it in vain."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from unfed.federated.child import Child, ChildDiedError, Desk
from unfed.federated.messages import Message, MessageError

PROGRAM = """
import os, time
from unfed.federated.child import serve
from unfed.federated.messages import Message
known = []
def answer(message):
    print("library talk on stdout", flush=True)
    what = message.head["do"]
    if what == "open":
        known.append(message.head["what"])
    if what == "die":
        os._exit(3)
    if what == "sleep":
        time.sleep(60)
    return Message({"pid": os.getpid(), "known": known})
serve(answer)
"""


def message(do, **head):
    return Message({"do": do, **head}).pack()


@pytest.fixture
def child():
    made = Child([sys.executable, "-c", PROGRAM])
    yield made
    made.stop()


def ask(child, *given, **head):
    return Message.unpack(child.ask(message(*given, **head))).head


def ended(desk, ticket, seconds=30.0):
    until = time.monotonic() + seconds
    while (state := desk.state(ticket, 0.2))[0] == "working" and time.monotonic() < until:
        pass
    return state


def test_a_child_answers_keeps_what_it_knows_and_is_replaced_when_it_dies(child):
    assert child.pid is None
    child.opening = message("open", what="run 1")
    first = ask(child, "hello")
    assert first == {"pid": child.pid, "known": ["run 1"]}
    assert ask(child, "hello") == first
    with pytest.raises(ChildDiedError, match="exit code 3"):
        ask(child, "die")
    again = ask(child, "hello")
    assert again["pid"] != first["pid"] and again["known"] == ["run 1"]
    os.kill(again["pid"], signal.SIGKILL)
    while child.pid is not None:
        time.sleep(0.01)
    assert ask(child, "hello")["known"] == ["run 1"]
    child.stop()
    assert child.pid is None


def test_a_desk_hands_out_answers_by_ticket_and_gives_up_work_that_nobody_waits_for(child):
    desk = Desk(child)
    ticket = desk.begin(message("open", what="run 2"), opening=True)
    assert ended(desk, ticket) == ("done", str(len(desk.answer(ticket))))
    slow = desk.begin(message("sleep"))
    assert desk.state(slow, 0.05) == ("working", "")
    with pytest.raises(MessageError, match="no such answer"):
        desk.answer(slow)
    began = time.monotonic()
    ticket = desk.begin(message("hello"))
    assert desk.state(slow, 0.0)[0] == "failed"
    assert ended(desk, ticket)[0] == "done" and time.monotonic() - began < 30
    assert Message.unpack(desk.answer(ticket)).head["known"] == ["run 2"]


def test_a_child_killed_at_its_work_is_told_at_once(child):
    desk = Desk(child)
    ticket = desk.begin(message("sleep"))
    while child.pid is None:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    began = time.monotonic()
    assert ended(desk, ticket) == ("failed", "its training process ended (signal 9)")
    assert time.monotonic() - began < 2.0


def test_a_child_ends_with_its_parent():
    """A parent that was killed has no chance to stop it."""
    middle = (
        "import sys, time; from unfed.federated.child import Child, Desk\n"
        "from unfed.federated.messages import Message\n"
        "child = Child([sys.executable, '-c', sys.argv[1]]); desk = Desk(child)\n"
        "desk.begin(Message({'do': 'sleep'}).pack())\n"
        "while child.pid is None: time.sleep(0.01)\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    import subprocess

    parent = subprocess.Popen([sys.executable, "-c", middle, PROGRAM], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    time.sleep(4.0)  # until it serves
    parent.kill()
    parent.wait()
    until = time.monotonic() + 30
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.1)
    assert not alive(pid)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as f:
            return f.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


REFUSES = """
from unfed.federated.child import serve
from unfed.federated.messages import Message
serve(lambda message: Message({"loss": float("nan")} if message.head.get("do") == "nan" else {"well": True}))
"""


def test_no_message_and_no_answer_ends_a_child():
    """What it has opened would go with it: the base model, and the rows."""
    made = Child([sys.executable, "-c", REFUSES])
    try:
        assert Message.unpack(made.ask(message("x"))).head == {"well": True}
        pid = made.pid
        assert "no message" in Message.unpack(made.ask(message("x") + b"more")).head["refused"]
        assert Message.unpack(made.ask(message("nan"))).head == {"refused": "its answer cannot be written"}
        assert Message.unpack(made.ask(message("x"))).head == {"well": True} and made.pid == pid
    finally:
        made.stop()
