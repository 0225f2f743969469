"""Robust rules on steps that can be worked out by hand, and against dense matrices."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
import torch

from unfed.aggregation import robust_entries
from unfed.aggregation.base import Weighted
from unfed.aggregation.geometry import Ray, Space, distances
from unfed.aggregation.near_factors import near_factors, truncated_svd
from unfed.aggregation.robust_registry import ROBUST_RULES, build_robust, robust_problems
from unfed.base.errors import ConfigError, UnfedError
from unfed.base.seeding import torch_generator
from unfed.base.types import SERVER, AdapterState, ClientUpdate, ServerState

A, B, BIAS = "m.lora_A.weight", "m.lora_B.weight", "m.bias"
SCALE = 2.0


def adapter(seed: int, like: AdapterState | None = None, by: float = 0.1, r: int = 3) -> AdapterState:
    """A random adapter of a module 7 x 9 with a bias; near ``like`` where there is one."""
    g = torch.Generator().manual_seed(seed)
    drawn = {n: torch.randn(*s, generator=g) for n, s in ((A, (r, 9)), (B, (7, r)), (BIAS, (7,)))}
    if like is None:
        return AdapterState(drawn)
    return AdapterState({n: like[n] + by * t for n, t in drawn.items()})


def dense(state: AdapterState) -> torch.Tensor:
    return SCALE * (state[B].double() @ state[A].double())


def step(state: AdapterState, start: AdapterState) -> torch.Tensor:
    """The whole effective step as one vector."""
    bias = state[BIAS].double() - start[BIAS].double()
    return torch.cat([(dense(state) - dense(start)).flatten(), bias])


def judged(rule, start: AdapterState, states: dict[str, AdapterState], examples: int = 10):
    """What the rule passes on, and its notes."""
    filtering = rule.begin(ServerState(0, start))
    passed = list(
        filtering.apply(Weighted(ClientUpdate(c, s, examples * (i + 1)), float(i + 1)) for i, (c, s) in
                        enumerate(states.items()))
    )  # fmt: skip
    return passed, filtering.notes()


def values(*numbers: float) -> dict[str, AdapterState]:
    """Clients whose only tensor holds one number."""
    return {f"client_{i}": AdapterState({"w": torch.tensor([float(x)])}) for i, x in enumerate(numbers)}


ZERO = AdapterState({"w": torch.zeros(1)})
START = adapter(0)
NEAR = {f"client_{i}": adapter(i + 1, START) for i in range(6)}


# --- lengths and distances --------------------------------------------------------------------------------------------


def test_inner_products_are_those_of_the_dense_steps() -> None:
    space = Space.of(START, SCALE, "effective")
    gram = space.gram(list(NEAR.values()))
    steps = [step(s, START) for s in NEAR.values()]
    wanted = torch.tensor([[float(x @ y) for y in steps] for x in steps], dtype=torch.float64)
    torch.testing.assert_close(gram, wanted, rtol=1e-12, atol=1e-12)
    squared = torch.tensor([[float((x - y).square().sum()) for y in steps] for x in steps], dtype=torch.float64)
    torch.testing.assert_close(distances(gram), squared, rtol=1e-10, atol=1e-12)


def test_over_factors_every_tensor_counts_as_it_is() -> None:
    space = Space.of(START, SCALE, "factors")
    differences = [torch.cat([(s[n] - START[n]).double().flatten() for n in START]) for s in NEAR.values()]
    wanted = torch.tensor([[float(x @ y) for y in differences] for x in differences], dtype=torch.float64)
    torch.testing.assert_close(space.gram(list(NEAR.values())), wanted, rtol=1e-5, atol=1e-6)


def test_a_scaling_by_module_and_a_half_of_a_pair() -> None:
    names = ("p.lora_A.weight", "p.lora_B.weight", "q.lora_A.weight", "q.lora_B.weight", "alone.lora_B.weight")
    start = AdapterState({n: torch.zeros(1, 1) for n in names})
    state = AdapterState({n: torch.full((1, 1), v) for n, v in zip(names, (1.0, 3.0, 1.0, 5.0, 7.0), strict=True)})
    norm = Space.of(start, {"p": 2.0, "q": 0.5}, "effective").norm(state)
    assert norm == pytest.approx(math.sqrt(6.0**2 + 2.5**2 + 7.0**2), rel=1e-12)


@pytest.mark.parametrize("length", [0.01, 0.5, 1.0, 20.0])
def test_the_way_to_a_length(length: float) -> None:
    """Moving the factors to ``c`` makes the effective step as long as asked."""
    state = adapter(9, START, by=1.0)
    space = Space.of(START, SCALE, "effective")
    c = space.ray(state).reach(length)
    moved = AdapterState({n: START[n].double() + c * (t.double() - START[n].double()) for n, t in state.items()})
    assert float(step(moved, START).norm()) == pytest.approx(length, rel=1e-6)


def test_the_ends_of_a_ray() -> None:
    assert Ray(4.0, 0.0, 0.0).reach(6.0) == pytest.approx(3.0)  # plain tensors: the length is 2 c
    assert Ray(0.0, 0.0, 16.0).reach(9.0) == pytest.approx(1.5)  # 4 c^2
    assert Ray(0.0, 0.0, 0.0).reach(1.0) == math.inf and Ray(1.0, 0.0, 0.0).reach(0.0) == 0.0
    # c^2 - 2 c^3 + c^4 = (c (1 - c))^2 rises to 1/4 at c = 1/2 and falls again: the first crossing is taken.
    assert Ray(1.0, -1.0, 1.0).reach(0.16) == pytest.approx(0.2, rel=1e-9)


# --- Krum -------------------------------------------------------------------------------------------------------------


def test_krum_by_hand() -> None:
    """n = 6, f = 1, so three nearest: 2.0 is 1, 1 and 4 away from its nearest, squared and summed 1 + 1 + 4 = 6."""
    passed, notes = judged(build_robust("krum", {}), ZERO, values(0.0, 1.0, 2.0, 3.0, 4.5, 100.0))
    scores = {
        x: sum(sorted((x - y) ** 2 for y in (0, 1, 2, 3, 4.5, 100) if y != x)[:3]) for x in (0, 1, 2, 3, 4.5, 100)
    }
    assert scores[1.0] == scores[2.0] == 6.0, "a tie, which goes to the lower number"
    assert [w.update.client_id for w in passed] == ["client_1"] and passed[0].weight == 1.0
    assert notes == {f"client_{i}": float(i == 1) for i in range(6)}


def test_multi_krum_takes_m_of_them_unweighted() -> None:
    six = values(0.0, 1.0, 2.0, 3.0, 4.5, 100.0)
    passed, _ = judged(build_robust("multi_krum", {}), ZERO, six)
    assert [w.update.client_id for w in passed] == [f"client_{i}" for i in range(5)], "m = n - f = 5"
    assert {w.weight for w in passed} == {1.0}
    passed, _ = judged(build_robust("multi_krum", {"m": 2}), ZERO, six)
    assert [w.update.client_id for w in passed] == ["client_1", "client_2"]


def test_krum_over_effective_steps_is_that_of_the_dense_steps() -> None:
    states = {**NEAR, "client_6": adapter(50, START, by=1.0)}
    steps = [step(s, START) for s in states.values()]
    scores = [sum(sorted(float((x - y).square().sum()) for y in steps if y is not x)[:4]) for x in steps]
    _, notes = judged(build_robust("krum", {}, scaling=SCALE), START, states)
    assert notes[f"client_{scores.index(min(scores))}"] == 1.0 and sum(notes.values()) == 1.0


@pytest.mark.parametrize(
    ("name", "params", "count", "said"),
    [
        ("krum", {}, 4, r"needs 2 \* 1 \+ 3 = 5 updates, and there are 4; take num_byzantine=0 at most"),
        ("krum", {"num_byzantine": 3}, 8, r"2 \* 3 \+ 3 = 9 updates, and there are 8; take num_byzantine=2"),
        ("multi_krum", {}, 2, "there are 2; take more clients"),
        ("multi_krum", {"m": 5}, 5, r"m=5 is more than the 5 - 1 = 4 updates that are held to be honest"),
        ("median", {}, 2, "the median of 2 updates leaves nobody out"),
        ("trimmed_mean", {"trim": 0.1}, 5, r"trim=0\.1 of 5 updates leaves none out; take at least 0\.2"),
        ("trimmed_mean", {}, 2, "of 2 updates none can be left out"),
        ("fltrust", {}, 3, "the server's own update is not there"),
    ],
)
def test_a_round_that_is_too_small_for_a_rule_is_refused(name, params, count, said) -> None:
    with pytest.raises(UnfedError, match=rf"robust={name}, round 1: .*{said}"):
        judged(build_robust(name, params), ZERO, values(*range(count)))


# --- entry by entry ---------------------------------------------------------------------------------------------------


def test_median_and_trimmed_mean_of_numbers() -> None:
    def one(name: str, numbers, **params) -> float:
        (only,), _ = judged(build_robust(name, params), ZERO, values(*numbers))
        assert only.update.num_examples == sum(10 * (i + 1) for i in range(len(numbers)))
        return float(only.update.adapter["w"])

    assert one("median", (5, -1e9, 2, 3, 1e9)) == 3.0
    assert one("median", (5, 1, 2, 1e9)) == 3.5
    assert one("trimmed_mean", (5, -1e9, 2, 3, 1e9)) == pytest.approx(10 / 3)
    assert one("trimmed_mean", (*range(1, 8), 1e9, 1e9, -1e9), trim=0.3) == pytest.approx((3 + 4 + 5 + 6) / 4)


@pytest.mark.parametrize("block", [1, 40, 2**22])
@pytest.mark.parametrize("name", ["median", "trimmed_mean"])
def test_the_entries_of_the_effective_step(name: str, block: int, monkeypatch) -> None:
    """Rank 3 of 7 x 9: what comes back is the best approximation of rank 3, and what is lost is said."""
    monkeypatch.setattr(robust_entries, "BLOCK", block)
    (only,), notes = judged(build_robust(name, {}, scaling=SCALE), START, NEAR)
    entries = np.stack([(dense(s) - dense(START)).numpy() for s in NEAR.values()])
    robust = np.median(entries, axis=0) if name == "median" else np.sort(entries, axis=0)[1:-1].mean(axis=0)
    wanted = dense(START).numpy() + robust
    u, s, vh = np.linalg.svd(wanted)
    np.testing.assert_allclose(dense(only.update.adapter).numpy(), (u[:, :3] * s[:3]) @ vh[:3], atol=2e-5)
    lost = math.sqrt((s[3:] ** 2).sum()) / np.linalg.norm(robust)
    assert notes["truncation_error"] == pytest.approx(lost, rel=1e-4) and lost > 0.01
    biases = np.stack([x[BIAS].numpy() for x in NEAR.values()])
    middle = np.median(biases, axis=0) if name == "median" else np.sort(biases, axis=0)[1:-1].mean(axis=0)
    np.testing.assert_allclose(only.update.adapter[BIAS].numpy(), middle, rtol=1e-6)


@pytest.mark.parametrize("fixed", [A, B])
def test_a_factor_that_was_held_fixed_stays(fixed: str) -> None:
    """FFA-LoRA and RoLoRA: the other factor answers for the step, as well as it can."""
    states = {c: AdapterState({**s, fixed: START[fixed]}) for c, s in NEAR.items()}
    (only,), notes = judged(build_robust("median", {}, scaling=SCALE), START, states)
    assert torch.equal(only.update.adapter[fixed], START[fixed])
    entries = np.stack([(dense(s) - dense(START)).numpy() / SCALE for s in states.values()])
    robust, kept = np.median(entries, axis=0), START[fixed].double().numpy()
    fitted = robust @ np.linalg.pinv(kept) @ kept if fixed == A else kept @ np.linalg.pinv(kept) @ robust
    moved = (dense(only.update.adapter) - dense(START)).numpy() / SCALE
    np.testing.assert_allclose(moved, fitted, atol=1e-5)
    lost = np.linalg.norm(robust - fitted) / np.linalg.norm(robust)
    assert notes["truncation_error"] == pytest.approx(lost, rel=1e-4)


def test_the_first_round_leaves_factors_that_can_be_trained() -> None:
    """``B_0 = 0`` and a median of 0: the adapter stays where it was, and A is not lost with it."""
    start = AdapterState({A: START[A], B: torch.zeros(7, 3)})
    states = {f"client_{i}": start for i in range(3)}
    (only,), notes = judged(build_robust("median", {}), start, states)
    torch.testing.assert_close(only.update.adapter[A], START[A])
    assert not only.update.adapter[B].any() and notes["truncation_error"] == 0.0
    # one client in three has moved, each entry's median is still 0; A moves as little as it can
    states = {"client_0": adapter(3, start := AdapterState({**start, BIAS: torch.zeros(7)})), **dict.fromkeys(
        ("client_1", "client_2"), start)}  # fmt: skip
    (only,), _ = judged(build_robust("median", {}), start, states)
    torch.testing.assert_close(only.update.adapter[A], START[A])


def test_factors_near_given_ones() -> None:
    """The product is the best there is; A has the singular values of the one it is to be like, and no row dies."""
    g = torch.Generator().manual_seed(1)
    like, b_like = torch.randn(3, 9, generator=g), torch.randn(7, 3, generator=g)
    lengths = torch.linalg.svdvals(like)
    few = torch.randn(7, 2, generator=g) @ torch.randn(2, 9, generator=g)  # of rank 2
    away = torch.randn(7, 3, generator=g) @ torch.linalg.svd(like).Vh[3:6]  # rows at right angles to those of A
    for matrix in (few, away, torch.zeros(7, 9)):
        a, b = near_factors(matrix, like, b_like, torch_generator(0))
        torch.testing.assert_close(b @ a, matrix, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.linalg.svdvals(a), lengths, atol=1e-4, rtol=1e-4)
        assert float(b.norm()) <= float(matrix.norm()) / float(lengths[-1]) * 1.001
    a, b = near_factors(b_like @ like, like, b_like, torch_generator(0))
    torch.testing.assert_close(a, like, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(b, b_like, atol=1e-4, rtol=1e-4)
    thin = like * torch.tensor([[1.0], [1.0], [1e-6]])  # nearly of rank 2: B is kept from blowing up
    a, b = near_factors(away, thin, b_like, torch_generator(0))
    torch.testing.assert_close(b @ a, away, atol=1e-4, rtol=1e-4)
    assert float(b.norm()) <= 10 * 3**0.5 * float(away.norm()) / float(thin.norm()) * 1.001
    swapped = near_factors(few, torch.zeros(3, 9), b_like, torch_generator(0))
    torch.testing.assert_close(swapped[1] @ swapped[0], few, atol=1e-5, rtol=1e-5)
    assert all(t.any(dim=1).all() for t in swapped)
    narrow = torch.randn(7, 2, generator=g)  # fewer columns than the rank
    a, b = near_factors(narrow, torch.randn(3, 2, generator=g), b_like, torch_generator(0))
    torch.testing.assert_close(b @ a, narrow, atol=1e-5, rtol=1e-5)


def test_the_randomised_decomposition_is_nearly_the_full_one() -> None:
    g = torch.Generator().manual_seed(2)
    matrix = torch.randn(600, 20, generator=g) @ torch.randn(20, 530, generator=g)
    matrix += 0.01 * torch.randn(600, 530, generator=g)
    u, s, v = truncated_svd(matrix, 8, torch_generator(0))
    full = torch.linalg.svdvals(matrix)
    torch.testing.assert_close(s, full[:8], rtol=5e-3, atol=0.0)
    error = (matrix - (u * s) @ v.T).norm()
    assert float(error) <= 1.001 * float(full[8:].norm())


# --- norm clipping and FLTrust ----------------------------------------------------------------------------------------


def test_clipping_to_a_number_streams_and_leaves_the_rest_alone() -> None:
    space = Space.of(START, SCALE, "effective")
    lengths = {c: space.norm(s) for c, s in NEAR.items()}
    bound = statistics.median(lengths.values())
    taken = []

    def watched():
        for n, (c, s) in enumerate(NEAR.items()):
            taken.append(c)
            yield Weighted(ClientUpdate(c, s, 10), float(n + 1))

    filtering = build_robust("norm_clipping", {"max_norm": bound}, scaling=SCALE).begin(ServerState(0, START))
    for n, passed in enumerate(filtering.apply(watched()), 1):
        client = passed.update.client_id
        assert len(taken) == n, "one at a time"
        assert passed.weight == n
        if lengths[client] <= bound:
            assert passed.update.adapter is NEAR[client] and filtering.notes()[client] == 1.0
        else:
            assert space.norm(passed.update.adapter) == pytest.approx(bound, rel=1e-5)
            assert filtering.notes()[client] < 1.0


def test_clipping_to_the_median_bounds_the_product_and_the_factors() -> None:
    """Factors 1000 times longer and shorter have a product like the others'; their mean would not."""
    hidden = AdapterState({**NEAR["client_0"], A: NEAR["client_0"][A] / 1000, B: NEAR["client_0"][B] * 1000})
    states = {**NEAR, "client_6": hidden, "client_7": adapter(3, START, by=50.0)}
    passed, notes = judged(build_robust("norm_clipping", {}, scaling=SCALE), START, states)
    effective, factors = Space.of(START, SCALE, "effective"), Space.of(START, 1.0, "factors")
    for space, key in ((effective, "max_norm"), (factors, None)):
        bound = statistics.median(space.norm(s) for s in states.values())
        assert all(space.norm(w.update.adapter) <= bound * (1 + 1e-5) for w in passed)
        if key:
            assert notes[key] == pytest.approx(bound)
    assert notes["client_6"] < 0.01 and notes["client_7"] < 0.1


