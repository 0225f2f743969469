"""FlexLoRA, HetLoRA and LoRA-FAIR: arithmetic by hand, unequal ranks, other tensors, scaling, the aggregation error."""

from __future__ import annotations

import math

import pytest
import torch

from unfed.aggregation.adapters.ranks import padded, truncated
from unfed.aggregation.adapters.stacks import HELD, Stack, factors, product
from unfed.aggregation.lora import EXACT_LIMIT
from unfed.aggregation.registry import build_aggregator
from unfed.base.errors import AdapterError, ConfigError
from unfed.base.types import AdapterState, ClientUpdate, Combined, ServerState

A, B = "q.lora_A.weight", "q.lora_B.weight"


def adapter(a: object, b: object) -> AdapterState:
    return AdapterState({A: torch.as_tensor(a), B: torch.as_tensor(b)})


def drawn(rank: int, *, m: int = 20, n: int = 30, seed: int = 0) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    return adapter(torch.randn(rank, n, generator=generator), torch.randn(m, rank, generator=generator))


def combine(
    rule: str,
    states: list[AdapterState],
    counts: list[int] | None = None,
    *,
    start: AdapterState | None = None,
    settings: dict[str, object] | None = None,
    **options: object,
) -> Combined:
    built = build_aggregator("FedAvg", {"adapter": rule, "adapter_args": settings or {}}, **options)  # type: ignore[arg-type]
    updates = [
        ClientUpdate(f"c{i}", s, n) for i, (s, n) in enumerate(zip(states, counts or [1] * len(states), strict=True))
    ]
    return built.combine(updates, len(states), ServerState(0, start or states[0]))


def effect(state: AdapterState) -> torch.Tensor:
    return state[B].double().flatten(1) @ state[A].double().flatten(1)


def wanted(states: list[AdapterState], counts: list[int]) -> torch.Tensor:
    return sum((effect(s) * (n / sum(counts)) for s, n in zip(states, counts, strict=True)), torch.zeros(()))


# --- FlexLoRA -------------------------------------------------------------------------------------------------------


def test_flexlora_by_hand() -> None:
    """B A of the clients: diag(2, 0) with 3 examples, diag(0, 2) with 1: the mean diag(3/2, 1/2), its best of rank 1
    diag(3/2, 0), so the error is (1/2) / sqrt(9/4 + 1/4)."""
    states = [adapter([[1.0, 0.0]], [[2.0], [0.0]]), adapter([[0.0, 2.0]], [[0.0], [1.0]])]
    result = combine("flexlora", states, [3, 1])
    root = math.sqrt(1.5)
    torch.testing.assert_close(result.adapter[A], torch.tensor([[root, 0.0]]))
    torch.testing.assert_close(result.adapter[B], torch.tensor([[root], [0.0]]))
    assert result.aggregation_error == pytest.approx(0.5 / math.sqrt(2.5), rel=1e-7)
    assert not result.error_is_estimate


def test_flexlora_at_full_rank_is_the_dense_weighted_mean() -> None:
    states, counts = [drawn(12, m=9, n=12, seed=i) for i in range(4)], [5, 1, 2, 9]
    result = combine("flexlora", states, counts)
    dense = wanted(states, counts)
    torch.testing.assert_close(effect(result.adapter), dense, rtol=0, atol=1e-6 * float(dense.abs().max()))
    assert result.adapter[A].dtype == torch.float32
    assert result.aggregation_error is not None and result.aggregation_error < 1e-6


def test_flexlora_keeps_the_best_approximation() -> None:
    """Eckart and Young: what is cut off are the singular values beyond the rank."""
    states, counts = [drawn(3, seed=i) for i in range(3)], [1, 2, 3]
    result = combine("flexlora", states, counts, lora_scaling=2.0)
    values = torch.linalg.svdvals(wanted(states, counts))
    expected = math.sqrt(float(values[3:].square().sum() / values.square().sum()))
    assert result.aggregation_error == pytest.approx(expected, rel=1e-5)


def test_ranks_4_8_16_are_averaged_as_they_are_and_each_gets_its_largest_components() -> None:
    full = drawn(16, m=40, n=50, seed=9)
    states = [drawn(r, m=40, n=50, seed=r) for r in (4, 8, 16)]
    counts = [3, 2, 1]
    result = combine("flexlora", [padded(s, full) for s in states], counts, start=full)
    u, values, vh = torch.linalg.svd(wanted(states, counts))
    for rank in (4, 8, 16):
        best = (u[:, :rank] * values[:rank]) @ vh[:rank]
        torch.testing.assert_close(effect(truncated(result.adapter, rank)), best, rtol=0, atol=1e-5)


