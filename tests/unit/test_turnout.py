"""Who is asked, who comes back in time, and what the server does about the others."""

from __future__ import annotations

import json
import math
from collections import Counter

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from unfed.aggregation.privacy import CentralPrivacy
from unfed.aggregation.registry import build_aggregator
from unfed.base.errors import DataError, UnfedError
from unfed.base.seeding import numpy_generator
from unfed.base.types import AdapterState, ClientFailure, ClientUpdate, ServerState
from unfed.federated.ledger import Accountant
from unfed.federated.rounds import RoundsConfig, RunKeeper, run_rounds
from unfed.federated.sampling import Sampling, by_size, inclusion, read_trace
from unfed.federated.schedule import Participation, Phase, Schedule, Work
from unfed.federated.turnout import Conditions, turnout
from unfed.objectives.nll import NLL
from unfed.training.args import LoopArgs

NAMES = [f"client_{i}" for i in range(5)]


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_inclusion_is_in_proportion_to_size_up_to_one():
    assert inclusion([1, 2, 3, 4], 2) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    # 2 * 6 / 10 is over 1: that one is sure, and one of the others is drawn among 1 + 1 + 2
    assert inclusion([1, 1, 2, 6], 2) == pytest.approx([0.25, 0.25, 0.5, 1.0])
    assert inclusion([3, 5], 2) == [1.0, 1.0]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=12), st.data())
def test_inclusion_adds_up_and_the_draw_has_that_many_clients(sizes, data):
    size = data.draw(st.integers(1, len(sizes)))
    found = inclusion(sizes, size)
    assert math.isclose(sum(found), size, rel_tol=1e-9) and all(0 < p <= 1 for p in found)
    names = [f"c{i}" for i in range(len(sizes))]
    for seed in range(5):
        drawn = by_size(names, sizes, size, numpy_generator(seed))
        assert len(drawn) == len(set(drawn)) == size
        assert {n for n, p in zip(names, found, strict=True) if p == 1.0} <= set(drawn)


def test_by_size_is_unbiased_with_equal_weights():
    """Over many rounds the mean of what is drawn comes to the mean over all rows: 1*1 + 2*2 + 3*3 + 4*4 over 10."""
    sizes, rounds = {"a": 1, "b": 2, "c": 3, "d": 4}, 4000
    participation = Participation(0.5, sampling=Sampling("by_size", sizes))
    drawn = [c for r in range(rounds) for c in participation.select(list(sizes), 0, r)]
    counts = Counter(drawn)
    for client, size in sizes.items():  # six standard deviations of a share of 4000 rounds at most
        assert counts[client] / rounds == pytest.approx(2 * size / 10, abs=6 * 0.5 / math.sqrt(rounds))
    assert sum(sizes[c] for c in drawn) / len(drawn) == pytest.approx(3.0, abs=0.1)


def test_number_and_oversample():
    names = [f"c{i}" for i in range(10)]
    assert len(Participation(number=3).select(names, 0, 0)) == 3
    assert len(Participation(number=3, oversample=1.3).select(names, 0, 0)) == 4  # 3.9, rounded up
    assert (
        len(Participation(0.5, oversample=1.4).select(names, 0, 0)) == 7
    )  # and 5 * 1.4 is 7, whatever floats make of it
    assert Participation(number=30, oversample=2.0).select(names, 0, 0) == names
    assert len(Participation(0.1, 4).select(names, 0, 0)) == 4


def trace_file(tmp_path, text, name="trace.json"):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path / name


