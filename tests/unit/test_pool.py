"""Clients dealt to workers: who is free, who died, who is late; updates in the clients' order, one at a time."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from unfed.base.errors import UnfedError
from unfed.base.types import AdapterState, Broadcast, ClientFailure, ClientUpdate
from unfed.federated.messages import Message, read_update, update_message
from unfed.federated.pool import AHEAD, Dealt, WorkerDiedError
from unfed.federated.schedule import FitTask, Phase, Work
from unfed.objectives.nll import NLL

CLIENTS = tuple("abcdef")


class Handle:
    def __init__(self, worker, client=None, round_=0):
        self.worker, self.client, self.round = worker, client, round_


class Pool:
    """Ends what it is asked about in the order that ``pick`` says. ``dies``: how often each client takes its worker
    with it; ``slow``: clients that never end; ``stillborn``: how often each worker dies as it starts."""

    def __init__(self, size=2, dies=None, slow=(), stillborn=None, lost=(), pick=lambda handles: handles[0]):
        self.size, self.slow, self.pick = size, slow, pick
        self.dies, self.stillborn, self.lost = dict(dies or {}), dict(stillborn or {}), set(lost)
        self.began, self.started, self.most, self.dead = [], [], 0, set()
        self.answered, self.shared = [], []

    def start(self, worker):
        self.started.append(worker)
        handle = Handle(worker)
        if self.stillborn.get(worker, 0):
            self.stillborn[worker] -= 1
            self.dead.add(handle)
        return handle

    def share(self, message):
        self.shared.append(weakref.ref(message.states["adapter"]["x"]))
        return message

    def begin(self, worker, message, shared):
        assert shared.states["adapter"]["x"].shape == (4,)
        client = message.head["client"]
        self.began.append((worker, client))
        handle = Handle(worker, client)
        if self.dies.get(client, 0):
            self.dies[client] -= 1
            self.dead.add(handle)
        return handle

    def wait(self, handles, seconds):
        assert seconds >= 0
        self.most = max(self.most, len(handles))
        able = [h for h in handles if h.client not in self.slow]
        return self.pick(able) if able else None

    def check(self, handle):
        if handle in self.dead:
            raise WorkerDiedError("killed")

    def answer(self, handle):
        self.check(handle)
        if handle.client in self.lost:
            self.lost.discard(handle.client)
            raise WorkerDiedError("its machine is gone")
        self.answered.append(handle.client or handle.worker)
        if handle.client is None:
            return Message({"worker": handle.worker})
        return update_message(ClientUpdate(handle.client, AdapterState({"x": torch.full((4,), ord(handle.client))}), 1))


class Errands:
    def share(self, broadcast):
        return Message({}, {"adapter": broadcast.adapter})

    def encode(self, task, broadcast, client_id):
        return Message({"client": client_id})

    def decode(self, task, client_id, answer):
        return read_update(answer, client_id)


def dealt(pool, timeout=60.0, greet=lambda *_: None):
    made = Dealt(pool, Errands(), timeout, greet)
    made.open()
    return made


def task_of(clients, round_=0):
    return FitTask(Phase("p", 9, {c: Work("train", NLL(), 1.0) for c in clients}), round_, round_)


def fit(transport, clients=CLIENTS):
    return transport.fit(task_of(clients), Broadcast(AdapterState({"x": torch.zeros(4)})), clients)


def ids(found):
    return [(f.client_id, isinstance(f, ClientUpdate)) for f in found]


def well(*clients):
    return [(c, True) for c in clients]


@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_updates_come_in_the_order_of_the_clients_whoever_is_done_first(size):
    pool = Pool(size, pick=lambda handles: handles[-1])
    assert ids(fit(dealt(pool))) == well(*CLIENTS)
    assert sorted(c for _, c in pool.began) == list(CLIENTS)
    assert len({w for w, _ in pool.began}) == min(size, 6)


def test_a_client_goes_to_whichever_worker_is_free():
    first_is_slow = Pool(2, pick=lambda handles: next((h for h in handles if h.worker != 0), handles[0]))
    list(fit(dealt(first_is_slow)))
    assert [w for w, _ in first_is_slow.began] == [1, 0, 1, 1, 1, 1]


def test_an_answer_is_fetched_when_its_turn_comes_and_few_wait_for_theirs():
    many = tuple(f"{n:03d}" for n in range(100))

    class Numbered(Pool):
        def answer(self, handle):
            if handle.client is None:
                return super().answer(handle)
            self.answered.append(handle.client)
            return update_message(ClientUpdate(handle.client, AdapterState({"x": torch.zeros(1)}), 1))

    # The first client is the last to end, as far as may be.
    pool = Numbered(2, pick=lambda handles: next((h for h in handles if h.client != "000"), handles[0]))
    transport = dealt(pool)
    pool.answered.clear()
    answers = fit(transport, many)
    next(answers)
    assert pool.answered == ["000"] and len(pool.began) <= 2 + AHEAD
    assert len(list(answers)) == 99 and pool.answered == list(many)


def test_the_broadcast_and_an_update_are_let_go():
    pool = Pool()
    answers = fit(dealt(pool))
    kept = weakref.ref(next(answers).adapter["x"])
    next(answers)
    gc.collect()
    assert kept() is None and pool.shared[0]() is not None
    list(answers)
    del answers
    gc.collect()
    assert pool.shared[0]() is None


def test_a_worker_that_dies_is_replaced_and_its_client_tried_once_more():
    pool = Pool(2, dies={"b": 1, "e": 1})
    transport = dealt(pool)
    assert ids(fit(transport)) == well(*CLIENTS)
    assert sorted(c for _, c in pool.began) == sorted([*CLIENTS, "b", "e"])
    assert len(pool.started) == 4
    assert ids(fit(transport)) == well(*CLIENTS)  # and the next round is as if nothing had been


def test_a_client_at_which_two_workers_died_has_failed_and_the_round_goes_on():
    pool = Pool(2, dies={"b": 2})
    found = list(fit(dealt(pool)))
    assert ids(found) == [("a", True), ("b", False), *well(*"cdef")]
    assert found[1].reason == "its worker died, and again when it was tried once more (killed)"


def test_an_answer_that_is_lost_is_made_once_more():
    pool = Pool(2, lost="c")
    assert ids(fit(dealt(pool))) == well(*CLIENTS)
    assert [c for _, c in pool.began].count("c") == 2


def test_a_client_that_is_not_done_in_time_has_failed_and_its_worker_starts_anew():
    pool = Pool(2, slow=("c",))
    transport = dealt(pool, timeout=0.01)
    found = list(fit(transport))
    assert isinstance(found[2], ClientFailure) and found[2].reason == "it was not done after 0.01 s"
    assert len(pool.started) == 3
    pool.slow = ()
    transport._timeout = 60.0
    assert ids(fit(transport)) == well(*CLIENTS)


def test_a_worker_that_cannot_be_started_again_is_done_without():
    pool = Pool(2, dies={"a": 1})
    transport = dealt(pool)
    pool.stillborn[0] = 2
    assert ids(fit(transport)) == well(*CLIENTS)
    assert {w for w, _ in pool.began[1:]} == {1}


def test_without_a_worker_the_run_ends():
    with pytest.raises(UnfedError, match="no worker could be started"):
        dealt(Pool(2, stillborn={0: 2, 1: 2}))
    pool = Pool(1, dies={"b": 1})
    transport = dealt(pool)
    pool.stillborn[0] = 2
    with pytest.raises(UnfedError, match="no worker is left"):
        list(fit(transport))


def test_every_worker_is_greeted_when_it_starts_and_starts_again():
    greeted = []
    transport = dealt(Pool(2, dies={"a": 1}), greet=lambda worker, told: greeted.append((worker, told.head["worker"])))
    list(fit(transport))
    assert greeted == [(0, 0), (1, 1), (0, 0)]

    def refuse(worker, told):
        raise UnfedError("another base model")

    with pytest.raises(UnfedError, match="another base model"):
        dealt(Pool(), greet=refuse)


def test_a_round_that_is_given_up_leaves_no_work_behind():
    pool = Pool(2)
    transport = dealt(pool)
    answers = fit(transport)
    next(answers)
    answers.close()
    began = len(pool.began)
    assert ids(fit(transport, ("x", "y"))) == well("x", "y")
    assert [c for _, c in pool.began[began:]] == ["x", "y"] and len(pool.started) > 2


def test_a_machine_that_goes_with_an_answer_costs_its_client_one_try():
    """Its worker is dead too, and was free: given to it again, the client would have died twice of one fault."""

    class Gone(Pool):
        gone = None

        def answer(self, handle):
            if handle.client == "a" and self.gone is None:
                self.gone = handle.worker
                raise WorkerDiedError("its machine is gone")
            return super().answer(handle)

        def begin(self, worker, message, shared):
            handle = super().begin(worker, message, shared)
            if worker == self.gone:
                self.dead.add(handle)
            return handle

        def start(self, worker):
            self.gone = -1 if worker == self.gone else self.gone
            return super().start(worker)

    pool = Gone(1)
    assert ids(fit(dealt(pool), ("a",))) == well("a")
    assert pool.began == [(0, "a"), (0, "a")] and pool.started == [0, 0]
