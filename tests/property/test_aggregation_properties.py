"""Properties of the mean and of the LoRA aggregation error over random adapters."""

from __future__ import annotations

import math
from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from unfed.aggregation.lora import AggregationError, lora_pairs
from unfed.aggregation.registry import AGGREGATORS, build_aggregator
from unfed.aggregation.tree import full_like
from unfed.base.types import AdapterState, ClientUpdate

QUICK = settings(max_examples=40, deadline=None, derandomize=True)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Drawn:
    """Clients' adapters with their numbers of examples."""

    states: list[AdapterState]
    counts: list[int]

    def updates(self) -> list[ClientUpdate]:
        pairs = enumerate(zip(self.states, self.counts, strict=True))
        told = {"steps": 3.0}
        return [ClientUpdate(f"c{i}", s, n, told, control=full_like(s, 1.0)) for i, (s, n) in pairs]


@st.composite
def clients(draw: st.DrawFn, most: int = 6, dtype: torch.dtype | None = None) -> Drawn:
    """One to ``most`` clients whose adapters have two LoRA modules and a bias, near a common one or far apart."""
    number = draw(st.integers(1, most))
    seed = draw(st.integers(0, 2**31))
    rank, m, n = draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    size = 10.0 ** draw(st.integers(-5, 2))
    apart = draw(st.sampled_from([0.01, 0.3, 1.0, 10.0]))
    kind = dtype or draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "p.lora_A.weight": (rank, n),
        "p.lora_B.weight": (m, rank),
        "q.lora_embedding_A": (rank, m),
        "q.lora_embedding_B": (n, rank),
        "bias": (m,),
    }

    def noise() -> dict[str, torch.Tensor]:
        return {k: torch.randn(s, generator=generator, dtype=torch.float64) * size for k, s in shapes.items()}

    common = noise()
    states = []
    for _ in range(number):
        own = noise()
        states.append(AdapterState({k: (common[k] + apart * own[k]).to(kind) for k in shapes}))
    counts = draw(st.lists(st.integers(1, 10_000), min_size=number, max_size=number))
    return Drawn(states, counts)


@QUICK
@given(clients(), st.randoms(use_true_random=False), st.sampled_from(["examples", "uniform"]))
def test_the_order_of_clients_does_not_matter(drawn: Drawn, random: object, weighting: str) -> None:
    rule = build_aggregator("FedAvg", {"weighting": weighting})
    updates = drawn.updates()
    shuffled = list(updates)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = rule.combine(updates, len(updates)), rule.combine(shuffled, len(updates))
    for name, tensor in one.adapter.items():
        largest = max(float(s[name].double().abs().max()) for s in drawn.states)
        step = max(torch.finfo(tensor.dtype).eps, torch.finfo(torch.float32).eps) * 4 * len(updates)
        # Below its normal range float16 has a fixed step.
        floor = torch.finfo(tensor.dtype).smallest_normal * torch.finfo(tensor.dtype).eps * 2
        assert float((tensor.double() - other.adapter[name].double()).abs().max()) <= largest * step + floor
    assert one.num_examples == other.num_examples


@QUICK
@given(clients())
def test_the_mean_is_the_weighted_mean(drawn: Drawn) -> None:
    combined = build_aggregator("FedAvg", {}).combine(drawn.updates(), len(drawn.states))
    total = sum(drawn.counts)
    for name, tensor in combined.adapter.items():
        parts = zip(drawn.states, drawn.counts, strict=True)
        exact = torch.stack([s[name].double() * (n / total) for s, n in parts]).sum(0)
        largest = max(float(s[name].double().abs().max()) for s in drawn.states)
        step = max(torch.finfo(tensor.dtype).eps, torch.finfo(torch.float32).eps) * 4 * len(drawn.states)
        floor = torch.finfo(tensor.dtype).smallest_normal * torch.finfo(tensor.dtype).eps
        assert float((tensor.double() - exact).abs().max()) <= largest * step + floor


@QUICK
@given(clients(most=1), st.sampled_from(sorted(AGGREGATORS)))
def test_the_mean_of_one_client_is_that_client(drawn: Drawn, rule: str) -> None:
    combined = build_aggregator(rule, {}).combine(drawn.updates(), 1)
    assert combined.adapter.digest() == drawn.states[0].digest()
    assert combined.aggregation_error == 0.0


