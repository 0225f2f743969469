"""FedNova and SCAFFOLD: their arithmetic written out, on the server and at a client."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from unfed.aggregation.registry import aggregator_problems, build_aggregator
from unfed.aggregation.unequal_work import stretch_of
from unfed.base.errors import AdapterError, ConfigError
from unfed.base.types import AdapterState, Broadcast, ClientUpdate, ServerState
from unfed.federated.client import Client, ClientData
from unfed.federated.control import CONTROL
from unfed.federated.rounds import RoundsConfig, RunKeeper, run_rounds
from unfed.federated.schedule import Phase, Schedule, Work
from unfed.federated.store import ClientStore
from unfed.federated.transport import InProcess
from unfed.models.adapter import snapshot
from unfed.objectives.nll import NLL


def state(*values: float) -> AdapterState:
    return AdapterState({"w": torch.tensor(values, dtype=torch.float64)})


def update(client: str, values: list[float], examples: int, steps: float, change: float | None = None) -> ClientUpdate:
    control = None if change is None else AdapterState({"w": torch.full((len(values),), change)})
    return ClientUpdate(client, state(*values), examples, {"steps": steps}, control=control)


def after(rule: str, updates: list[ClientUpdate], begin: ServerState, **params) -> ServerState:
    aggregator = build_aggregator(rule, params)
    return aggregator.advance(begin, aggregator.combine(updates, len(updates), begin))


def test_fednova_by_hand():
    # x = 1; client a moves by 2 in 4 steps with 10 rows, b by 3 in 1 step with 30.
    # p = (1/4, 3/4); tau_eff = 4/4 + 3/4 = 1.75; sum p d / tau = 2/16 + 9/4 = 2.375
    updates = [update("a", [3.0], 10, 4.0), update("b", [4.0], 30, 1.0)]
    end = after("FedNova", updates, ServerState(0, state(1.0)))
    assert end.adapter["w"].item() == pytest.approx(1.0 + 1.75 * 2.375, rel=1e-12)
    half = after("FedNova", updates, ServerState(0, state(1.0)), server_lr=0.5)
    assert half.adapter["w"].item() == pytest.approx(1.0 + 0.5 * 1.75 * 2.375, rel=1e-12)
    # Weighted equally: tau_eff = 2.5, sum = (2/4 + 3/1) / 2
    even = after("FedNova", updates, ServerState(0, state(1.0)), weighting="uniform")
    assert even.adapter["w"].item() == pytest.approx(1.0 + 2.5 * 1.75, rel=1e-12)


def test_fednova_undoes_what_more_steps_on_the_same_gradient_weigh():
    """Two clients of equal weight pull to 1 and to -1, one with ten times the steps: FedAvg drifts, FedNova rests."""
    updates = [update("a", [10.0], 1, 10.0), update("b", [-1.0], 1, 1.0)]
    assert after("FedAvg", updates, ServerState(0, state(0.0))).adapter["w"].item() == pytest.approx(4.5)
    assert after("FedNova", updates, ServerState(0, state(0.0))).adapter["w"].item() == pytest.approx(0.0, abs=1e-12)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 500), st.integers(1, 50)), min_size=1, max_size=8), st.integers(0, 2**31))
def test_fednova_is_its_formula_and_never_shortens(work, seed):
    g = torch.Generator().manual_seed(seed)
    start, ends = torch.randn(3, generator=g).double(), torch.randn(len(work), 3, generator=g).double()
    updates = [update(f"c{i}", e.tolist(), n, float(t)) for i, (e, (n, t)) in enumerate(zip(ends, work, strict=True))]
    end = after("FedNova", updates, ServerState(0, state(*start.tolist())))
    total = sum(n for n, _ in work)
    effective = sum(n / total * t for n, t in work)
    step = sum(n / total * (e - start) / t for e, (n, t) in zip(ends, work, strict=True))
    torch.testing.assert_close(end.adapter["w"], start + effective * step, rtol=1e-9, atol=1e-9)
    assert stretch_of([(float(n), float(t)) for n, t in work]) >= 1 - 1e-12


@pytest.mark.parametrize("rule", ["FedNova", "Scaffold"])
def test_equal_work_and_no_variates_is_fedavg(rule):
    """Powers of two: the weights divided by the steps round to nothing else."""
    updates = [update("a", [3.0, 1.0], 8, 4.0, 0.0), update("b", [4.0, 0.1], 24, 4.0, 0.0)]
    begin = ServerState(0, state(1.0, 2.0))
    end = after(rule, updates, begin, weighting="examples")
    assert end.adapter.digest() == after("FedAvg", updates, begin).adapter.digest()


def test_fednova_needs_the_steps():
    bare = ClientUpdate("client_7", state(1.0), 3)
    with pytest.raises(AdapterError, match="client_7: FedNova needs the number of its optimizer steps, not 0"):
        after("FedNova", [bare], ServerState(0, state(0.0)))


def test_scaffolds_server_by_hand():
    # Equal weights: x moves by mean(2, 3); c by 2/5 of mean(1, -4) with two of five clients there.
    rule = build_aggregator("Scaffold", {"server_lr": 0.5})
    begin = ServerState(0, state(1.0), {"c": AdapterState({"w": torch.tensor([10.0])})})
    updates = [update("a", [3.0], 10, 4.0, 1.0), update("b", [4.0], 30, 1.0, -4.0)]
    combined = rule.combine(updates, 2, begin)
    end = rule.advance(begin, replace(combined, population=5))
    assert end.adapter["w"].item() == pytest.approx(1.0 + 0.5 * 2.5)
    assert end.opt_state["c"]["w"].item() == pytest.approx(10.0 + 2 / 5 * -1.5)
    assert rule.advance(begin, combined).opt_state["c"]["w"].item() == pytest.approx(10.0 - 1.5)  # none but these
    assert rule.advance(begin, combined, adopt=True).opt_state["c"] is begin.opt_state["c"]


def test_scaffold_sends_its_variate_and_counts_it():
    rule = build_aggregator("Scaffold", {})
    begin = ServerState(0, AdapterState({"w": torch.ones(2)}))
    sent = rule.broadcast(begin, ["a", "b"])
    assert sent.control is not None and sent.control["w"].tolist() == [0.0, 0.0]
    assert sent.nbytes(["a", "b"]) == 2 * (8 + 8)
    assert update("a", [1.0], 1, 1.0, 2.0).sent == 8 + 4 and update("a", [1.0], 1, 1.0).sent == 8


def test_scaffold_without_a_change_is_refused():
    with pytest.raises(AdapterError, match="no client sent the change of its control variate"):
        after("Scaffold", [update("a", [1.0], 1, 1.0)], ServerState(0, state(0.0)))


@pytest.mark.parametrize("rule", ["FedNova", "Scaffold"])
def test_adapter_rules_that_it_goes_with(rule):
    assert aggregator_problems(rule, {"adapter": "fedit"}) == aggregator_problems(rule, {"adapter": "ffa"}) == []
    problems = aggregator_problems(rule, {"adapter": "rolora"})
    assert (problems == []) == (rule == "FedNova")
    if problems:
        assert problems[0].startswith("aggregator=Scaffold with aggregator.adapter=rolora: is not defined: a control")


@pytest.mark.parametrize("rule", ["FedNova", "Scaffold"])
def test_neither_goes_with_noise_or_filters(rule):
    with pytest.raises(ConfigError, match=f"aggregator={rule}: .*use another aggregator with a robust rule or privacy"):
        replace(build_aggregator(rule, {}), noise=lambda combined, state, trained: combined)


# --- on a model -------------------------------------------------------------------------------------------------------


def rounds(client, rule, number, *, adapter="fedit", steps=None, state=None, keep=None):
    work = {c: Work("train", NLL(), 1.0, steps=steps) for c in client.data}
    aggregator = build_aggregator(rule, {"weighting": "uniform", "adapter": adapter})
    begin = state or ServerState(0, client.reference)
    keep = keep or RunKeeper()
    schedule = Schedule((Phase("p", number, work),))
    return run_rounds(schedule, InProcess(client.fit), aggregator, begin, RoundsConfig(), keep), keep


SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "learning_rate": 0.05}


@pytest.fixture(scope="module")
def sgd(small_local, small_examples):
    local = small_local(**SGD)
    start = snapshot(local.model)

    def make(store=None) -> Client:
        """Three clients of six rows, who have the run's start as their reference."""
        splits = {f"client_{i}": {"train": small_examples[i * 6 : i * 6 + 6]} for i in range(3)}
        return Client(local, {c: ClientData(c, s) for c, s in splits.items()}, start, store=store or ClientStore())

    return make


