"""The rounds over a transport that answers what the test wants: screening, failures, participation, replay."""

from __future__ import annotations

import math

import pytest
import torch

from unfed.aggregation.registry import build_aggregator
from unfed.base.errors import AdapterError, UnfedError
from unfed.base.types import AdapterState, Broadcast, ClientFailure, ClientUpdate, ServerState
from unfed.federated.checkpoint import Checkpoints
from unfed.federated.rounds import RoundListener, RoundsConfig, RunKeeper, run_rounds
from unfed.federated.schedule import Participation, Phase, Schedule, Work
from unfed.federated.transport import InProcess
from unfed.objectives.nll import NLL

A, B = "m.lora_A.weight", "m.lora_B.weight"
WORK = Work("train", NLL(), 1.0)


def adapter(a: float, b: float = 0.0) -> AdapterState:
    return AdapterState({A: torch.full((2, 3), a), B: torch.full((3, 2), b)})


def schedule(rounds: int = 2, clients: int = 3, rule="aggregate") -> Schedule:
    return Schedule((Phase("p", rounds, {f"client_{i}": WORK for i in range(clients)}, rule),))


class Scripted:
    """A transport whose clients answer by a function of (round, client, adapter)."""

    def __init__(self, answer) -> None:
        self.answer, self.asked = answer, []

    def fit(self, task, given, client_ids):
        self.asked.append((task.round, tuple(client_ids)))
        for client in client_ids:
            yield self.answer(task.round, client, given.start(client))


def shift(by: float = 1.0, examples: int = 10):
    def answer(round_: int, client: str, given: AdapterState) -> ClientUpdate:
        number = int(client.rsplit("_", 1)[-1])
        moved = AdapterState({n: t + by * (number + 1) for n, t in given.items()})
        return ClientUpdate(client, moved, examples * (number + 1), {"loss": float(number)})

    return answer


def go(answer, *, rule="FedAvg", plan=None, state=None, config=None, keep=None):
    keep = keep or RunKeeper()
    transport = Scripted(answer)
    end = run_rounds(
        plan or schedule(),
        transport,
        build_aggregator(rule, {}),
        state or ServerState(0, adapter(0.0)),
        config or RoundsConfig(),
        keep,
    )
    return end, keep, transport


def test_the_weighted_mean_of_two_rounds_and_its_record():
    end, keep, transport = go(shift())
    mean = (1 * 10 + 2 * 20 + 3 * 30) / 60
    torch.testing.assert_close(end.adapter[A], torch.full((2, 3), 2 * mean))
    assert end.round == 2 and transport.asked == [(i, ("client_0", "client_1", "client_2")) for i in range(2)]
    first, second = keep.records
    assert first.clients == ("client_0", "client_1", "client_2") and first.num_examples == 60
    assert first.adapter_before == adapter(0.0).digest() and second.adapter_after == end.adapter.digest()
    assert first.adapter_after == second.adapter_before
    assert first.bytes_down == first.bytes_up == 3 * adapter(0.0).nbytes == 3 * 48
    assert first.loss == 1.0 and first.failures == {} and first.aggregation_error is not None


def change(how: str):
    """``client_1`` returns something that cannot be used."""

    def answer(round_: int, client: str, given: AdapterState):
        good = shift()(round_, client, given)
        if client != "client_1":
            return good
        tensors = dict(good.adapter)
        if how == "nan":
            tensors[A] = tensors[A].clone().index_fill_(1, torch.tensor([1]), math.nan)
        elif how == "infinity":
            tensors[B] = torch.full((3, 2), math.inf)
        elif how == "shape":
            tensors[A] = torch.zeros(3, 3)
        elif how == "missing":
            del tensors[B]
        elif how == "unknown":
            tensors["m.lora_C"] = torch.zeros(1)
        elif how == "examples":
            return ClientUpdate(client, good.adapter, 0)
        elif how == "failure":
            return ClientFailure(client, "RuntimeError: on fire")
        return ClientUpdate(client, AdapterState(tensors), good.num_examples)

    return answer


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("nan", f"update dropped: {A} has values that are not finite"),
        ("infinity", f"update dropped: {B} has values that are not finite"),
        ("shape", f"update dropped: {A} has shape (3, 3), not (2, 3)"),
        ("missing", f"update dropped: missing {B}"),
        ("unknown", "update dropped: unknown m.lora_C"),
        ("examples", "update dropped: num_examples is 0"),
        ("failure", "RuntimeError: on fire"),
    ],
)
@pytest.mark.parametrize("rule", ["FedAvg", "FedAdam"])
def test_an_unusable_update_is_dropped_and_named_and_the_round_goes_on(how, said, rule):
    end, keep, _ = go(change(how), rule=rule, plan=schedule(1))
    (record,) = keep.records
    assert record.failures == {"client_1": said} and record.clients == ("client_0", "client_2")
    assert record.num_examples == 40 and "client_1" not in record.metrics
    alone, _, _ = go(shift(), rule=rule, plan=Schedule((Phase("p", 1, {"client_0": WORK, "client_2": WORK}),)))
    assert end.adapter.digest() == alone.adapter.digest()