def test_fltrust_by_hand() -> None:
    """Steps in the plane: the server's (3, 4) is 5 long. cos of (0, 10): 40 / 50; of (-1, 0): below 0, no trust."""
    start = AdapterState({"w": torch.zeros(2)})
    steps = {"client_0": (0.0, 10.0), "client_1": (-1.0, 0.0), "client_2": (0.3, 0.4), SERVER: (3.0, 4.0)}
    states = {c: AdapterState({"w": torch.tensor(v)}) for c, v in steps.items()}
    passed, notes = judged(build_robust("fltrust", {}), start, states)
    assert notes == pytest.approx({"client_0": 0.8, "client_1": 0.0, "client_2": 1.0})
    assert [w.update.client_id for w in passed] == ["client_0", "client_2"]
    assert [w.weight for w in passed] == pytest.approx([0.8, 1.0])
    torch.testing.assert_close(passed[0].update.adapter["w"], torch.tensor([0.0, 5.0]))
    torch.testing.assert_close(passed[1].update.adapter["w"], torch.tensor([3.0, 4.0]))


def test_fltrust_over_effective_steps() -> None:
    states = {SERVER: adapter(90, START), **NEAR}
    passed, notes = judged(build_robust("fltrust", {}, scaling=SCALE), START, states)
    own, space = step(states[SERVER], START), Space.of(START, SCALE, "effective")
    cosines = {c: float(step(s, START) @ own / step(s, START).norm() / own.norm()) for c, s in NEAR.items()}
    assert notes == pytest.approx({c: max(0.0, x) for c, x in cosines.items()}, rel=1e-9)
    assert all(space.norm(w.update.adapter) <= float(own.norm()) * (1 + 1e-5) for w in passed)


