"""The LoRA aggregation error: pairs by name, known values, scaling, and the switch to probes."""

from __future__ import annotations

import math

import pytest
import torch

from unfed.aggregation.lora import EXACT_LIMIT, AggregationError, lora_pairs
from unfed.aggregation.registry import build_aggregator
from unfed.base.types import AdapterState, ClientUpdate, Combined

A, B = "q.lora_A.weight", "q.lora_B.weight"


def adapter(a: list[list[float]], b: list[list[float]]) -> AdapterState:
    return AdapterState({A: torch.tensor(a), B: torch.tensor(b)})


def combine(states: list[AdapterState], **options: object) -> Combined:
    rule = build_aggregator("FedAvg", {}, **options)  # type: ignore[arg-type]
    return rule.combine([ClientUpdate(f"c{i}", s, 1) for i, s in enumerate(states)], len(states))


def test_pairs_by_name() -> None:
    one = torch.ones(1, 1)
    names = [
        "m.layers.0.q_proj.lora_A.weight",
        "m.layers.0.q_proj.lora_B.weight",
        "m.embed_tokens.lora_embedding_A",
        "m.embed_tokens.lora_embedding_B",
        "m.layers.0.k_proj.lora_B.weight",  # A frozen elsewhere
        "m.lm_head.weight",
    ]
    assert lora_pairs(AdapterState(dict.fromkeys(names, one))) == {
        "m.layers.0.q_proj": (names[0], names[1]),
        "m.embed_tokens": (names[2], names[3]),
    }


def test_two_clients_by_hand() -> None:
    """B A of the clients: diag(1, 0) and diag(0, 1); wanted diag(1/2, 1/2), averaged factors all 1/4."""
    result = combine([adapter([[1.0, 0.0]], [[1.0], [0.0]]), adapter([[0.0, 1.0]], [[0.0], [1.0]])])
    assert result.aggregation_error == pytest.approx(math.sqrt(4 / 16) / math.sqrt(2 / 4), rel=1e-12)
    assert not result.error_is_estimate


def test_equal_a_or_equal_b_costs_nothing() -> None:
    same_a = [adapter([[1.0, 2.0]], [[0.1 * i], [1.0]]) for i in range(3)]
    error = combine(same_a).aggregation_error
    assert error is not None and error < 1e-7  # the float32 rounding of the mean alone


def test_before_training_it_is_zero() -> None:
    """Every B is 0: 0/0 counts as no error, also where it is sketched."""
    torch.manual_seed(0)
    fresh = [AdapterState({A: torch.randn(2, 5), B: torch.zeros(4, 2)}) for _ in range(EXACT_LIMIT + 1)]
    assert combine(fresh[:3]).aggregation_error == 0.0
    assert combine(fresh).aggregation_error == 0.0


def test_one_client_has_exactly_none() -> None:
    torch.manual_seed(0)
    assert combine([AdapterState({A: torch.randn(2, 5), B: torch.randn(4, 2)})]).aggregation_error == 0.0


def test_opposite_updates_that_cancel() -> None:
    """The wanted update is 0 and the averaged factors' product is not."""
    states = [adapter([[1.0]], [[1.0]]), adapter([[3.0]], [[-1.0 / 3.0]])]
    meter = AggregationError(1.0, 2)
    for s in states:
        meter.add(AdapterState({n: t.double().round(decimals=6) for n, t in s.items()}), 1.0)
    error = meter.result(adapter([[2.0]], [[1.0 / 3.0]]))
    assert error is not None and error > 1e5


def test_scaling_by_module_weighs_the_modules() -> None:
    """Module p is exact, q is off by hand-made 1/sqrt(2); s shifts the weight between them."""
    states = []
    for a, b in (([[1.0, 0.0]], [[1.0], [0.0]]), ([[0.0, 1.0]], [[0.0], [1.0]])):
        exact = {"p.lora_A.weight": torch.tensor([[1.0, 0.0]]), "p.lora_B.weight": torch.tensor([[1.0], [0.0]])}
        states.append(AdapterState({**adapter(a, b), **exact}))
    missed, wanted_q, wanted_p = 4 / 16, 2 / 4, 1.0
    expected = math.sqrt(9 * missed / (9 * wanted_q + 4 * wanted_p))
    assert combine(states, lora_scaling={"p": 2.0, "q": 3.0}).aggregation_error == pytest.approx(expected, rel=1e-12)
    same = combine(states, lora_scaling=5.0).aggregation_error
    assert same == pytest.approx(math.sqrt(missed / (wanted_q + wanted_p)), rel=1e-12)


def test_probes_take_over_beyond_the_limit_and_are_seeded() -> None:
    torch.manual_seed(1)
    shared_a, shared_b = torch.randn(4, 30), torch.randn(20, 4)
    states = [
        AdapterState({A: shared_a + 0.5 * torch.randn(4, 30), B: shared_b + 0.5 * torch.randn(20, 4)})
        for _ in range(EXACT_LIMIT + 1)
    ]
    assert not combine(states[:EXACT_LIMIT]).error_is_estimate
    first, again, other = combine(states), combine(states), combine(states, probe_seed=1)
    assert first.error_is_estimate and first.aggregation_error == again.aggregation_error
    assert first.aggregation_error != other.aggregation_error


def test_the_server_optimizers_measure_it_too() -> None:
    states = [adapter([[1.0, 0.0]], [[1.0], [0.0]]), adapter([[0.0, 1.0]], [[0.0], [1.0]])]
    rule = build_aggregator("FedYogi", {})
    combined = rule.combine([ClientUpdate(f"c{i}", s, 1) for i, s in enumerate(states)], 2)
    assert combined.aggregation_error == pytest.approx(1 / math.sqrt(2))