def test_a_component_without_energy_begins_anew() -> None:
    """Only a client of rank 2 came back: components 2 and 3 have B = 0 and the A of the round's start, and train."""
    start, small = drawn(4, seed=1), drawn(2, seed=2)
    result = combine("flexlora", [padded(small, start)], start=start)
    torch.testing.assert_close(effect(result.adapter), effect(small), rtol=1e-5, atol=1e-5)
    assert torch.equal(result.adapter[A][2:], start[A][2:])
    assert not result.adapter[B][:, 2:].any()


def test_nothing_learnt_yet_leaves_the_start() -> None:
    fresh = adapter(torch.randn(3, 5), torch.zeros(4, 3))
    result = combine("flexlora", [fresh, fresh])
    assert result.adapter.digest() == fresh.digest() and result.aggregation_error == 0.0


def test_a_stack_of_many_clients_is_cut_and_the_error_is_an_estimate() -> None:
    """Clients near a common product: memory stays bounded and what is lost is small; it is in the estimate."""
    count, rank, common = 4 * EXACT_LIMIT, 2, drawn(2, m=60, n=60, seed=5)
    states = []
    for i in range(count):
        other = drawn(2, m=60, n=60, seed=100 + i)
        states.append(AdapterState({k: common[k] + 0.05 * other[k] for k in common}))
    stack = Stack(count)
    for s in states:
        stack.add(s[B], s[A], 1.0)
        assert stack.sum(1.0).left.shape[1] <= HELD * rank + rank
    result, dense = combine("flexlora", states), wanted(states, [1] * count)
    u, values, vh = torch.linalg.svd(dense)
    best = (u[:, :rank] * values[:rank]) @ vh[:rank]
    assert float((effect(result.adapter) - best).norm() / dense.norm()) < 2e-3
    true = float((effect(result.adapter) - dense).norm() / dense.norm())
    assert result.error_is_estimate and result.aggregation_error == pytest.approx(true, rel=0.5)


def test_a_convolution_keeps_its_shape() -> None:
    torch.manual_seed(0)
    states = [adapter(torch.randn(2, 3, 3, 3), torch.randn(5, 2, 1, 1)) for _ in range(2)]
    result = combine("flexlora", states)
    assert result.adapter[A].shape == (2, 3, 3, 3) and result.adapter[B].shape == (5, 2, 1, 1)
    values = torch.linalg.svdvals(wanted(states, [1, 1]))
    missed = float((effect(result.adapter) - wanted(states, [1, 1])).norm())
    assert missed == pytest.approx(float(values[2:].norm()), rel=1e-4)


# --- HetLoRA --------------------------------------------------------------------------------------------------------


def test_hetlora_weighs_by_what_was_learnt() -> None:
    """||B A||_F is 6 and 2, so the weights are 3/4 and 1/4, whatever the numbers of examples."""
    states = [adapter([[3.0, 0.0]], [[2.0], [0.0]]), adapter([[0.0, 1.0]], [[0.0], [2.0]])]
    result = combine("hetlora", states, [1, 100])
    torch.testing.assert_close(result.adapter[A], torch.tensor([[9 / 4, 1 / 4]]))
    torch.testing.assert_close(result.adapter[B], torch.tensor([[3 / 2], [1 / 2]]))
    both = combine("hetlora", states, [1, 9], settings={"by_weight": True})  # 6 * 1 and 2 * 9
    torch.testing.assert_close(both.adapter[A], torch.tensor([[3 / 4, 3 / 4]]))


def test_hetlora_weighs_over_all_modules_with_their_scaling() -> None:
    """s B A of p and q: client 0 has 3 and 4 (after s = 3 and 2), client 1 has 0 and 5: equal weights."""
    names = ("p.lora_A.weight", "p.lora_B.weight")
    one = torch.ones(1, 1)
    states = [
        AdapterState({names[0]: one, names[1]: one * 1.0, A: one, B: one * 2.0}),
        AdapterState({names[0]: one, names[1]: one * 0.0, A: one, B: one * 2.5}),
    ]
    result = combine("hetlora", states, lora_scaling={"p": 3.0, "q": 2.0})
    assert float(result.adapter[names[1]]) == pytest.approx(0.5) and float(result.adapter[B]) == pytest.approx(2.25)


