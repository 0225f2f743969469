"""Adapters side by side: weights, scaling, and what cannot be put there; and how clients are dealt to shards."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from unfed.base.errors import AdapterError, UnfedError
from unfed.base.types import AdapterState
from unfed.models.stack import concatenate, stacked_config
from unfed.unlearning.isolated import Isolated

A, B = "m.lora_A.weight", "m.lora_B.weight"


def adapter(a, b, **more) -> AdapterState:
    return AdapterState({A: torch.tensor(a), B: torch.tensor(b), **more})


def test_two_adapters_by_hand():
    """Rank 1 each, weights 1/4 and 3/4: B A of the stack is (1/4) 2 [1 2] + (3/4) 4 [5 6] = [15.5 19]."""
    stack = concatenate([(0.25, adapter([[1.0, 2.0]], [[2.0]])), (0.75, adapter([[5.0, 6.0]], [[4.0]]))])
    assert stack[A].tolist() == [[1.0, 2.0], [5.0, 6.0]] and stack[B].tolist() == [[0.5, 3.0]]
    assert (stack[B] @ stack[A]).tolist() == [[15.5, 19.0]]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 5))
def test_the_stacks_update_is_the_weighted_sum(seed, rank, count):
    g = torch.Generator().manual_seed(seed)
    parts = [
        (w, AdapterState({A: torch.randn(rank, 6, generator=g), B: torch.randn(5, rank, generator=g)}))
        for w in torch.rand(count, generator=g).tolist()
    ]
    stack = concatenate(parts)
    assert stack[A].shape == (rank * count, 6) and stack[B].shape == (5, rank * count)
    expected = sum(w * s[B].double() @ s[A].double() for w, s in parts)
    assert torch.allclose(stack[B].double() @ stack[A].double(), expected, atol=1e-4)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_scaling_stays(rslora):
    own = LoraConfig(r=4, lora_alpha=8, use_rslora=rslora, rank_pattern={"x": 2}, alpha_pattern={"x": 3})
    made = stacked_config(own, 3)
    power = 0.5 if rslora else 1.0
    assert (made.r, made.rank_pattern) == (12, {"x": 6}) and (own.r, own.rank_pattern) == (4, {"x": 2})
    assert made.lora_alpha / made.r**power == pytest.approx(8 / 4**power)
    assert made.alpha_pattern["x"] / 6**power == pytest.approx(3 / 2**power)


def test_what_is_no_factor_or_does_not_match_is_refused():
    one = adapter([[1.0]], [[1.0]])
    with pytest.raises(AdapterError, match=r"m.bias is no LoRA factor: only plain LoRA adapters"):
        concatenate([(1.0, adapter([[1.0]], [[1.0]], **{"m.bias": torch.zeros(1)}))])
    with pytest.raises(AdapterError, match=r"lora_A.weight has shape \(2, 1\), not \(1, 1\)"):
        concatenate([(0.5, one), (0.5, adapter([[1.0], [2.0]], [[1.0, 1.0]]))])


def test_clients_are_dealt_in_turn_and_keep_their_shard_when_others_are_gone():
    rows = {f"client_{i}": (f"row_{i}",) for i in range(5)}
    two = Isolated(shards=2)
    assert [list(s.rows) for s in two.deal(rows)] == [["client_0", "client_2", "client_4"], ["client_1", "client_3"]]
    assert [list(s.rows) for s in Isolated().deal(rows)] == [[c] for c in rows]
    left = two.deal({**rows, "client_1": (), "client_3": ()})
    assert [(s.index, list(s.rows)) for s in left] == [(0, ["client_0", "client_2", "client_4"])]
    left = Isolated().deal({**rows, "client_0": ()})
    assert [(s.index, list(s.rows)) for s in left] == [(i, [f"client_{i}"]) for i in range(1, 5)]
    with pytest.raises(UnfedError, match=r"recipe.shards=6: there are 5 clients; use 5 or less"):
        Isolated(shards=6).deal(rows)
