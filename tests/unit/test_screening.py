"""Which updates a round lets through, and the words about the others; what hostile clients make of theirs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from unfed.aggregation.fedavg import FedAvg
from unfed.aggregation.robust_registry import build_robust
from unfed.base.seeding import numpy_generator
from unfed.base.types import SERVER, AdapterState, Broadcast, ClientFailure, ClientUpdate, ServerState
from unfed.data.labels import exchanged_answers
from unfed.federated.hostile import Hostile
from unfed.federated.rounds import RoundsConfig, RunKeeper, run_rounds
from unfed.federated.schedule import Phase, Schedule, Work
from unfed.federated.screening import Screening, ScreeningSettings
from unfed.objectives.nll import NLL

A, B = "m.lora_A.weight", "m.lora_B.weight"
START = AdapterState({A: torch.ones(2, 3), B: torch.zeros(4, 2)})


def update(client: str, by: float = 0.0, examples: int = 10, gauge: float = 1.0) -> ClientUpdate:
    """``B = by`` everywhere, so that the product's step is ``4 x 3`` entries of ``2 by``; factors gauged apart."""
    return ClientUpdate(client, AdapterState({A: START[A] / gauge, B: torch.full((4, 2), by * gauge)}), examples)


def passed(answers, **settings):
    screening = Screening(Broadcast(START), ScreeningSettings(**settings))
    return [u.client_id for u in screening.usable(answers)], screening


def test_dtypes_and_example_counts_are_held_to_what_is_known() -> None:
    other = AdapterState({A: START[A].half(), B: START[B]})
    answers = [
        update("client_0", 1.0, 12), update("client_1", 1.0, 13), ClientUpdate("client_2", other, 1),
        update("client_3", 1.0, 10**9), ClientFailure("client_4", "RuntimeError: no"),
    ]  # fmt: skip
    usable, screening = passed(answers, owned={"client_0": 12, "client_1": 12, "client_2": 12})
    assert usable == ["client_0", "client_3"], "of client_3 no count is known"
    assert screening.failures == {
        "client_1": "update dropped: num_examples is 13, and by the partition the client has 12",
        "client_2": f"update dropped: {A} is float16, not float32",
        "client_4": "RuntimeError: no",
    }


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.int64])
def test_other_dtypes_are_refused_before_anything_is_counted_in_them(dtype) -> None:
    """torch cannot sum up all of them, and a control variate would be added to the server's as it is."""
    odd = AdapterState({A: START[A].to(dtype), B: START[B]})
    fair = update("client_0", 1.0, 12)
    screening = Screening(Broadcast(START, control=START))
    sound = replace(update("client_2", 1.0, 1), control=START)
    answers = [ClientUpdate("client_1", odd, 1), replace(fair, control=odd), sound]
    assert [u.client_id for u in screening.usable(answers)] == ["client_2"]
    name = str(dtype).removeprefix("torch.")
    assert screening.failures == {
        "client_1": f"update dropped: {A} is {name}, not float32",
        "client_0": f"update dropped: control variate: {A} is {name}, not float32",
    }


def test_lengths_against_the_rounds_median() -> None:
    """Steps 1, 1, 2, 9 of ``sqrt(12) * 2``: the median is 1.5 of them, so a ratio of 5 lets 7.5 through."""
    four = [update(f"client_{i}", x) for i, x in enumerate((1.0, 1.0, 2.0, 9.0))]
    assert passed(four)[0] == passed(four, max_norm_ratio=7.0)[0] == [f"client_{i}" for i in range(4)]
    usable, screening = passed(four, max_norm_ratio=5.0)
    assert usable == ["client_0", "client_1", "client_2"] and "client_3" not in screening.metrics
    unit = 2 * 12**0.5
    assert screening.failures["client_3"] == (
        f"update dropped: its step is {9 * unit:.4g} long, 6 times the round's median of {1.5 * unit:.4g} "
        "(robust.max_norm_ratio=5)"
    )
    assert screening.bytes_up == 4 * START.nbytes, "it was sent all the same"


def test_long_factors_with_a_short_product_are_found() -> None:
    answers = [*(update(f"client_{i}", 1.0) for i in range(3)), update("client_3", 1.0, gauge=1000.0)]
    usable, screening = passed(answers, max_norm_ratio=10.0)
    assert usable == ["client_0", "client_1", "client_2"]
    assert "its factors' step is" in screening.failures["client_3"]


