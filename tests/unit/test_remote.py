"""Clients on other machines: who is late, gone, or answers with something else fails alone, and the order stays."""

from __future__ import annotations

import io
import time

import pytest
import torch

from unfed.base.errors import ClientError
from unfed.base.types import AdapterState, Broadcast, ClientFailure, ClientUpdate
from unfed.federated import remote
from unfed.federated.messages import Message, MessageError, update_message
from unfed.federated.remote import Patience, Remote, State
from unfed.federated.schedule import FitTask, Phase, Work
from unfed.objectives.nll import NLL

CLIENTS = ("a", "b", "c")
TASK = FitTask(Phase("p", 1, {c: Work("train", NLL(), 1.0) for c in CLIENTS}), 3, 0)
STATE = AdapterState({"x": torch.ones(4)})


def update(client, value=1.0):
    return update_message(ClientUpdate(client, AdapterState({"x": torch.full((4,), value)}), 5)).pack()


class Link:
    """Answers as told. ``states``: of each client, in turn; the last one stays."""

    def __init__(self, answers=None, states=None, refused=()):
        self.answers = {c: update(c) for c in CLIENTS} | (answers or {})
        self.states = {c: [State("done", nbytes=10)] for c in CLIENTS} | (states or {})
        self.refused, self.sent, self.asked, self.under_way, self.most = refused, {}, [], 0, 0

    def begin(self, client_id, message):
        self.sent[client_id] = message
        self.under_way += message.nbytes
        self.most = max(self.most, self.under_way)

        def ticket():
            self.under_way -= message.nbytes
            if client_id in self.refused:
                raise ClientError("no such site")
            return 7

        return ticket

    def state(self, client_id, ticket, wait):
        assert ticket == 7 and wait >= 0
        self.asked.append(client_id)
        states = self.states[client_id]
        found = states.pop(0) if len(states) > 1 else states[0]
        if isinstance(found, Exception):
            raise found
        return found

    def answer(self, client_id, ticket, nbytes):
        assert ticket == 7 and nbytes == 10
        return io.BytesIO(self.answers[client_id])


def answers(link, **patience):
    given = Patience(**({"work": 5.0, "poll": 0.0, "ping": 1.0} | patience))
    transport = Remote(link, lambda task, broadcast, c: Message({"round": task.round, "client": c}), given)
    return list(transport.fit(TASK, Broadcast(STATE), CLIENTS))


def reasons(found):
    return {a.client_id: a.reason for a in found if isinstance(a, ClientFailure)}


def test_updates_come_in_the_order_of_the_clients_though_others_are_done_first():
    link = Link(states={"a": [State("working"), State("working"), State("done", nbytes=10)]})
    found = answers(link)
    assert [type(a) for a in found] == [ClientUpdate] * 3 and [a.client_id for a in found] == ["a", "b", "c"]
    assert {c: m.head for c, m in link.sent.items()} == {c: {"round": 3, "client": c} for c in CLIENTS}


def test_a_clients_answer_is_fetched_when_its_turn_comes_and_not_before():
    link, fetched = Link(), []
    link.answer = lambda client_id, *_: fetched.append(client_id) or io.BytesIO(update(client_id))
    transport = Remote(link, lambda task, broadcast, c: Message({}), Patience())
    updates = transport.fit(TASK, Broadcast(STATE), CLIENTS)
    next(updates)
    assert fetched == ["a"]


def test_a_client_that_failed_is_named_with_its_reason_and_the_others_count():
    found = answers(Link(states={"b": [State("failed", "signal 9")]}, refused=("c",)))
    assert reasons(found) == {"b": "signal 9", "c": "no such site"}
    assert isinstance(found[0], ClientUpdate)


def test_a_client_is_gone_after_two_questions_without_an_answer_and_not_after_one():
    lost = ClientError("no answer to state within 3 s")
    once = answers(Link(states={"a": [lost, State("working"), lost, State("done", nbytes=10)]}))
    assert reasons(once) == {}
    link = Link(states={"a": [lost]})
    assert reasons(answers(link)) == {"a": "it does not answer any more (no answer to state within 3 s)"}
    assert link.asked.count("a") == 2


def test_a_client_that_works_on_and_on_is_late():
    began = time.monotonic()
    found = answers(Link(states={"a": [State("working")]}), work=0.2)
    assert reasons(found) == {"a": "it was not done after 0.2 s"}
    assert time.monotonic() - began < 2.0


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x80\x04nonsense", "larger than what is taken"),
        (update("b"), "is of 'b'"),
        (Message({"refused": "it does not permit unlearn"}).pack(), "it does not permit unlearn"),
        (Message({"client": "a", "num_examples": 1, "metrics": {}, "nbytes": None}).pack(), "no adapter"),
    ],
)
def test_an_answer_that_is_no_update_fails_its_client(data, reason):
    found = reasons(answers(Link(answers={"a": data})))
    assert set(found) == {"a"} and reason in found["a"]


def test_what_ends_the_run_is_no_clients_failure():
    class AbortedError(Exception):
        pass

    with pytest.raises(AbortedError):
        answers(Link(states={"b": [AbortedError()]}))


def test_few_bytes_are_on_their_way_at_a_time(monkeypatch):
    def most():
        link = Link()
        transport = Remote(link, lambda task, broadcast, c: Message({"client": c}, {"adapter": broadcast.adapter}))
        list(transport.fit(TASK, Broadcast(STATE), CLIENTS))
        return link.most

    assert most() == 3 * STATE.nbytes
    monkeypatch.setattr(remote, "UNDER_WAY", 2 * STATE.nbytes)
    assert most() == 2 * STATE.nbytes


def test_a_message_error_is_a_clients_failure():
    assert issubclass(MessageError, ClientError)
    assert Patience(rate=1e6).transfer(100_000_000) == pytest.approx(110.0)
