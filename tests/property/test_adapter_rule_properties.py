"""Properties of the rules that make one adapter of the clients': over ranks, sizes, weights and orders."""

from __future__ import annotations

from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from unfed.aggregation.adapters.ranks import padded, truncated
from unfed.aggregation.registry import build_aggregator
from unfed.base.types import AdapterState, ClientUpdate, Combined, ServerState

QUICK = settings(max_examples=25, deadline=None, derandomize=True)
UNEQUAL = ("fedit", "flexlora", "hetlora")
RULES = (*UNEQUAL, "lora_fair")
A, B = "q.lora_A.weight", "q.lora_B.weight"


@dataclass(frozen=True)
class Drawn:
    """Whole adapters of the clients (zeros for ranks that they have not), their numbers of examples, the start."""

    states: list[AdapterState]
    counts: list[int]
    start: AdapterState

    def combined(self, rule: str, order: list[int] | None = None) -> Combined:
        built = build_aggregator("FedAvg", {"adapter": rule})
        chosen = range(len(self.states)) if order is None else order
        updates = [ClientUpdate(f"c{i}", self.states[i], self.counts[i]) for i in chosen]
        return built.combine(updates, len(updates), ServerState(0, self.start))

    @property
    def size(self) -> float:
        """The largest entry of a client's product, or 1."""
        return max([float(effect(s).abs().max()) for s in self.states] + [1e-30])


def effect(state: AdapterState) -> torch.Tensor:
    return state[B].double() @ state[A].double()


@st.composite
def clients(draw: st.DrawFn, most: int = 6, ranks: tuple[int, ...] = (4, 8, 16), wide: bool = False) -> Drawn:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    number, full = draw(st.integers(1, most)), max(ranks)
    m, n = draw(st.integers(17, 30)), draw(st.integers(17, 30))
    if wide:
        m = draw(st.integers(1, full))
    apart = draw(st.sampled_from([0.01, 1.0, 10.0]))

    def noise() -> AdapterState:
        tensors = {A: torch.randn(full, n, generator=generator), B: torch.randn(m, full, generator=generator)}
        return AdapterState({**tensors, "bias": torch.randn(3, generator=generator)})

    start = noise()
    states = []
    for _ in range(number):
        own = noise()
        moved = AdapterState({k: start[k] + apart * own[k] for k in start})
        states.append(padded(truncated(moved, draw(st.sampled_from(ranks))), start))
    return Drawn(states, draw(st.lists(st.integers(1, 1000), min_size=number, max_size=number)), start)


@QUICK
@given(clients(), st.randoms(use_true_random=False), st.sampled_from(RULES))
def test_the_order_of_clients_does_not_matter(drawn: Drawn, random: object, rule: str) -> None:
    order = list(range(len(drawn.states)))
    random.shuffle(order)  # type: ignore[attr-defined]
    one, other = drawn.combined(rule), drawn.combined(rule, order)
    torch.testing.assert_close(effect(one.adapter), effect(other.adapter), rtol=0, atol=2e-5 * drawn.size)
    torch.testing.assert_close(one.adapter["bias"], other.adapter["bias"], rtol=1e-5, atol=1e-5)


@QUICK
@given(clients(), st.sampled_from(RULES), st.integers(2, 5))
def test_equal_updates_are_a_fixed_point(drawn: Drawn, rule: str, number: int) -> None:
    """The product is; FlexLoRA gives it another basis."""
    state = drawn.states[0]
    equal = Drawn([state] * number, (drawn.counts * number)[:number], drawn.start)
    result = equal.combined(rule)
    torch.testing.assert_close(effect(result.adapter), effect(state), rtol=0, atol=1e-5 * drawn.size)
    assert torch.equal(result.adapter["bias"], state["bias"])
    assert result.aggregation_error is not None and result.aggregation_error < 1e-5


@QUICK
@given(clients(most=1), st.sampled_from(RULES))
def test_one_clients_mean_is_that_clients_product(drawn: Drawn, rule: str) -> None:
    result = drawn.combined(rule)
    torch.testing.assert_close(effect(result.adapter), effect(drawn.states[0]), rtol=0, atol=1e-5 * drawn.size)


@QUICK
@given(clients(wide=True))
def test_flexlora_at_full_rank_is_the_dense_weighted_mean(drawn: Drawn) -> None:
    """The adapter's rank is at least that of the module's matrix, so that nothing is cut off."""
    total = sum(drawn.counts)
    parts = [effect(s) * (n / total) for s, n in zip(drawn.states, drawn.counts, strict=True)]
    result = drawn.combined("flexlora")
    torch.testing.assert_close(effect(result.adapter), torch.stack(parts).sum(0), rtol=0, atol=1e-6 * drawn.size)


@QUICK
@given(clients())
def test_flexlora_is_never_further_off_than_the_others(drawn: Drawn) -> None:
    """It is the best approximation of its rank."""
    best = drawn.combined("flexlora").aggregation_error
    assert best is not None
    for rule in ("fedit", "hetlora", "lora_fair"):
        error = drawn.combined(rule).aggregation_error
        assert error is not None and best <= error + 1e-6


@QUICK
@given(clients(), st.sampled_from(UNEQUAL), st.sampled_from([4, 8, 16]))
def test_a_client_of_small_rank_gets_a_part_of_what_was_made(drawn: Drawn, rule: str, rank: int) -> None:
    built = build_aggregator("FedAvg", {"adapter": rule}, ranks={"c0": rank} if rank < 16 else {})
    state = ServerState(1, drawn.combined(rule).adapter)
    sent = built.broadcast(state, ["c0", "c1"])
    assert sent.start("c0")[A].shape[0] == rank and sent.start("c0")[B].shape[1] == rank
    assert sent.start("c1") is state.adapter
    back = padded(sent.start("c0"), state.adapter)
    assert torch.equal(back[A][:rank], state.adapter[A][:rank]) and not back[B][:, rank:].any()
    assert sent.nbytes(["c0"]) == truncated(state.adapter, rank).nbytes
    assert torch.equal(sent.start("c0")["bias"], state.adapter["bias"])


def test_more_than_the_adapters_rank_is_refused() -> None:
    from unfed.base.errors import AdapterError

    small = AdapterState({A: torch.zeros(2, 3), B: torch.zeros(3, 2)})
    with pytest.raises(AdapterError, match=r"q\.lora_A\.weight has shape \(4, 3\), more than \(2, 3\)"):
        padded(AdapterState({A: torch.zeros(4, 3), B: torch.zeros(3, 4)}), small)
