"""Adapter rules: what trains and travels, what they make of it, and what exact ones keep beneath the adapter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unfed.aggregation.adapters.low_rank import Products
from unfed.aggregation.adapters.ranks import padded, truncated
from unfed.aggregation.registry import aggregator_problems, build_aggregator
from unfed.base.errors import AdapterError
from unfed.base.types import AdapterState, ClientUpdate, ServerState
from unfed.federated.store import ClientStore

A, B, BIAS = "m.lora_A.weight", "m.lora_B.weight", "n.bias"
EXACT = ("flora", "fedex")


def drawn(seed: int, clients: int, rank: int = 2, m: int = 7, n: int = 5) -> list[AdapterState]:
    g = torch.Generator().manual_seed(seed)
    return [
        AdapterState(
            {
                A: torch.randn(rank, n, generator=g),
                B: torch.randn(m, rank, generator=g),
                BIAS: torch.randn(3, generator=g),
            }
        )
        for _ in range(clients)
    ]


def updates(states, counts) -> list[ClientUpdate]:
    return [ClientUpdate(f"c{i}", s, n) for i, (s, n) in enumerate(zip(states, counts, strict=True))]


def rule(adapter: str, scaling: float = 2.0, **given):
    return build_aggregator("FedAvg", {"adapter": adapter, **given}, lora_scaling=scaling)


def effective(state: ServerState, scaling: float = 2.0) -> torch.Tensor:
    own = scaling * state.adapter[B].double() @ state.adapter[A].double()
    beneath = state.base_residual
    return own if beneath is None else own + beneath[B].double() @ beneath[A].double()


def wanted(states, counts, scaling: float = 2.0) -> torch.Tensor:
    total = sum(counts)
    return sum(n / total * scaling * s[B].double() @ s[A].double() for s, n in zip(states, counts, strict=True))


def test_what_flora_and_fedex_keep_beneath_by_hand():
    """Rank 1, scaling 2, weights 1/4 and 3/4: the wanted update is 2 (1/4 * 2 * [1 2] + 3/4 * 4 * [5 6]) = [31 38].

    The means are A = [4 5], B = 3.5, whose product at scaling 2 is [28 35]; the rest is [3 3].
    """
    states = [
        AdapterState({A: torch.tensor([[1.0, 2.0]]), B: torch.tensor([[2.0]])}),
        AdapterState({A: torch.tensor([[5.0, 6.0]]), B: torch.tensor([[4.0]])}),
    ]
    found = {}
    for name in EXACT:
        aggregator, start = rule(name), ServerState(0, states[0])
        after = aggregator.advance(start, aggregator.combine(updates(states, (1, 3)), 2, start))
        assert after.base_residual is not None
        found[name] = after, after.base_residual[B] @ after.base_residual[A]
        torch.testing.assert_close(effective(after), torch.tensor([[31.0, 38.0]], dtype=torch.float64))
    torch.testing.assert_close(found["flora"][1], torch.tensor([[31.0, 38.0]]))
    torch.testing.assert_close(found["fedex"][1], torch.tensor([[3.0, 3.0]]))
    assert found["flora"][0].adapter[B].tolist() == [[0.0]] and found["flora"][0].adapter[A].abs().max() <= 2**-0.5
    assert found["fedex"][0].adapter[A].tolist() == [[4.0, 5.0]] and found["fedex"][0].adapter[B].tolist() == [[3.5]]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 50), min_size=1, max_size=6), st.sampled_from(EXACT))
def test_exact_rules_equal_the_dense_weighted_mean_over_two_rounds(seed, counts, name):
    """Whatever lies beneath already stays, and the rank never exceeds the matrix (7 x 5)."""
    aggregator, states = rule(name), drawn(seed, len(counts))
    state = ServerState(0, states[0])
    beneath = torch.zeros(7, 5, dtype=torch.float64)
    for number in range(2):
        states = drawn(seed + number, len(counts))
        combined = aggregator.combine(updates(states, counts), len(counts), state)
        state = aggregator.advance(state, combined)
        dense = beneath + wanted(states, counts)
        assert torch.allclose(effective(state), dense, atol=1e-6 * float(dense.abs().max()) + 1e-9)
        assert combined.aggregation_error is not None and combined.aggregation_error < 1e-6
        assert state.base_residual is not None and state.base_residual[A].shape[0] <= 5
        beneath = state.base_residual[B].double() @ state.base_residual[A].double()
        mean = sum(n / sum(counts) * s[BIAS].double() for s, n in zip(states, counts, strict=True))
        assert torch.allclose(state.adapter[BIAS].double(), mean, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 50), min_size=2, max_size=5), st.sampled_from(EXACT))
def test_the_order_of_clients_does_not_matter_to_what_they_make(seed, counts, name):
    aggregator, states = rule(name), drawn(seed, len(counts))
    state = ServerState(0, states[0])
    one = aggregator.advance(state, aggregator.combine(updates(states, counts), 5, state))
    other = aggregator.advance(state, aggregator.combine(updates(states, counts)[::-1], 5, state))
    assert torch.allclose(effective(one), effective(other), atol=1e-5)


@pytest.mark.parametrize("name", EXACT)
def test_equal_updates_and_one_client_are_what_they_were(name):
    aggregator, (one,) = rule(name), drawn(3, 1)
    state = ServerState(0, one)
    for count in (1, 4):
        after = aggregator.advance(state, aggregator.combine(updates([one] * count, range(1, count + 1)), count, state))
        torch.testing.assert_close(effective(after), wanted([one], [1]), atol=1e-6, rtol=1e-6)


def test_ffa_and_rolora_hold_a_factor_and_are_exact_with_it():
    start = drawn(5, 1)[0]
    for name, held in (("ffa", (A, A, A)), ("rolora", (A, B, A))):
        aggregator, state = rule(name), ServerState(0, start)
        for number in range(3):
            sent = aggregator.broadcast(state, ["c0", "c1"])
            assert sent.frozen == {held[number]}
            assert set(sent.returned("c0")) == {A, B, BIAS} - {held[number]}
            states = [AdapterState({**state.adapter, **s.without({held[number]})}) for s in drawn(10 * number + 1, 2)]
            combined = aggregator.combine(updates(states, (1, 2)), 2, state)
            assert combined.aggregation_error is not None and combined.aggregation_error < 1e-6
            before, state = state, aggregator.advance(state, combined)
            assert torch.equal(state.adapter[held[number]], before.adapter[held[number]])
            torch.testing.assert_close(effective(state), wanted(states, (1, 2)), atol=1e-5, rtol=1e-5)


def test_momentum_does_not_move_the_factor_that_is_held():
    """FedAvgM over RoLoRA: in round 2 A trains and B is held, though B's momentum is not zero."""
    start = AdapterState({A: torch.zeros(1, 2), B: torch.zeros(2, 1)})
    aggregator = build_aggregator("FedAvgM", {"adapter": "rolora"})
    state = ServerState(0, start)
    for moved_name in (B, A):
        states = [AdapterState({**state.adapter, moved_name: state.adapter[moved_name] + 1.0})]
        state = aggregator.advance(state, aggregator.combine(updates(states, [1]), 1, state))
    assert state.adapter[A].tolist() == [[1.0, 1.0]] and state.adapter[B].tolist() == [[1.0], [1.0]]
    assert state.opt_state["m"][B].tolist() == [[1.0], [1.0]]
    states = [AdapterState({**state.adapter, B: state.adapter[B] + 1.0})]
    state = aggregator.advance(state, aggregator.combine(updates(states, [1]), 1, state))
    assert state.adapter[B][0, 0] == pytest.approx(1.0 + 0.9 * 1.0 + 1.0)