def test_when_nobody_points_the_servers_way_the_adapter_stays(caplog) -> None:
    states = {**values(-1.0, -2.0), SERVER: AdapterState({"w": torch.tensor([1.0])})}
    (only,), notes = judged(build_robust("fltrust", {}), ZERO, states)
    assert torch.equal(only.update.adapter["w"], ZERO["w"]) and notes == {"client_0": 0.0, "client_1": 0.0}
    assert "the adapter stays" in caplog.text
    same = {**values(-1.0, 2.0), SERVER: ZERO}  # a server that has learnt nothing has no direction
    (only,), _ = judged(build_robust("fltrust", {}), ZERO, same)
    assert torch.equal(only.update.adapter["w"], ZERO["w"])


# --- names and settings -----------------------------------------------------------------------------------------------


def test_names_and_hyperparameters_are_checked() -> None:
    assert robust_problems("krumm", {})[0].startswith("unknown robust rule 'krumm'; did you mean 'krum'?")
    assert "num_byzantine" in robust_problems("krum", {"byzantine": 1})[0]
    assert robust_problems("multi_krum", {"m": 0}) == ["robust.m: must be a whole number at least 1 or null, not 0"]
    assert robust_problems("trimmed_mean", {"trim": 0.5}) == [
        "robust.trim: must be a number above 0 and below 0.5, not 0.5"
    ]
    assert robust_problems("median", {"over": "factor"})
    with pytest.raises(ConfigError, match=r"robust\.max_norm"):
        build_robust("norm_clipping", {"max_norm": -1.0})


@pytest.mark.parametrize(("name", "over"), list(itertools.product(ROBUST_RULES, ["effective", "factors"])))
def test_no_rule_changes_what_it_is_given(name: str, over: str) -> None:
    states = {**NEAR, **({SERVER: adapter(90, START)} if name == "fltrust" else {})}
    before = {c: AdapterState({n: t.clone() for n, t in s.items()}).digest() for c, s in {**states, "0": START}.items()}
    rule = build_robust(name, {"over": over}, scaling=SCALE)
    passed, _ = judged(rule, START, states)
    assert passed and all(w.weight > 0 for w in passed)
    after = {c: AdapterState(dict(s)).digest() for c, s in {**states, "0": START}.items()}
    assert before == after
    assert rule.begin(ServerState(0, START)).slots() == {} == rule.init(START)