def test_a_trace_says_who_is_there(tmp_path):
    rows = {"client_0": [1, 0, 1], "client_1": [True, True, False], "client_2": [0, 1]}
    names = list(rows)
    trace = read_trace(trace_file(tmp_path, json.dumps(rows)), names)
    there = [Participation(sampling=Sampling("trace", trace=trace)).select(names, 0, r) for r in range(4)]
    assert there == [names[:2], names[1:], [names[0]], names[:2] + names[2:]]  # of rounds of their own length
    table = "client,1,2,3\nclient_0,1,0,1\nclient_1,true,TRUE,0\nclient_2,0,1,0\n"
    assert read_trace(trace_file(tmp_path, table, "trace.csv"), names)["client_1"] == (True, True, False)
    sampled = Participation(number=1, sampling=Sampling("trace", trace=trace))
    assert {len(sampled.select(names, 0, r)) for r in range(8)} == {1}
    assert sampled.select(names, 0, 0, always=["client_2"]) == ["client_2"]  # it unlearns, and is waited for


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2]", "should be an object of client -> 0 or 1 by round"),
        ("{", "cannot be read: Expecting property name"),
        (
            '{"client_0": [1], "client_1": [0], "klient_2": [1]}',
            "klient_2 is no client of the run; did you mean 'client_2'",
        ),
        ('{"client_0": [1]}', "says nothing of client_1, client_2"),
        ('{"client_0": [2], "client_1": [0], "client_2": [1]}', "client_0: '2' is neither 0 nor 1"),
        ('{"client_0": [], "client_1": [0], "client_2": [1]}', "client_0: has no round"),
    ],
)
def test_a_trace_that_does_not_serve(tmp_path, text, said):
    with pytest.raises(DataError, match=f"clients.availability=.*trace.json: {said}"):
        read_trace(trace_file(tmp_path, text), NAMES[:3])


# --- who comes back ---------------------------------------------------------------------------------------------------


def test_speeds_a_deadline_and_the_first_that_return():
    conditions = Conditions({"client_0": 2.0, "client_1": 0.1, "client_3": 4.0}, deadline=20.0)
    steps = dict.fromkeys(NAMES, 8.0)  # 4, 80, 8, 2 and 8 seconds
    all_of_them = turnout(NAMES, steps, 5, (), conditions, (0, 0))
    assert all_of_them.trained == ("client_0", "client_2", "client_3", "client_4") and not all_of_them.complete
    assert all_of_them.missing == {"client_1": "missed the deadline: it would take 80 of 20 simulated seconds"}
    assert all_of_them.length(conditions, all_of_them.trained) == 20.0  # the server waited for it
    two = turnout(NAMES, steps, 2, (), conditions, (0, 0))
    assert two.trained == ("client_0", "client_3") and set(two.spare) == {"client_2", "client_4"}
    assert two.length(conditions, two.trained) == 4.0
    assert turnout(NAMES, steps, 5, (), Conditions(), (0, 0)).length(Conditions(), NAMES) is None


def test_who_unlearns_is_waited_for():
    conditions = Conditions(0.01, dropout=0.99, deadline=1.0)
    found = turnout(NAMES, dict.fromkeys(NAMES, 8.0), 1, ("client_3",), conditions, (0, 0))
    assert found.trained == ("client_3",) and len(found.missing) == 4


def test_what_clients_are_given_depends_on_seed_round_and_client_alone():
    conditions = Conditions(spread=0.5, jitter=0.3, dropout=0.3)
    first = {(c, r): conditions.seconds(c, 8, 7, r) for r in range(4) for c in NAMES}
    assert {(c, r): conditions.seconds(c, 8, 7, r) for c in reversed(NAMES) for r in (3, 2, 1, 0)} == first
    assert len(set(first.values())) == 20
    still = Conditions(spread=0.5)
    assert len({still.seconds("client_0", 8, 7, r) for r in range(4)}) == 1  # of the client, not of the round
    silent = [conditions.silent(c, 7, r) for c in NAMES for r in range(400)]
    assert sum(silent) / len(silent) == pytest.approx(0.3, abs=6 * 0.46 / math.sqrt(2000))
    logs = [math.log(8 / Conditions(spread=0.5).seconds(f"c{i}", 8, 7, 0)) for i in range(2000)]
    assert sum(x * x for x in logs) / 2000 == pytest.approx(0.25, abs=6 * 0.25 * math.sqrt(2 / 2000))


# --- in rounds --------------------------------------------------------------------------------------------------------


class Counting:
    """A transport that counts who trained; ``broken`` clients answer with a failure."""

    def __init__(self, broken=()) -> None:
        self.trained, self.broken = [], broken

    def fit(self, task, given, client_ids):
        for client in client_ids:
            self.trained.append((task.round, client))
            if client in self.broken:
                yield ClientFailure(client, "on fire")
                continue
            number = 1 + int(client[-1])
            yield ClientUpdate(client, AdapterState({"w": given.start(client)["w"] + number}), number, {"steps": 1.0})


def go(participation, *, rounds=3, broken=(), always=(), state=None, keep=None):
    transport, keep = Counting(broken), keep or RunKeeper()
    schedule = Schedule((Phase("p", rounds, {c: Work("train", NLL(), 1.0) for c in NAMES}, always=always),))
    begin = state or ServerState(0, AdapterState({"w": torch.zeros(2)}))
    end = run_rounds(schedule, transport, build_aggregator("FedAvg", {}), begin, RoundsConfig(3, participation), keep)
    return end, keep, transport