def test_the_scaling_of_each_module_counts() -> None:
    other = {"n.lora_A.weight": torch.ones(1, 2), "n.lora_B.weight": torch.zeros(2, 1)}
    start = AdapterState({**START, **other})
    answers = [
        ClientUpdate(f"client_{i}", AdapterState({**start, B: torch.full((4, 2), 1.0)}), 1) for i in range(3)
    ] + [ClientUpdate("client_3", AdapterState({**start, "n.lora_B.weight": torch.full((2, 1), 1.0)}), 1)]
    screening = Screening(Broadcast(start), ScreeningSettings(5.0, {"m": 1.0, "n": 100.0}))
    assert len(list(screening.usable(answers))) == 3 and "client_3" in screening.failures


def test_a_median_that_says_nothing_drops_nobody() -> None:
    two = [update("client_0", 1.0), update("client_1", 99.0)]
    assert passed(two, max_norm_ratio=2.0)[0] == ["client_0", "client_1"]
    idle = [*(update(f"client_{i}") for i in range(3)), update("client_3", 5.0)]
    assert len(passed(idle, max_norm_ratio=2.0)[0]) == 4


def test_the_server_is_neither_counted_nor_measured() -> None:
    answers = [*(update(f"client_{i}", 1.0) for i in range(3)), update(SERVER, 500.0)]
    usable, screening = passed(answers, max_norm_ratio=2.0)
    assert SERVER in usable and screening.bytes_up == 3 * START.nbytes


class Scripted:
    """Every client goes one further in B."""

    def fit(self, task, broadcast, client_ids):
        for client in client_ids:
            adapter = AdapterState({n: t + (1.0 if n == B else 0.0) for n, t in broadcast.adapter.items()})
            yield ClientUpdate(client, adapter, 10)


def sent(attack: str, factor: float = 2.0, round_: int = 0, seed: int = 0) -> dict[str, AdapterState]:
    hostile = Hostile(Scripted(), attack, frozenset({"client_1"}), factor, seed)
    phase = Phase("p", 3, {f"client_{i}": Work("train", NLL(), 1.0) for i in range(3)})
    task = list(Schedule((phase,)).tasks())[round_]
    return {u.client_id: u.adapter for u in hostile.fit(task, Broadcast(START), list(phase.work))}


def test_what_hostile_clients_send() -> None:
    for attack, value in (("sign_flip", -2.0), ("scale", 2.0)):
        found = sent(attack)
        assert torch.equal(found["client_0"][B], torch.ones(4, 2)) and torch.equal(found["client_2"][A], START[A])
        assert torch.equal(found["client_1"][B], torch.full((4, 2), value)) and torch.equal(
            found["client_1"][A], START[A]
        )
    noise = sent("random")["client_1"]
    length = sum(float((noise[n] - START[n]).square().sum()) for n in noise) ** 0.5
    assert length == pytest.approx(2.0 * 8**0.5, rel=1e-5) and not torch.equal(noise[A], START[A])
    assert noise.digest() == sent("random")["client_1"].digest()
    assert (
        len(
            {noise.digest(), sent("random", round_=1)["client_1"].digest(), sent("random", seed=1)["client_1"].digest()}
        )
        == 3
    )


def test_a_rule_in_the_rounds_and_what_is_recorded() -> None:
    """One of ten clients scales by 1000, all the same way: each step is brought to the length of the server's."""
    clients = [f"client_{i}" for i in range(10)]
    phases = (Phase("p", 1, {c: Work("train", NLL(), 1.0) for c in [*clients, SERVER]}),)
    transport = Hostile(Scripted(), "scale", frozenset({"client_1"}), 1000.0)
    rule = FedAvg(filters=(build_robust("fltrust", {}),))
    keep = RunKeeper()
    end = run_rounds(Schedule(phases), transport, rule, ServerState(0, START), RoundsConfig(), keep)
    torch.testing.assert_close(end.adapter[B], torch.ones(4, 2), rtol=1e-4, atol=1e-4)
    (record,) = keep.records
    assert record.clients == tuple(clients) and record.num_examples == 100 and SERVER in record.metrics
    assert record.notes["fltrust"] == pytest.approx(dict.fromkeys(clients, 1.0))
    assert record.bytes_down == record.bytes_up == 10 * START.nbytes


def test_each_question_gets_the_answer_of_another_row() -> None:
    rows = [{"id": str(i), "question": f"q{i}", "answer": f"a{i}"} for i in range(7)]
    found = exchanged_answers(rows, numpy_generator(0, "t"))
    assert [(e["id"], e["question"]) for e in found] == [(e["id"], e["question"]) for e in rows]
    assert sorted(e["answer"] for e in found) == [f"a{i}" for i in range(7)]
    assert all(e["answer"] != f"a{i}" for i, e in enumerate(found))
    assert (
        exchanged_answers(rows[:1], numpy_generator(0, "t")) == rows[:1]
        and exchanged_answers([], numpy_generator(0, "t")) == []
    )
