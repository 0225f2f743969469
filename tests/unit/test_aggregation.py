"""Server rules: the arithmetic of two rounds written out, the mean, and the registry."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from unfed.aggregation.base import Aggregator
from unfed.aggregation.registry import AGGREGATORS, aggregator_problems, build_aggregator
from unfed.aggregation.tree import RunningMean, full_like
from unfed.base.errors import AdapterError, ConfigError
from unfed.base.types import AdapterState, ClientUpdate, Combined

W0 = [0.5, -1.0]
ROUNDS = [[0.7, -1.3], [0.6, -0.9]]  # what the clients' mean is in round one and two


def state(values: list[float], dtype: torch.dtype = torch.float32) -> AdapterState:
    return AdapterState({"w": torch.tensor(values, dtype=dtype)})


def update(client: str, adapter: AdapterState, num_examples: int = 1) -> ClientUpdate:
    return ClientUpdate(client, adapter, num_examples, {"steps": 2.0}, control=full_like(adapter, 1.0))


def two_rounds(rule: Aggregator) -> list[list[float]]:
    """The global weights after each of two rounds with the means in ``ROUNDS``."""
    adapter = state(W0)
    opt = rule.init(adapter)
    seen = []
    for target in ROUNDS:
        opt, adapter = rule.step(opt, adapter, Combined(state(target), 1, ("a",)))
        seen.append(adapter["w"].tolist())
    return seen


def test_fedavg_takes_the_mean_itself() -> None:
    combined = Combined(state(ROUNDS[0]), 1, ("a",))
    _, adapter = build_aggregator("FedAvg", {}).step({}, state(W0), combined)
    assert adapter is combined.adapter


def test_fedavg_with_half_a_step() -> None:
    first = [0.5 + 0.5 * 0.2, -1.0 + 0.5 * -0.3]
    second = [first[0] + 0.5 * (0.6 - first[0]), first[1] + 0.5 * (-0.9 - first[1])]
    seen = two_rounds(build_aggregator("FedAvg", {"server_lr": 0.5}))
    assert seen[0] == pytest.approx(first, rel=1e-6)
    assert seen[1] == pytest.approx(second, rel=1e-6)


def test_fedavgm_two_rounds() -> None:
    # round 1: m = delta = (0.2, -0.3); round 2: m = 0.9 m + (mean - w)
    first = [0.5 + 0.7 * 0.2, -1.0 + 0.7 * -0.3]
    m = [0.9 * 0.2 + (0.6 - first[0]), 0.9 * -0.3 + (-0.9 - first[1])]
    second = [first[0] + 0.7 * m[0], first[1] + 0.7 * m[1]]
    seen = two_rounds(build_aggregator("FedAvgM", {"server_lr": 0.7}))
    assert seen[0] == pytest.approx(first, rel=1e-6)
    assert seen[1] == pytest.approx(second, rel=1e-6)


def test_fedavgm_without_momentum_is_fedavg() -> None:
    plain = two_rounds(build_aggregator("FedAvg", {}))
    assert two_rounds(build_aggregator("FedAvgM", {"momentum": 0}))[1] == pytest.approx(plain[1], rel=1e-6)


@pytest.mark.parametrize("rule", ["FedAdagrad", "FedAdam", "FedYogi"])
def test_adaptive_rules_two_rounds(rule: str) -> None:
    """Algorithm 2 coordinate by coordinate in Python's own floats: v starts at tau^2, no bias correction."""
    lr, tau, beta1, beta2 = 0.1, 0.05, {"FedAdagrad": 0.0}.get(rule, 0.9), 0.99
    expected = []
    w, m, v = list(W0), [0.0, 0.0], [tau**2, tau**2]
    for mean in ROUNDS:
        for i in range(2):
            d = mean[i] - w[i]
            m[i] = beta1 * m[i] + (1 - beta1) * d
            if rule == "FedAdagrad":
                v[i] = v[i] + d * d
            elif rule == "FedAdam":
                v[i] = beta2 * v[i] + (1 - beta2) * d * d
            else:
                v[i] = v[i] - (1 - beta2) * d * d * math.copysign(1.0, v[i] - d * d)
            w[i] = w[i] + lr * m[i] / (math.sqrt(v[i]) + tau)
        expected.append(list(w))
    seen = two_rounds(build_aggregator(rule, {"server_lr": lr, "tau": tau}))
    assert seen[0] == pytest.approx(expected[0], rel=1e-6)
    assert seen[1] == pytest.approx(expected[1], rel=1e-6)