def test_a_straggler_is_a_failure_that_costs_no_training():
    slow = Participation(conditions=Conditions({"client_2": 0.1}, deadline=5.0))
    _, keep, transport = go(slow, rounds=2)
    assert [c for _, c in transport.trained] == [n for n in NAMES if n != "client_2"] * 2
    for record in keep.records:
        assert record.failures == {"client_2": "missed the deadline: it would take 10 of 5 simulated seconds"}
        assert record.simulated_seconds == 5.0 and record.bytes_down == 5 * 8 and record.bytes_up == 4 * 8


def test_over_sampling_takes_the_first_and_steps_in_for_one_that_fails():
    speeds = {f"client_{i}": float(5 - i) for i in range(5)}  # client_0 is the quickest
    given = Participation(number=2, oversample=2.5, conditions=Conditions(speeds))
    _, keep, transport = go(given, rounds=1)
    assert [c for _, c in transport.trained] == ["client_0", "client_1"]
    assert keep.records[0].failures == {f"client_{i}": "not needed: 2 others returned first" for i in (2, 3, 4)}
    assert keep.records[0].simulated_seconds == pytest.approx(1 / 4)
    _, keep, transport = go(given, rounds=1, broken=("client_1",))
    assert [c for _, c in transport.trained] == ["client_0", "client_1", "client_2"]
    assert keep.records[0].clients == ("client_0", "client_2") and keep.records[0].failures["client_1"] == "on fire"
    assert keep.records[0].simulated_seconds == pytest.approx(1 / 3)


def test_each_client_is_recorded_with_what_it_sent():
    _, keep, _ = go(Participation(), rounds=1)
    assert keep.records[0].metrics["client_4"] == {"steps": 1.0, "bytes_down": 8, "bytes_up": 8}
    assert keep.records[0].simulated_seconds is None


def test_too_few_in_time_end_the_run():
    given = Participation(min_clients=4, conditions=Conditions({"client_0": 0.1, "client_1": 0.1}, deadline=5.0))
    with pytest.raises(
        UnfedError, match="only 3 of 5 clients returned a usable update and min_clients=4: client_0: mis"
    ):
        go(given)
    nobody = Participation(sampling=Sampling("trace", trace=dict.fromkeys(NAMES, (True, False))))
    with pytest.raises(UnfedError, match=r"only 0 of 0 clients .* none was there to be asked \(clients.availability\)"):
        go(nobody)


def test_a_resumed_run_meets_the_same_stragglers():
    given = Participation(
        0.6, oversample=1.5, sampling=Sampling("by_size", {c: i + 1 for i, c in enumerate(NAMES)}),
        conditions=Conditions(spread=0.7, jitter=0.5, dropout=0.2, deadline=2.0),
    )  # fmt: skip
    seen: list[ServerState] = []
    end, keep, _ = go(given, rounds=6, keep=RunKeeper(on_save=seen.append))
    assert len({r.clients for r in keep.records}) > 1 and any(r.failures for r in keep.records)
    for state in seen[:-1]:
        again, rest, _ = go(given, rounds=6, state=state)
        assert again.adapter.digest() == end.adapter.digest()
        told = [(r.clients, r.failures, r.simulated_seconds) for r in rest.records]
        assert told == [(r.clients, r.failures, r.simulated_seconds) for r in keep.records[state.round :]]


@pytest.mark.parametrize(("kind", "sampling"), [("uniform", "fixed"), ("by_size", "everyone"), ("trace", "everyone")])
def test_only_an_even_draw_makes_privacy_cheaper(kind, sampling):
    """Who is drawn by size, or is there by a trace, is not hidden by the draw: every round counts in full."""
    schedule = Schedule((Phase("p", 2, {c: Work("train", NLL(), 1.0) for c in NAMES}),))
    drawn = Participation(0.4, sampling=Sampling(kind, dict.fromkeys(NAMES, 3), dict.fromkeys(NAMES, (True,))))
    accountant = Accountant(CentralPrivacy(), schedule, drawn, {}, LoopArgs(), 0, {})
    assert {(r.sampling, r.count) for r in accountant.planned()["clients"]} == {(sampling, 2)}