@pytest.mark.parametrize(
    ("name", "params", "said"),
    [
        ("FedAdam", {"adapter": "flora"}, "aggregator=FedAdam with aggregator.adapter=flora: is not defined"),
        ("FedAvg", {"adapter": "fedex", "server_lr": 0.5}, "use aggregator=FedAvg or FedProx with server_lr 1"),
        ("FedAvg", {"adapter": "flor"}, r"aggregator.adapter=flor: no such rule.*flora"),
        ("FedAvg", {"adapter": "flora", "adapter_args": {"inti": "gaussian"}}, "aggregator.adapter_args.inti"),
        ("FedAvg", {"adapter": "flora", "adapter_args": {"init": "x"}}, r"aggregator.adapter_args.init: .*gaussian"),
        ("FedAvg", {"adapter_args": "x"}, "must be hyperparameters by name"),
    ],
)
def test_what_is_not_defined_is_refused_with_the_reason(name, params, said):
    import re

    (problem,) = aggregator_problems(name, params)
    assert re.search(said, problem)


def test_without_factors_an_exact_rule_says_so():
    one = AdapterState({"w": torch.ones(2)})
    with pytest.raises(AdapterError, match="there are no LoRA factors; use adapter=fedit"):
        rule("flora").combine([ClientUpdate("a", one, 1)], 1, ServerState(0, one))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 6), st.integers(1, 6))
