"""FedSA-LoRA: what travels and what stays, the adapter for everyone, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from unfed.aggregation.adapters.fedsa import common
from unfed.aggregation.registry import build_aggregator
from unfed.base.types import AdapterState, ClientUpdate, ServerState
from unfed.config.checks import consistency
from unfed.config.schema import AggregatorConfig, HistoryConfig, PersonaliseConfig, RecipeConfig
from unfed.federated.client import OWN
from unfed.federated.own import OwnFactors
from unfed.federated.store import ClientStore, client_dir

A, B = "q.lora_A.weight", "q.lora_B.weight"
QUICK = settings(max_examples=40, deadline=None, derandomize=True)


def adapter(a: list[list[float]], b: list[list[float]]) -> AdapterState:
    return AdapterState({A: torch.tensor(a), B: torch.tensor(b)})


def fedsa(name: str = "FedAvg", **params: object):
    return build_aggregator(name, {"adapter": "fedsa", **params}, lora_scaling=2.0)


def test_a_travels_and_b_stays() -> None:
    start = adapter([[1.0, 2.0]], [[0.0], [0.0], [0.0]])
    sent = fedsa().broadcast(ServerState(0, start), ["c0", "c1"])
    assert sent.local == {B} and set(sent.returned("c0")) == {A}
    assert sent.nbytes(["c0", "c1"]) == 2 * 2 * 4  # two values of four bytes to each of two clients


def test_a_is_the_weighted_mean_and_the_servers_b_does_not_move() -> None:
    state = ServerState(0, adapter([[0.0, 0.0]], [[0.5], [0.25]]))
    updates = [
        ClientUpdate("c0", adapter([[4.0, 0.0]], [[0.5], [0.25]]), 1),
        ClientUpdate("c1", adapter([[0.0, 8.0]], [[0.5], [0.25]]), 3),
    ]
    combined = fedsa().combine(updates, 2, state)
    assert combined.adapter[A].tolist() == [[1.0, 6.0]]  # (1*4 + 3*0)/4, (1*0 + 3*8)/4
    assert combined.aggregation_error is None  # there is no average of products to miss
    for name in ("FedAvg", "FedAvgM", "FedAdam"):
        after = fedsa(name).advance(state, combined)
        assert torch.equal(after.adapter[B], state.adapter[B])
        assert not torch.equal(after.adapter[A], state.adapter[A])


def test_the_common_adapter_by_hand() -> None:
    shared = adapter([[1.0, 2.0]], [[9.0], [9.0]])
    own = [
        (AdapterState({B: torch.tensor([[1.0], [0.0]])}), 1.0),
        (AdapterState({B: torch.tensor([[0.0], [4.0]])}), 3.0),
    ]
    found = common(shared, own)
    assert found[B].tolist() == [[0.25], [3.0]] and torch.equal(found[A], shared[A])
    assert common(shared, []) is shared


@QUICK
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 4), st.integers(1, 7), st.integers(1, 7))
def test_it_does_what_the_personal_adapters_do_on_average(seed: int, clients: int, r: int, m: int, n: int) -> None:
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float32)  # noqa: E731
    shared = AdapterState({A: draw(r, n), B: torch.zeros(m, r)})
    own = [(AdapterState({B: draw(m, r)}), float(k + 1)) for k in range(clients)]
    total = sum(w for _, w in own)
    dense = sum(w / total * s[B].double() @ shared[A].double() for s, w in own)
    for order in (own, own[::-1]):
        found = common(shared, order)
        made = found[B].double() @ found[A].double()
        assert torch.linalg.norm(made - dense) <= 1e-6 * max(1.0, float(torch.linalg.norm(dense)))
    same = common(shared, [own[0]] * clients)  # equal ones are a fixed point
    assert torch.equal(same[B], own[0][0][B])


def test_only_clients_that_keep_rows_count_and_each_round_has_its_own(tmp_path) -> None:
    store = ClientStore(tmp_path, 3)
    for client, value in (("c0", 1.0), ("c1", 3.0), ("gone", 100.0)):
        for round_ in (0, 1):
            store.put(client, OWN, round_, AdapterState({B: torch.full((1, 1), value + round_)}))
    own = OwnFactors(frozenset({B}), {"c0": 1.0, "c1": 1.0, "silent": 5.0}, store)
    state = ServerState(2, adapter([[2.0]], [[0.0]]))
    assert own.served(state).adapter[B].item() == 3.0  # (2 + 4) / 2: neither who left nor who never took part
    assert own.served(replace(state, round=1)).adapter[B].item() == 2.0  # (1 + 3) / 2
    assert own.served(replace(state, round=0)).adapter is state.adapter
    assert own.nbytes(2) == 2 * 4
    assert own.of("silent", state) is state.adapter and own.of("c1", state)[B].item() == 4.0
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert files and all(f.stat().st_mode & 0o777 == 0o600 for f in files)
    assert all(d.stat().st_mode & 0o777 == 0o700 for f in files for d in f.parents if tmp_path in d.parents)


def test_a_client_goes_on_with_what_it_had_before_the_run() -> None:
    had = AdapterState({B: torch.ones(1, 1)})
    store = ClientStore(before=lambda client, kind: had if (client, kind) == ("c0", OWN) else None)
    assert store.get("c0", OWN, 0) is had and store.get("c1", OWN, 0) is None
    new = AdapterState({B: torch.zeros(1, 1)})
    store.put("c0", OWN, 0, new)
    assert store.get("c0", OWN, 0) is had and store.get("c0", OWN, 1) is new


def test_a_clients_name_never_leads_out_of_its_directory(tmp_path) -> None:
    names = ("client_0", "a b", "a/b", "..", ".hidden", "é")
    assert [client_dir(n) for n in names] == ["client_0", "a b", "a%2Fb", "%2E.", "%2Ehidden", "%C3%A9"]
    store = ClientStore(tmp_path)
    for n, name in enumerate(names):
        store.put(name, OWN, 0, AdapterState({B: torch.full((1, 1), float(n))}))
    assert [store.get(name, OWN, 1)[B].item() for name in names] == list(range(len(names)))
    assert {f.parents[2] for f in tmp_path.rglob("*.safetensors")} == {tmp_path / "clients"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"history": HistoryConfig(("updates",))}, "history.keep=updates"),
        ({"recipe": RecipeConfig("isolated")}, "recipe=isolated"),
        ({"model_args": {"use_lora": False, "lora_config": None}}, "use_lora=false"),
    ],
)
def test_what_needs_a_whole_adapter_at_the_server_is_refused(small_run, tmp_path, change, named) -> None:
    config = small_run("finetune", tmp_path, aggregator=AggregatorConfig("FedAvg", {"adapter": "fedsa"}), **change)
    found = consistency(config)
    assert [p for p in found if named in p], found
    plain = replace(config, aggregator=AggregatorConfig("FedAvg"))
    assert not [p for p in consistency(plain) if named in p]


@pytest.mark.parametrize(
    ("mode", "epochs", "change", "said"),
    [
        ("finetune", -1.0, {}, "personalise.epochs=-1: must be 0"),
        ("finetune", float("inf"), {}, "personalise.epochs=inf: must be 0"),
        (
            "finetune",
            1.0,
            {"handler": "finetune", "method_args": {"num_clients": None, "global_rounds": 2}},
            "one place",
        ),
        ("finetune", 1.0, {"model_args": {"use_lora": False, "lora_config": None}}, "a whole model of its own"),
    ],
)
def test_personalisation_that_cannot_be_is_refused(small_run, tmp_path, mode, epochs, change, said) -> None:
    config = small_run(mode, tmp_path, personalise=PersonaliseConfig(epochs), **change)
    assert [p for p in consistency(config) if said in p]