def test_too_few_usable_updates_stop_the_run_and_what_was_saved_stays(tmp_path):
    keep = RunKeeper(checkpoints=Checkpoints(tmp_path, {}))

    def answer(round_, client, given):
        return shift()(round_, client, given) if round_ == 0 else change("nan")(round_, "client_1", given)

    with pytest.raises(UnfedError, match=r"only 0 of 3 clients returned a usable update.*not finite"):
        go(answer, keep=keep)
    state, records = Checkpoints(tmp_path, {}).latest() or (None, [])
    assert state is not None and state.round == 1 and len(records) == 1


def test_min_clients():
    with pytest.raises(
        UnfedError, match="only 2 of 3 clients returned a usable update and min_clients=3: client_1: upd"
    ):
        go(change("nan"), config=RoundsConfig(participation=Participation(1.0, 3)))
    go(change("nan"), config=RoundsConfig(participation=Participation(1.0, 2)))


def test_partial_participation():
    end, keep, transport = go(
        shift(), plan=schedule(6, clients=4), config=RoundsConfig(seed=1, participation=Participation(0.5))
    )
    assert all(len(c) == 2 for _, c in transport.asked) and len({c for _, c in transport.asked}) > 1
    assert [r.clients for r in keep.records] == [c for _, c in transport.asked]
    assert all(r.bytes_down == 2 * 48 for r in keep.records) and end.round == 6


def test_adopting_passes_by_the_servers_optimizer():
    end, _, _ = go(shift(), rule="FedAdam", plan=schedule(1, clients=1, rule="adopt"))
    assert torch.equal(end.adapter[A], torch.ones(2, 3)) and end.opt_state == {}
    damped, _, _ = go(shift(), rule="FedAdam", plan=schedule(1, clients=1))
    assert float(damped.adapter[A].max()) < 0.01 and set(damped.opt_state) == {"m", "v"}


@pytest.mark.parametrize("rule", ["FedAvg", "FedAvgM", "FedAdagrad", "FedAdam", "FedYogi"])
def test_going_on_from_a_state_gives_the_same_bits(rule):
    whole, _, _ = go(shift(0.1), rule=rule, plan=schedule(5))
    seen: list[ServerState] = []
    go(shift(0.1), rule=rule, plan=schedule(5), keep=RunKeeper(on_save=seen.append))
    for state in seen[:-1]:
        again, _, transport = go(shift(0.1), rule=rule, plan=schedule(5), state=state)
        assert again.adapter.digest() == whole.adapter.digest()
        assert transport.asked[0][0] == state.round


def test_the_order_of_events():
    events = []

    class Listener(RoundListener):
        def round_started(self, task, clients):
            events.append(("start", task.round, len(clients)))

        def round_ended(self, record, state):
            events.append(("end", record.round, state.round))

    go(shift(), keep=RunKeeper(listener=Listener(), on_save=lambda s: events.append(("save", s.round))))
    assert events == [
        ("start", 0, 3), ("save", 1), ("end", 0, 1),
        ("start", 1, 3), ("save", 2), ("end", 1, 2),
    ]  # fmt: skip


def test_updates_are_taken_in_one_at_a_time():
    """The server never holds the next client's update before this one is in the mean."""
    log = []

    def answer(round_, client, given):
        log.append(client)
        return shift()(round_, client, given)

    class Watched:
        def __init__(self) -> None:
            self.inner = build_aggregator("FedAvg", {})
            self.client_proximal_mu, self.name = 0.0, "Watched"
            self.broadcast, self.advance = self.inner.broadcast, self.inner.advance

        def combine(self, updates, num_clients, state):
            def watched():
                for n, update in enumerate(updates, 1):
                    assert len(log) == n
                    yield update

            return self.inner.combine(watched(), num_clients, state)

    run_rounds(schedule(1), Scripted(answer), Watched(), ServerState(0, adapter(0.0)), RoundsConfig(), RunKeeper())
    assert len(log) == 3


# --- in this process --------------------------------------------------------------------------------------------------


def in_process(error: Exception):
    def fit(task, given, client):
        if client == "client_1":
            raise error
        return shift()(task.round, client, given.start(client))

    return InProcess(fit)


def test_an_exception_of_a_client_is_a_failure_of_that_client(caplog):
    keep = RunKeeper()
    state = ServerState(0, adapter(0.0))
    run_rounds(
        schedule(1), in_process(RuntimeError("on fire")), build_aggregator("FedAvg", {}), state, RoundsConfig(), keep
    )
    assert keep.records[0].failures == {"client_1": "RuntimeError: on fire"}
    assert "client client_1 failed in round 1" in caplog.text


@pytest.mark.parametrize(
    "error", [UnfedError("no retain rows"), AdapterError("x"), MemoryError(), torch.OutOfMemoryError()]
)
def test_what_the_user_must_mend_ends_the_run(error):
    with pytest.raises(type(error)):
        list(in_process(error).fit(next(schedule().tasks()), Broadcast(adapter(0.0)), ["client_0", "client_1"]))