def test_hetlora_pads_with_zeros_and_a_client_that_learnt_nothing_does_not_count() -> None:
    full = drawn(16, seed=3)
    states = [padded(drawn(r, seed=r), full) for r in (4, 8, 16)]
    norms = [float(effect(s).norm()) for s in states]
    result = combine("hetlora", states)
    for name in (A, B):
        mean = sum(s[name].double() * (n / sum(norms)) for s, n in zip(states, norms, strict=True))
        torch.testing.assert_close(result.adapter[name].double(), mean, rtol=1e-5, atol=1e-6)
    silent = adapter(torch.ones(16, 30), torch.zeros(20, 16))
    alone = combine("hetlora", [silent, states[2], silent])
    torch.testing.assert_close(alone.adapter[A], states[2][A])
    nobody = combine("hetlora", [silent, adapter(torch.zeros(16, 30), torch.zeros(20, 16))], [3, 1])
    torch.testing.assert_close(nobody.adapter[A], torch.full((16, 30), 0.75))


# --- LoRA-FAIR ------------------------------------------------------------------------------------------------------


def test_lora_fair_by_hand() -> None:
    """A is [2] at both, B is [1] and [3]: nothing is missed. With A = [1], [3] and B = [0], [2] the mean is A = 2,
    B = 1, the wanted product (0 + 6)/2 = 3, and D = (3 - 2) * 2 / (4 + 0.01)."""
    same = [adapter([[2.0]], [[1.0]]), adapter([[2.0]], [[3.0]])]
    assert float(combine("lora_fair", same).adapter[B]) == pytest.approx(2.0)
    apart = [adapter([[1.0]], [[0.0]]), adapter([[3.0]], [[2.0]])]
    result = combine("lora_fair", apart)
    assert float(result.adapter[A]) == 2.0 and float(result.adapter[B]) == pytest.approx(1 + 2 / 4.01, rel=1e-6)
    assert result.aggregation_error == pytest.approx((3 - 2 * (1 + 2 / 4.01)) / 3, rel=1e-3)  # of float32


def test_lora_fair_minimises_its_objective() -> None:
    states, counts = [drawn(3, seed=i) for i in range(4)], [1, 2, 3, 4]
    result = combine("lora_fair", states, counts, settings={"ridge": 0.3})
    mean = combine("fedit", states, counts).adapter
    d = (result.adapter[B].double() - mean[B].double()).requires_grad_()
    dense = wanted(states, counts)
    loss = (dense - (mean[B].double() + d) @ mean[A].double()).square().sum() + 0.3 * d.square().sum()
    (gradient,) = torch.autograd.grad(loss, d)
    assert float(gradient.abs().max()) < 1e-3 * float(dense.abs().max())
    assert torch.equal(result.adapter[A], mean[A])
    plain = combine("fedit", states, counts).aggregation_error
    assert result.aggregation_error is not None and plain is not None and result.aggregation_error < plain


# --- all of them ----------------------------------------------------------------------------------------------------

RULES = ("flexlora", "hetlora", "lora_fair")


@pytest.mark.parametrize("rule", RULES)
def test_other_tensors_are_averaged_plainly(rule: str) -> None:
    extra = [{"lm_head.weight": torch.full((2, 2), float(i)), "bias": torch.full((3,), 2.0 * i)} for i in range(2)]
    states = [AdapterState({**drawn(2, seed=i), **extra[i]}) for i in range(2)]
    result = combine(rule, states, [1, 3])
    torch.testing.assert_close(result.adapter["lm_head.weight"], torch.full((2, 2), 0.75))
    torch.testing.assert_close(result.adapter["bias"], torch.full((3,), 1.5))


@pytest.mark.parametrize("rule", RULES)
def test_the_error_is_that_against_the_weighted_mean_of_s_b_a(rule: str) -> None:
    """Two modules with scalings of their own, as rank patterns and rslora give."""
    scaling = {"p": 0.5, "q": 3.0}
    states = []
    for i in range(3):
        p = {f"p.lora_{k[-8]}.weight": t for k, t in drawn(3, seed=10 + i).items()}
        states.append(AdapterState({**drawn(2, seed=i), **p}))
    counts = [2, 3, 4]
    result = combine(rule, states, counts, lora_scaling=scaling)
    missed = size = 0.0
    for module, s in scaling.items():
        names = (f"{module}.lora_B.weight", f"{module}.lora_A.weight")
        parts = [x[names[0]].double() @ x[names[1]].double() * (n / 9) for x, n in zip(states, counts, strict=True)]
        true = torch.stack(parts).sum(0)
        have = result.adapter[names[0]].double() @ result.adapter[names[1]].double()
        missed, size = missed + float((s * (true - have)).norm() ** 2), size + float((s * true).norm() ** 2)
    assert result.aggregation_error == pytest.approx(math.sqrt(missed / size), rel=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_what_does_not_fit_is_refused(rule: str) -> None:
    with pytest.raises(AdapterError, match=r"c1: .*shape"):
        combine(rule, [drawn(2), drawn(3)])
    with pytest.raises(AdapterError, match="no client update"):
        combine(rule, [], start=drawn(2))


def test_products_leave_out_components_that_are_zero() -> None:
    found = product(torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[1.0], [5.0], [0.0]]), 2.0)
    assert found.left.tolist() == [[2.0]] and found.right.tolist() == [[1.0]]
    nothing = product(torch.zeros(3, 2), torch.ones(2, 4))
    assert nothing.norm() == 0.0 and factors(nothing, 2)[2] == 0