def test_the_fewest_factors_give_the_same_matrix(seed, k, m, n):
    g = torch.Generator().manual_seed(seed)
    pairs = [(torch.randn(m, 1, generator=g), torch.randn(1, n, generator=g)) for _ in range(k)]
    whole = Products.of(pairs)
    dense = whole.left @ whole.right
    small = whole.smallest()
    assert small.left.shape[1] <= min(m, n, k)
    assert torch.allclose(small.left @ small.right, dense, atol=1e-6 * float(dense.norm()))
    assert whole.norm() == pytest.approx(float(dense.norm()), rel=1e-10)
    assert whole.plus(whole, -1.0).norm() <= 1e-13 * float(dense.norm()) + 1e-30
    best = torch.linalg.svdvals(dense)
    one = whole.smallest(1)
    assert float((one.left @ one.right - dense).norm()) == pytest.approx(float(best[1:].norm()), abs=1e-9)


def test_a_padded_adapter_trains_as_the_smaller_one():
    """One step of gradient descent on ||B A x - y||^2 by autograd, at rank 2 and padded to rank 5."""
    small = AdapterState({n: t for n, t in drawn(1, 1)[0].items() if n != BIAS})
    like = drawn(2, 1, rank=5)[0].without({BIAS})
    x, y = torch.randn(5, 3), torch.randn(7, 3)

    def stepped(state: AdapterState) -> AdapterState:
        a, b = state[A].clone().requires_grad_(), state[B].clone().requires_grad_()
        (b @ (a @ x) - y).square().sum().backward()
        return AdapterState({A: (a - 0.01 * a.grad).detach(), B: (b - 0.01 * b.grad).detach()})

    grown = padded(small, like)
    assert grown[A].shape == (5, 5) and torch.equal(truncated(grown, 2)[A], small[A])
    after = stepped(grown)
    assert not after[A][2:].any() and not after[B][:, 2:].any()
    torch.testing.assert_close(truncated(after, 2)[B], stepped(small)[B])
    with pytest.raises(AdapterError, match=r"has shape \(5, 5\), more than \(2, 5\)"):
        padded(like, small)


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_client_finds_what_it_had_before_a_round(tmp_path, on_disk):
    """A resumed round 2 must not see what the lost attempt at it left behind."""
    store = ClientStore(tmp_path if on_disk else None, keep=2)
    made = [AdapterState({"w": torch.full((1,), float(n))}) for n in range(4)]
    assert store.get("c", "own", 5) is None
    for number in (0, 1, 2):
        store.put("c", "own", number, made[number])

    def value(round_):
        found = store.get("c", "own", round_)
        return None if found is None else float(found["w"])

    assert value(3) == 2.0 and value(2) == 1.0
    assert value(1) is None  # two entries are kept
    store.put("c", "own", 1, made[3])  # the run went back to round 1
    assert value(5) == 3.0 and value(2) == 3.0
    assert store.get("d", "own", 9) is None
    if on_disk:
        files = list(tmp_path.rglob("*.safetensors"))
        assert files and all(f.stat().st_mode & 0o077 == 0 for f in files)
        assert (tmp_path / "clients").stat().st_mode & 0o077 == 0