def test_yogi_falls_additively_where_adam_decays() -> None:
    """With updates far below sqrt(v), Yogi takes (1 - beta2) d^2 off, Adam (1 - beta2) (v - d^2)."""
    slots = {}
    for rule in ("FedAdam", "FedYogi"):
        aggregator = build_aggregator(rule, {"tau": 1.0})
        opt, _ = aggregator.step(aggregator.init(state([0.0])), state([0.0]), Combined(state([0.1]), 1, ("a",)))
        slots[rule] = opt["v"]["w"].item()
    assert slots["FedYogi"] == pytest.approx(1.0 - 0.01 * 0.01, rel=1e-6)
    assert slots["FedAdam"] == pytest.approx(0.99 + 0.01 * 0.01, rel=1e-6)


def test_slots_begin_as_published() -> None:
    adapter = AdapterState({"w": torch.ones(2, dtype=torch.bfloat16), "steps": torch.tensor([3])})
    assert dict(build_aggregator("FedAvg", {}).init(adapter)) == {}
    opt = build_aggregator("FedYogi", {"tau": 0.1}).init(adapter)
    assert set(opt) == {"m", "v"} and list(opt["v"]) == ["w"]
    assert opt["m"]["w"].dtype == torch.float32 and opt["m"]["w"].tolist() == [0.0, 0.0]
    assert opt["v"]["w"].tolist() == pytest.approx([0.01, 0.01])


@pytest.mark.parametrize("rule", sorted(AGGREGATORS))
def test_no_change_when_the_clients_return_what_they_got(rule: str) -> None:
    aggregator = build_aggregator(rule, {})
    adapter = state(W0, torch.bfloat16)
    combined = aggregator.combine([update("a", adapter, 3), update("b", adapter, 4)], 2)
    _, after = aggregator.step(aggregator.init(adapter), adapter, combined)
    assert after.digest() == adapter.digest()


@pytest.mark.parametrize("rule", sorted(AGGREGATORS))
def test_a_step_changes_nothing_in_place(rule: str) -> None:
    aggregator = build_aggregator(rule, {})
    adapter = state(W0)
    opt = aggregator.init(adapter)
    updates = [update("a", state([1.0, 2.0])), update("b", state([3.0, 4.0]))]
    before = [s.digest() for s in (adapter, *opt.values(), *(u.adapter for u in updates))]
    opt_after, after = aggregator.step(opt, adapter, aggregator.combine(iter(updates), 2))
    assert [s.digest() for s in (adapter, *opt.values(), *(u.adapter for u in updates))] == before
    assert after.digest() != adapter.digest()
    assert all(opt_after[k].digest() != opt[k].digest() for k in opt)


@pytest.mark.parametrize("rule", sorted(AGGREGATORS))
def test_dtypes_are_kept_and_buffers_copied(rule: str) -> None:
    def made(value: float, count: int) -> AdapterState:
        tensors: dict[str, Tensor] = {
            "half": torch.full((2,), value, dtype=torch.bfloat16),
            "wide": torch.full((2,), value, dtype=torch.float64),
            "count": torch.tensor([count]),
            "mask": torch.tensor([True, False]),
        }
        return AdapterState(tensors)

    aggregator = build_aggregator(rule, {"server_lr": 0.5})
    adapter = made(0.0, 1)
    combined = aggregator.combine([update("a", made(1.0, 7)), update("b", made(2.0, 9))], 2)
    _, after = aggregator.step(aggregator.init(adapter), adapter, combined)
    assert {n: t.dtype for n, t in after.items()} == {n: t.dtype for n, t in adapter.items()}
    assert combined.adapter["half"].tolist() == [1.5, 1.5]
    assert after["count"].tolist() == [7] and after["mask"].tolist() == [True, False]


def test_weights_follow_the_examples_or_do_not() -> None:
    updates = [update("a", state([1.0]), 1), update("b", state([5.0]), 3)]
    combined = build_aggregator("FedAvg", {}).combine(updates, 2)
    assert combined.adapter["w"].item() == pytest.approx(4.0)
    assert combined.num_examples == 4 and combined.client_ids == ("a", "b")
    assert combined.aggregation_error is None
    uniform = build_aggregator("FedAvg", {"weighting": "uniform"}).combine(updates, 2)
    assert uniform.adapter["w"].item() == pytest.approx(3.0)