def test_hyperparameters_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"aggregator\.adapter_args\.ridge: must be a number above 0"):
        build_aggregator("FedAvg", {"adapter": "lora_fair", "adapter_args": {"ridge": 0}})
    with pytest.raises(ConfigError, match=r"aggregator\.adapter=flexlor: no such rule.*flexlora"):
        build_aggregator("FedAvg", {"adapter": "flexlor"})


# --- server optimizers ----------------------------------------------------------------------------------------------


def rounds(name: str, settings: dict[str, object], *, number: int = 4, rank: int = 6, rule: str = "flexlora"):
    """States after each of ``number`` rounds with two clients, and the dense means that these were."""
    built = build_aggregator(name, {"adapter": rule, **settings})
    state = ServerState(0, AdapterState({**drawn(rank, m=6, n=7, seed=99), "bias": torch.zeros(3)}))
    found, means = [state], []
    for r in range(number):
        states = [AdapterState({**drawn(rank, m=6, n=7, seed=2 * r + i), "bias": torch.ones(3)}) for i in range(2)]
        combined = built.combine([ClientUpdate(f"c{i}", s, 1 + i) for i, s in enumerate(states)], 2, state)
        means.append(wanted(states, [1, 2]))
        state = built.advance(state, combined)
        found.append(state)
    return found, means


def test_a_step_on_effective_weights_is_the_dense_one() -> None:
    """Rank 6 holds any (6, 7) matrix, so nothing is cut off: W + 0.5 (mean - W); the bias moves by half, too."""
    found, means = rounds("FedAvg", {"server_lr": 0.5})
    dense = effect(found[0].adapter)
    for state, mean in zip(found[1:], means, strict=True):
        dense = dense + 0.5 * (mean - dense)
        torch.testing.assert_close(effect(state.adapter), dense, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[2].adapter["bias"], torch.full((3,), 0.75))


def test_momentum_on_effective_weights_is_the_dense_one() -> None:
    found, means = rounds("FedAvgM", {"server_lr": 0.7, "momentum": 0.8})
    dense, v, bias, v_bias = effect(found[0].adapter), torch.zeros(6, 7), 0.0, 0.0
    for state, mean in zip(found[1:], means, strict=True):
        v = 0.8 * v + (mean - dense)
        dense = dense + 0.7 * v
        v_bias = 0.8 * v_bias + (1 - bias)
        bias = bias + 0.7 * v_bias
        torch.testing.assert_close(effect(state.adapter), dense, rtol=0, atol=1e-4)
        torch.testing.assert_close(state.adapter["bias"], torch.full((3,), bias))
        m = state.opt_state["m"]
        assert m[A].shape == (12, 7) and m[B].shape == (6, 12)
        torch.testing.assert_close(effect(m), v, rtol=0, atol=1e-4)


def test_without_momentum_it_is_the_mean_and_with_a_small_rank_the_best_of_it() -> None:
    plain, _ = rounds("FedAvgM", {"momentum": 0.0}, rank=2)
    mean, _ = rounds("FedAvg", {}, rank=2)
    assert plain[-1].adapter.digest() == mean[-1].adapter.digest()
    found, _ = rounds("FedAvg", {"server_lr": 0.5}, number=1, rank=2)
    best = mean[1].adapter  # of rank 2, as the start
    both = 0.5 * effect(found[0].adapter) + 0.5 * effect(best)
    values = torch.linalg.svdvals(both)
    missed = float((effect(found[1].adapter) - both).norm())
    assert missed == pytest.approx(float(values[2:].norm()), rel=1e-5)


@pytest.mark.parametrize("name", ["FedAdam", "FedYogi", "FedAdagrad"])
def test_adaptive_optimizers_go_with_factors_alone(name: str) -> None:
    with pytest.raises(ConfigError, match=r"adapter=flexlora: is not defined: the rule moves effective weights"):
        build_aggregator(name, {"adapter": "flexlora"})
    for rule in ("hetlora", "lora_fair"):
        found, _ = rounds(name, {}, rule=rule, number=1, rank=2)
        assert any(not torch.equal(found[0].adapter[n], found[1].adapter[n]) for n in (A, B))


