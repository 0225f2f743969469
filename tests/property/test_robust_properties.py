"""Robust rules over random steps: numbers and order of clients do not matter, nor does a hostile one beyond a bound."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from unfed.aggregation.base import Weighted
from unfed.aggregation.fedavg import FedAvg
from unfed.aggregation.geometry import Space
from unfed.aggregation.robust_registry import ROBUST_RULES, build_robust
from unfed.base.types import SERVER, AdapterState, ClientUpdate, ServerState

A, B, BIAS = "m.lora_A.weight", "m.lora_B.weight", "m.bias"
RULES = sorted(ROBUST_RULES)
BOTH = ("effective", "factors")
QUICK = settings(max_examples=12, deadline=None)
SEEDS, SPREADS = st.integers(0, 2**20), st.sampled_from([1e-3, 0.1, 1.0])


def drawn(seed: int) -> AdapterState:
    g = torch.Generator().manual_seed(seed)
    shapes = {A: (2, 6), B: (5, 2), BIAS: (5,)}
    return AdapterState({n: torch.randn(*s, generator=g) for n, s in shapes.items()})


def around(start: AdapterState, seed: int, spread: float) -> AdapterState:
    """Near ``start``, all a little the same way, as clients are."""
    common, own = drawn(seed // 64 + 7), drawn(seed)
    return AdapterState({n: start[n] + spread * (common[n] + 0.3 * own[n]) for n in start})


def clients(start: AdapterState, seed: int, spread: float, count: int = 6) -> dict[str, AdapterState]:
    found = {f"client_{i}": around(start, 64 * seed + i, spread) for i in range(count)}
    return {**found, SERVER: around(start, 64 * seed + 60, spread)}


def after(name: str, over: str, start: AdapterState, states: dict[str, AdapterState]) -> AdapterState:
    """The adapter after FedAvg with the rule before it."""
    if name != "fltrust":
        states = {c: s for c, s in states.items() if c != SERVER}
    rule = FedAvg(filters=(build_robust(name, {"over": over}, scaling=2.0),))
    updates = [ClientUpdate(c, s, 10) for c, s in states.items()]
    return rule.combine(updates, len(updates), ServerState(0, start)).adapter


def product(state: AdapterState) -> torch.Tensor:
    return torch.cat([(state[B] @ state[A]).flatten(), state[BIAS]])


@pytest.mark.parametrize("over", BOTH)
@pytest.mark.parametrize("name", RULES)
@given(seed=SEEDS, spread=SPREADS, order=st.permutations(range(7)))
@QUICK
def test_the_order_in_which_updates_come_does_not_matter(name, over, seed, spread, order):
    start = drawn(seed)
    states = clients(start, seed, spread)
    shuffled = [list(states.items())[i] for i in order]
    assert after(name, over, start, dict(shuffled)).digest() == after(name, over, start, states).digest()


@pytest.mark.parametrize("over", BOTH)
@pytest.mark.parametrize("name", RULES)
@given(seed=SEEDS, spread=SPREADS, numbers=st.permutations(range(6)))
@QUICK
def test_nor_does_it_matter_which_number_a_client_has(name, over, seed, spread, numbers):
    start = drawn(seed)
    states = clients(start, seed, spread)
    renamed = {f"client_{n}": states[f"client_{i}"] for i, n in enumerate(numbers)} | {SERVER: states[SERVER]}
    one, other = after(name, over, start, states), after(name, over, start, renamed)
    torch.testing.assert_close(product(one), product(other), rtol=1e-4, atol=1e-4 * spread)


@pytest.mark.parametrize("over", BOTH)
@pytest.mark.parametrize("name", RULES)
@given(seed=SEEDS, spread=SPREADS)
@QUICK
def test_equal_updates_are_a_fixed_point(name, over, seed, spread):
    start = drawn(seed)
    same = around(start, seed, spread)
    states = dict.fromkeys([*(f"client_{i}" for i in range(6)), SERVER], same)
    torch.testing.assert_close(product(after(name, over, start, states)), product(same), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("over", BOTH)
@pytest.mark.parametrize("name", RULES)
@given(seed=SEEDS, spread=SPREADS, sign=st.sampled_from([-1.0, 1.0]), far=st.sampled_from([10.0, 1e3, 1e5]))
@QUICK
def test_one_hostile_client_is_bounded(name, over, seed, spread, sign, far):
    """However far it goes, the adapter moves no further than the honest clients do (entries: all of them together)."""
    start = drawn(seed)
    states = clients(start, seed, spread)
    space = Space.of(start, 2.0, over)
    honest = [space.norm(s) for c, s in states.items()]
    states["client_2"] = AdapterState(
        {n: start[n] + sign * far * spread * t for n, t in around(drawn(1), seed + 1, 1.0).items()}
    )
    moved = space.norm(after(name, over, start, states))
    entrywise = name in ("median", "trimmed_mean")
    bound = sum(h**2 for h in honest) ** 0.5 if entrywise else max(honest)
    slack = 3.0 if over == "effective" else 1.0  # the mean of factors adds cross terms; truncation is at most the step
    assert moved <= slack * bound + 1e-3 * spread
    plain = FedAvg().combine([ClientUpdate(c, s, 10) for c, s in states.items()], 7).adapter
    # Nearby, honest steps may add up where the attack happens to cancel some of them.
    assert far < 1e3 or space.norm(plain) > moved


@given(seed=SEEDS, spread=SPREADS, gauge=st.sampled_from([1e-3, 0.1, 7.0, 1e3]))
@QUICK
def test_over_effective_steps_a_module_is_its_product(seed, spread, gauge):
    """The same product from other factors, ``(t B, A / t)``: the same choice, the same median."""
    start = drawn(seed)
    states = {c: s for c, s in clients(start, seed, spread).items() if c != SERVER}
    other = {c: AdapterState({A: s[A] / gauge, B: s[B] * gauge, BIAS: s[BIAS]}) for c, s in states.items()}
    for name in ("krum", "median", "trimmed_mean"):
        one, two = (after(name, "effective", start, given_) for given_ in (states, other))
        torch.testing.assert_close(product(one), product(two), rtol=2e-3, atol=2e-3)


@given(seed=SEEDS, spread=SPREADS)
@QUICK
def test_nothing_to_clip_is_the_plain_mean_bit_for_bit(seed, spread):
    start = drawn(seed)
    updates = [ClientUpdate(c, s, 10) for c, s in clients(start, seed, spread).items()]
    clipped = FedAvg(filters=(build_robust("norm_clipping", {"max_norm": 1e9}),))
    combined = clipped.combine(updates, len(updates), ServerState(0, start))
    assert combined.adapter.digest() == FedAvg().combine(updates, len(updates)).adapter.digest()


def test_what_is_passed_on_is_weighted():
    """A rule's weights reach the mean: two of three updates, 1 and 3."""
    start = AdapterState({"w": torch.zeros(1)})

    class Chosen:
        name, compares = "chosen", True

        def init(self, adapter):
            return {}

        def begin(self, state):
            return self

        def apply(self, updates):
            first, _, last = updates
            yield Weighted(first.update, 1.0)
            yield Weighted(last.update, 3.0)

        def slots(self):
            return {}

        def notes(self):
            return {}

    updates = [ClientUpdate(f"c{i}", AdapterState({"w": torch.tensor([x])}), 10) for i, x in enumerate((1.0, 9.0, 5.0))]
    combined = FedAvg(filters=(Chosen(),)).combine(updates, 3, ServerState(0, start))
    assert float(combined.adapter["w"]) == (1 + 3 * 5) / 4