@QUICK
@given(clients(most=1), st.lists(st.integers(1, 10_000), min_size=2, max_size=20), st.sampled_from(sorted(AGGREGATORS)))
def test_equal_updates_are_a_fixed_point(drawn: Drawn, counts: list[int], rule: str) -> None:
    aggregator = build_aggregator(rule, {})
    updates = Drawn(drawn.states * len(counts), counts).updates()
    combined = aggregator.combine(updates, len(updates))
    assert combined.adapter.digest() == drawn.states[0].digest()
    assert combined.aggregation_error is not None and combined.aggregation_error < 1e-12
    _, after = aggregator.step(aggregator.init(drawn.states[0]), drawn.states[0], combined)
    assert after.digest() == drawn.states[0].digest()


def dense_error(drawn: Drawn, mean: AdapterState, scaling: dict[str, float]) -> float:
    """The error by its definition, with the products formed in float64."""
    total = sum(drawn.counts)
    wanted_sq = missed_sq = 0.0
    for module, (a, b) in lora_pairs(mean).items():
        parts = zip(drawn.states, drawn.counts, strict=True)
        wanted = torch.stack([n / total * scaling[module] * s[b].double() @ s[a].double() for s, n in parts]).sum(0)
        missed = wanted - scaling[module] * mean[b].double() @ mean[a].double()
        wanted_sq += float(wanted.square().sum())
        missed_sq += float(missed.square().sum())
    return math.sqrt(missed_sq / wanted_sq)


@QUICK
@given(clients(), st.floats(0.1, 8.0), st.floats(0.1, 8.0))
def test_the_error_is_that_of_the_dense_computation(drawn: Drawn, p: float, q: float) -> None:
    scaling = {"p": p, "q": q}
    rule = build_aggregator("FedAvg", {}, lora_scaling=scaling)
    combined = rule.combine(drawn.updates(), len(drawn.states))
    assert combined.aggregation_error == pytest.approx(
        dense_error(drawn, combined.adapter, scaling), rel=1e-6, abs=1e-9
    )


@QUICK
@given(clients(dtype=torch.float64), st.integers(0, 1000))
def test_many_probes_come_close_to_the_exact_error(drawn: Drawn, seed: int) -> None:
    """4000 probes: each squared norm has a relative deviation of at most sqrt(2/4000) = 2.2 %, so 12 % is five
    of them in the worst case of rank one; the ratio's root is no wider."""
    mean = build_aggregator("FedAvg", {}).combine(drawn.updates(), len(drawn.states)).adapter
    exact, sketched = AggregationError(2.0, 1), AggregationError(2.0, 99, probes=4000, seed=seed)
    for s, n in zip(drawn.states, drawn.counts, strict=True):
        exact.add(s, float(n))
        sketched.add(s, float(n))
    assert sketched.is_estimate and not exact.is_estimate
    assert sketched.result(mean) == pytest.approx(exact.result(mean), rel=0.12, abs=1e-9)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.sampled_from([0.02, 0.3, 1.0]))
def test_the_default_probes_on_an_adapter_of_usual_shape(seed: int, apart: float) -> None:
    """Twelve modules of rank 8 and 17 clients with the default 8 probes: within 25 %."""
    generator = torch.Generator().manual_seed(seed)

    def noise() -> dict[str, torch.Tensor]:
        return {
            f"m{i}.lora_{letter}.weight": torch.randn(shape, generator=generator)
            for i in range(12)
            for letter, shape in (("A", (8, 40)), ("B", (30, 8)))
        }

    common = noise()
    states = []
    for _ in range(17):
        own = noise()
        states.append(AdapterState({k: common[k] + apart * own[k] for k in own}))
    updates = [ClientUpdate(f"c{i}", s, 10 + i) for i, s in enumerate(states)]
    combined = build_aggregator("FedAvg", {}, probe_seed=seed).combine(updates, 17)
    exact = AggregationError(1.0, 17, exact_limit=17)
    for u in updates:
        exact.add(u.adapter, float(u.num_examples))
    assert combined.error_is_estimate
    assert combined.aggregation_error == pytest.approx(exact.result(combined.adapter), rel=0.25)