def test_sixteen_bit_updates_are_averaged_in_float32() -> None:
    """500 clients at 1 and 500 at 2: in bfloat16 the last increments, below 0.002, would all be lost."""
    mean = RunningMean()
    for value in (1.0, 2.0):
        for _ in range(500):
            mean.add(state([value], torch.bfloat16), 1.0)
    assert mean.result()["w"].item() == 1.5
    assert mean.result()["w"].dtype == torch.bfloat16


def test_updates_are_consumed_one_at_a_time() -> None:
    """No update is still held by the rule (without LoRA factors) when the next is made."""
    import gc
    import weakref

    held: list[weakref.ref[Tensor]] = []

    def stream() -> Iterator[ClientUpdate]:
        for i in range(5):
            tensor = torch.full((4,), float(i))
            held.append(weakref.ref(tensor))
            yield update(f"c{i}", AdapterState({"w": tensor}))
            del tensor
            if i > 0:
                gc.collect()
                alive.append(sum(ref() is not None for ref in held))

    alive: list[int] = []
    combined = build_aggregator("FedAvg", {}).combine(stream(), 5)
    assert combined.adapter["w"].tolist() == [2.0] * 4
    assert max(alive) <= 1


@pytest.mark.parametrize("num_examples", [0, -3])
def test_an_update_without_examples_is_refused(num_examples: int) -> None:
    with pytest.raises(AdapterError, match="client_1"):
        build_aggregator("FedAvg", {}).combine([update("client_1", state(W0), num_examples)], 1)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (state([1.0]), "shape"),
        (AdapterState({"other": torch.ones(2)}), "missing w"),
        (state([1.0, float("nan")]), "not finite"),
    ],
)
def test_an_update_that_does_not_fit_names_its_client(broken: AdapterState, words: str) -> None:
    with pytest.raises(AdapterError, match=rf"client_9: .*{words}"):
        build_aggregator("FedAvg", {}).combine([update("a", state(W0)), update("client_9", broken)], 2)


def test_a_first_update_with_nan_is_refused_too() -> None:
    with pytest.raises(AdapterError, match="client_9"):
        build_aggregator("FedAvg", {}).combine([update("client_9", state([float("inf"), 1.0]))], 1)


def test_no_update_at_all() -> None:
    with pytest.raises(AdapterError, match="no client update"):
        build_aggregator("FedAvg", {}).combine([], 0)


def test_published_and_adapter_defaults() -> None:
    made = {name: build_aggregator(name, {}) for name in AGGREGATORS}
    assert list(made) == ["FedAvg", "FedAvgM", "FedAdagrad", "FedAdam", "FedYogi", "FedProx", "FedNova", "Scaffold"]
    assert all(rule.name == name for name, rule in made.items())
    assert build_aggregator("FedAvgM", {"momentum": 0.9, "server_lr": 1.0}) == made["FedAvgM"]
    assert build_aggregator("FedAdagrad", {"beta1": 0.0, "tau": 1e-3, "server_lr": 1e-3}) == made["FedAdagrad"]
    for name in ("FedAdam", "FedYogi"):
        given = {"beta1": 0.9, "beta2": 0.99, "tau": 1e-3, "server_lr": 1e-3}
        assert build_aggregator(name, given) == made[name]


def test_only_fedprox_asks_the_clients_for_a_proximal_term() -> None:
    assert build_aggregator("FedProx", {"proximal_mu": 0.3}).client_proximal_mu == 0.3
    assert build_aggregator("FedAvg", {}).client_proximal_mu == 0.0


def test_all_problems_at_once() -> None:
    found = aggregator_problems("FedAdam", {"Tau": 1, "server_lr": 0, "beta2": 1.0, "lora_scaling": 2.0})
    assert len(found) == 4
    assert "aggregator.Tau" in found[0] and "did you mean 'tau'" in found[0]
    assert found[1] == "aggregator.server_lr: must be a number above 0, not 0"
    assert found[2] == "aggregator.beta2: must be a number at least 0 and below 1, not 1.0"
    assert "aggregator.lora_scaling" in found[3]  # a fact of the model, not a setting
    with pytest.raises(ConfigError) as caught:
        build_aggregator("FedAdam", {"server_lr": 0, "beta2": 1.0})
    assert len(caught.value.problems) == 2


def test_adagrad_has_no_beta2_and_unknown_rules_name_the_nearest() -> None:
    assert "aggregator.beta2" in aggregator_problems("FedAdagrad", {"beta2": 0.99})[0]
    (problem,) = aggregator_problems("fedyogi", {})
    assert "did you mean 'FedYogi'" in problem