def test_scaffolds_client_by_hand(sgd):
    """Option II in the paper's own form: c_k - c + (x - y) / (K lr), and the correction acts on every step."""
    client, task = sgd(), next(Schedule((Phase("p", 1, {"client_0": Work("train", NLL(), 3.0)}),)).tasks())
    zero = AdapterState({n: torch.zeros_like(t) for n, t in client.reference.items()})
    g = torch.Generator().manual_seed(0)
    c = AdapterState({n: torch.randn(t.shape, generator=g) * 0.01 for n, t in zero.items()})
    kept = AdapterState({n: torch.randn(t.shape, generator=g) * 0.01 for n, t in zero.items()})
    client.store = ClientStore(before=lambda client_id, kind: kept)
    done = client.fit(task, Broadcast(client.reference, control=c), "client_0")
    k = done.metrics["steps"]
    new = client.store.get("client_0", CONTROL, 1)
    assert k == 6 and new is not None and done.control is not None
    for name in zero:
        option = kept[name] - c[name] + (client.reference[name] - done.adapter[name]) / (k * SGD["learning_rate"])
        torch.testing.assert_close(new[name], option, rtol=1e-3, atol=2e-5)
        torch.testing.assert_close(done.control[name], new[name] - kept[name])
    plain = sgd().fit(task, Broadcast(client.reference), "client_0")
    assert plain.control is None and plain.adapter.digest() != done.adapter.digest()