# --- HetLoRA's self-pruning -----------------------------------------------------------------------------------------


def test_hetlora_remembers_ranks_that_only_fall() -> None:
    rule = build_aggregator("FedAvg", {"adapter": "hetlora"}, ranks={"c1": 3})
    state = ServerState(0, drawn(4))

    def answered(**ranks: float) -> ServerState:
        updates = [
            ClientUpdate(c, drawn(4, seed=i), 1, {"rank": ranks[c]} if c in ranks else {})
            for i, c in enumerate(("c0", "c1"))
        ]
        return rule.advance(state, rule.combine(updates, 2, state))

    def sent() -> list[int]:
        return [rule.broadcast(state, ["c0", "c1", "c2"]).start(c)[A].shape[0] for c in ("c0", "c1", "c2")]

    assert sent() == [4, 3, 4]
    state = answered()
    assert sent() == [4, 3, 4] and state.opt_state == {}
    state = answered(c0=2.0)
    assert sent() == [2, 3, 4]
    state = answered(c0=3.0, c1=1.0)
    assert sent() == [2, 1, 4]
    state = answered()
    assert sent() == [2, 1, 4]


def test_the_tail_is_measured_and_given_up_where_it_shrank(small_local) -> None:
    from unfed.models.adapter import restore, snapshot
    from unfed.training.context import Tail

    model = small_local().model
    start = snapshot(model)
    restore(model, AdapterState({n: torch.ones_like(t) for n, t in start.items()}))
    tail = Tail(model, 4, 0.99)
    assert tail.keep == 3
    expected = sum(
        math.sqrt(t.shape[1]) * math.sqrt(start[n.replace("lora_A", "lora_B")].shape[0])
        for n, t in start.items()
        if "lora_A" in n
    )
    value = tail.norm()
    assert float(value.detach()) == pytest.approx(expected, rel=1e-6) and not tail.shrank()
    value.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and "lora_A" in n}
    assert all(g is not None and not g[:3].any() and bool((g[3] > 0).all()) for g in gradients.values())
    restore(model, AdapterState({n: torch.full_like(t, 0.9) for n, t in start.items()}))
    assert tail.shrank()
    restore(model, AdapterState({n: torch.full_like(t, 0.0) for n, t in start.items()}))
    zero = Tail(model, 4, 0.5)
    assert zero.keep == 2 and float(zero.norm().detach()) == 0.0 and not zero.shrank()
    assert torch.isfinite(torch.autograd.grad(zero.norm(), [p for p in model.parameters() if p.requires_grad])[0]).all()
    assert Tail(model, 1, 0.5).keep == 1 and not Tail(model, 1, 0.5).shrank()


def test_the_regulariser_is_added_once_a_step(small_local, small_examples) -> None:
    """One step of two micro-batches: the pruning parts add up to strength * norm at the weights of that step."""
    from unfed.models.adapter import restore, snapshot
    from unfed.objectives.nll import NLL
    from unfed.objectives.pruning import Pruning
    from unfed.training.batches import BatchPlan, TrainRows
    from unfed.training.context import Companions, Tail
    from unfed.training.loop import LocalTask

    local = small_local(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    objective = Pruning(NLL(), 0.5, 0.25)
    assert objective.name == "NLL+pruning" and objective.needs.tail == 0.5
    restore(local.model, AdapterState({n: torch.full_like(t, 0.1) for n, t in snapshot(local.model).items()}))
    tail = Tail(local.model, 4, 0.5)
    before = float(tail.norm().detach())
    rows = TrainRows({"train": small_examples[:4]})
    plan = BatchPlan(rows, "train", frozenset({"train"}), 2, 2, ("fit", 0, "c"), 0)
    result = local.train(LocalTask(plan, objective, 1.0), Companions(tail=tail))
    assert result.steps == 1 and result.parts["pruning"] == pytest.approx(0.25 * before, rel=1e-5)


def test_pruning_and_privacy_do_not_go_together(small_run, tmp_path) -> None:
    """Which rank a client gives up is told by its data, and no noise covers that."""
    from unfed.config.checks_ranks import ranks_and_rules
    from unfed.config.schema import AggregatorConfig, PrivacyConfig

    def said(**settings: float) -> list[str]:
        rule = AggregatorConfig("FedAvg", {"adapter": "hetlora", "adapter_args": settings})
        return list(ranks_and_rules(small_run("finetune", tmp_path, aggregator=rule, privacy=PrivacyConfig("local"))))

    assert len(said()) == 1 and "privacy=local does not cover" in said()[0]
    assert said(gamma=1) == []
