"""Fed-SB: the mean of the cores, the fixed factors and where they come from, and the core in a model."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from unfed.aggregation.adapters.fed_sb import core_name, factored, is_fresh, plain, spanned
from unfed.aggregation.registry import aggregator_problems, build_aggregator
from unfed.base.errors import AdapterError
from unfed.base.types import AdapterState, ClientUpdate, ServerState
from unfed.models.adapter import held, restore, snapshot
from unfed.models.core import has_cores, put_cores, take_cores
from unfed.models.forward import token_logps
from unfed.models.weight_gradient import Sketch, gradient_factors

A, B, R = "q.lora_A.weight", "q.lora_B.weight", core_name("q")
QUICK = settings(max_examples=40, deadline=None, derandomize=True)


def fed_sb(name: str = "FedAvg", **params: object):
    return build_aggregator(name, {"adapter": "fed_sb", **params}, lora_scaling=2.0)


def orthonormal(g: torch.Generator, m: int, r: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(m, r, generator=g, dtype=torch.float64))[0].float()


def drawn(seed: int, clients: int, r: int, m: int, n: int) -> tuple[AdapterState, list[ClientUpdate]]:
    g = torch.Generator().manual_seed(seed)
    a, b = orthonormal(g, n, r).T.contiguous(), orthonormal(g, m, r)
    cores = [torch.randn(r, r, generator=g) for _ in range(clients + 1)]
    states = [AdapterState({A: a, B: b, R: core}) for core in cores]
    return states[0], [ClientUpdate(f"c{k}", s, k + 1) for k, s in enumerate(states[1:])]


def test_only_the_core_travels_in_a_round() -> None:
    start, _ = drawn(0, 1, 2, 5, 7)
    sent = fed_sb().broadcast(ServerState(0, start), ["c0"])
    assert set(sent.returned("c0")) == {R} and sent.frozen == {A, B}
    assert sent.nbytes(["c0", "c1", "c2"]) == 3 * 4 * 4  # three clients, 2 x 2 values of four bytes


@QUICK
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 4), st.integers(4, 9), st.integers(4, 9))
def test_the_mean_of_the_cores_is_the_dense_mean(seed: int, clients: int, r: int, m: int, n: int) -> None:
    start, updates = drawn(seed, clients, r, m, n)
    total = sum(u.num_examples for u in updates)
    dense = sum(
        (u.num_examples / total) * u.adapter[B].double() @ u.adapter[R].double() @ u.adapter[A].double()
        for u in updates
    )
    for order in (updates, updates[::-1]):
        combined = fed_sb().combine(order, clients, ServerState(0, start))
        made = plain(combined.adapter)
        product = made[B].double() @ made[A].double()
        assert torch.linalg.norm(product - dense) <= 1e-6 * max(1.0, float(torch.linalg.norm(dense)))
        assert combined.aggregation_error is not None and combined.aggregation_error < 1e-6
        assert torch.equal(combined.adapter[A], start[A]) and torch.equal(combined.adapter[B], start[B])
    same = fed_sb().combine([updates[0]] * 3, 3, ServerState(0, start))
    assert torch.equal(same.adapter[R], updates[0].adapter[R])


def test_a_server_optimizer_moves_the_core_alone() -> None:
    start, updates = drawn(3, 2, 2, 5, 6)
    for name in ("FedAvgM", "FedAdam", "FedYogi"):
        rule, state = fed_sb(name), ServerState(0, start)
        after = rule.advance(state, rule.combine(updates, 2, state))
        assert torch.equal(after.adapter[A], start[A]) and torch.equal(after.adapter[B], start[B])
        assert not torch.equal(after.adapter[R], start[R])


def test_plain_by_hand() -> None:
    state = AdapterState({A: torch.eye(2), B: torch.tensor([[1.0, 2.0]]), R: torch.tensor([[0.0, 3.0], [1.0, 0.0]])})
    made = plain(state)
    assert made[A].tolist() == [[0.0, 3.0], [1.0, 0.0]] and set(made) == {A, B}
    assert (made[B] @ made[A]).tolist() == [[2.0, 3.0]]


@QUICK
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(4, 9), st.integers(4, 9))
def test_a_learned_adapter_is_kept_up_to_rounding(seed: int, r: int, m: int, n: int) -> None:
    g = torch.Generator().manual_seed(seed)
    learned = AdapterState({A: torch.randn(r, n, generator=g), B: torch.randn(m, r, generator=g)})
    found = factored(learned)
    dense = learned[B].double() @ learned[A].double()
    kept = plain(found)
    assert torch.linalg.norm(kept[B].double() @ kept[A].double() - dense) <= 1e-6 * float(torch.linalg.norm(dense))
    assert torch.allclose(found[B].T @ found[B], torch.eye(r), atol=1e-6)
    assert torch.allclose(found[A] @ found[A].T, torch.eye(r), atol=1e-6)
    values = torch.linalg.svdvals(dense)[:r]
    assert torch.allclose(found[R].double(), torch.diag(values), atol=1e-5 * float(values[0]))


def test_the_factors_span_the_weighted_mean_gradient() -> None:
    """Two clients that send their gradients as factors, weights 1 and 3, against the SVD of the whole matrix."""
    g = torch.Generator().manual_seed(1)
    parts = [({"q": (torch.randn(6, 3, generator=g), torch.randn(3, 8, generator=g))}, w) for w in (1.0, 3.0)]
    dense = sum(w / 4 * f["q"][0].double() @ f["q"][1].double() for f, w in parts)
    u, _, vh = torch.linalg.svd(dense)
    found = spanned(AdapterState({A: torch.zeros(2, 8), B: torch.zeros(6, 2)}), parts)
    assert not found[R].any()
    assert torch.allclose(found[B] @ found[B].T, (u[:, :2] @ u[:, :2].T).float(), atol=1e-5)
    assert torch.allclose(found[A].T @ found[A], (vh[:2].T @ vh[:2]).float(), atol=1e-5)


def test_what_cannot_be() -> None:
    with pytest.raises(AdapterError, match="3 x 8 and cannot have orthonormal factors of rank 4"):
        factored(AdapterState({A: torch.ones(4, 8), B: torch.ones(3, 4)}))
    with pytest.raises(AdapterError, match="no client sent a gradient"):
        spanned(AdapterState({A: torch.zeros(2, 8), B: torch.zeros(6, 2)}), [])
    found = aggregator_problems("FedAvg", {"adapter": "fed_sb", "adapter_args": {"init_rows": 0}})
    assert found and "init_rows" in found[0]


def test_the_core_in_a_model(small_local, small_examples) -> None:
    """It changes nothing while it is the identity, computes what ``R A`` would, and trains alone."""
    local = small_local()
    model, batch = local.model, local.collation.batch(small_examples[:3])
    learned = AdapterState({n: torch.randn_like(t) * 0.1 for n, t in snapshot(model).items()})
    restore(model, learned)
    model.eval()
    with torch.no_grad():
        before = token_logps(model, batch)[0]
    put_cores(model)
    with torch.no_grad():
        assert torch.equal(token_logps(model, batch)[0], before)
    start = factored(learned)
    assert set(snapshot(model)) == set(start) and has_cores(model)
    restore(model, start)
    with torch.no_grad():
        assert torch.allclose(token_logps(model, batch)[0], before, atol=1e-4)
    moved = AdapterState({n: t + 0.1 if ".lora_R." in n else t for n, t in start.items()})
    restore(model, moved)
    with torch.no_grad():
        by_core = token_logps(model, batch)[0]
    with held(model, frozenset(n for n in moved if ".lora_R." not in n)):
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        token_logps(model, batch)[0].sum().backward()
    assert trainable and all("lora_R" in n for n in trainable)
    assert all(p.grad is not None and bool(p.grad.any()) for n, p in model.named_parameters() if n in trainable)
    take_cores(model)
    assert not has_cores(model) and set(snapshot(model)) == set(learned)
    restore(model, plain(moved))
    with torch.no_grad():
        assert torch.allclose(token_logps(model, batch)[0], by_core, atol=1e-4)
        assert not torch.allclose(by_core, before, atol=1e-2)


def test_the_gradient_of_all_weights(small_local, small_examples) -> None:
    """The factors of two batches are the best of their rank of what autograd says of the base's own weights."""
    local = small_local()
    model, rank = local.model, 4
    fresh = snapshot(model)
    assert is_fresh(fresh)
    batches = [local.collation.batch(small_examples[k : k + 3]) for k in (0, 3)]
    modules = [n.removesuffix(".lora_A.weight") for n in fresh if n.endswith("lora_A.weight")]
    found = gradient_factors(model, batches, Sketch(dict.fromkeys(modules, rank), 24, 0))
    assert all(p.grad is None for p in model.parameters())
    weights = {m: model.get_submodule(m).base_layer.weight for m in modules}
    for weight in weights.values():
        weight.requires_grad_(True)
    model.eval()
    tokens = sum(int(b.num_label_tokens.sum()) for b in batches)
    loss = sum(-token_logps(model, b)[0].sum() for b in batches) / tokens
    for module, exact in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
        left, right = found[module]
        assert left.shape == (exact.shape[0], rank) and right.shape == (rank, exact.shape[1])
        missed = float(torch.linalg.norm(left @ right - exact))
        best = math.sqrt(float(torch.linalg.svdvals(exact)[rank:].square().sum()))
        # 28 of 32 directions are looked at, so hardly anything is lost to the random ones.
        assert missed <= 1.05 * best + 1e-7