@pytest.mark.parametrize("adapter", ["fedit", "ffa"])
def test_the_first_round_is_fedavgs_and_the_second_is_not(sgd, adapter):
    (one, _), (other, keep) = rounds(sgd(), "FedAvg", 1, adapter=adapter), rounds(sgd(), "Scaffold", 1, adapter=adapter)
    assert one.adapter.digest() == other.adapter.digest()
    trained = {n for n in one.adapter if adapter == "fedit" or "lora_B" in n}
    moved = {n for n, t in other.opt_state["c"].items() if bool(t.any())}
    assert moved <= trained and any("lora_B" in n for n in moved)
    bytes_of = sum(one.adapter[n].numel() * 4 for n in trained)
    assert keep.records[0].bytes_up == 3 * 2 * bytes_of
    assert keep.records[0].bytes_down == 3 * (one.adapter.nbytes + bytes_of)
    two, again = rounds(sgd(), "FedAvg", 2, adapter=adapter)[0], rounds(sgd(), "Scaffold", 2, adapter=adapter)[0]
    assert two.adapter.digest() != again.adapter.digest()


def test_the_servers_variate_is_the_mean_of_the_clients(sgd):
    """All take part: c is the mean of the c_k after every round, as in the paper."""
    client = sgd()
    end, _ = rounds(client, "Scaffold", 3)
    kept = [client.store.get(c, CONTROL, 3) for c in client.data]
    for name, c in end.opt_state["c"].items():
        torch.testing.assert_close(
            c, torch.stack([k[name] for k in kept if k is not None]).mean(0), rtol=1e-4, atol=1e-6
        )


def test_a_client_whose_variate_broke_keeps_the_one_before(sgd):
    client = sgd()
    rounds(client, "Scaffold", 1)
    before = client.store.get("client_0", CONTROL, 1)
    broken = AdapterState({n: torch.full(t.shape, float("nan")) for n, t in client.reference.items()})
    task = list(Schedule((Phase("p", 2, {"client_0": Work("train", NLL(), 1.0)}),)).tasks())[1]
    client.fit(task, Broadcast(client.reference, control=broken), "client_0")
    after_it = client.store.get("client_0", CONTROL, 2)
    assert before is not None and after_it is not None and after_it.digest() == before.digest()


def test_scaffold_goes_on_to_the_same_bytes(sgd, tmp_path):
    whole, _ = rounds(sgd(ClientStore(tmp_path / "whole")), "Scaffold", 3)
    seen: list[ServerState] = []
    rounds(sgd(ClientStore(tmp_path / "cut")), "Scaffold", 3, keep=RunKeeper(on_save=seen.append))
    again, _ = rounds(sgd(ClientStore(tmp_path / "cut")), "Scaffold", 3, state=seen[0])
    assert again.adapter.digest() == whole.adapter.digest()
    assert again.opt_state["c"].digest() == whole.opt_state["c"].digest()


def test_a_fixed_number_of_steps_goes_on_over_epochs(sgd):
    _, keep = rounds(sgd(), "FedAvg", 1, steps=5)  # 6 rows, 4 a step: 2 steps an epoch
    assert [m["steps"] for m in keep.records[0].metrics.values()] == [5.0] * 3
