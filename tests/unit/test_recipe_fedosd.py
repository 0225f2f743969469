"""FedOSD: directions around other gradients, updates that are gradients, and a recovery that does not run back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unfed.aggregation.tree import delta, inner, norm
from unfed.base.errors import ConfigError
from unfed.base.types import AdapterState, Broadcast, ClientUpdate, ServerState
from unfed.federated.client import Client, ClientData
from unfed.federated.schedule import FitTask, Phase, Work
from unfed.models.adapter import restore, snapshot, trainable_parameters
from unfed.models.forward import token_logps
from unfed.objectives.nll import NLL
from unfed.objectives.npo import NPO
from unfed.objectives.uce import UCE
from unfed.unlearning.base import Ingredients, Situation, unmet
from unfed.unlearning.fedosd import Descend, FedOSD, KeepAway, around
from unfed.unlearning.registry import build_recipe

TASK = FitTask(Phase("p", 1, {"a": Work("train", NLL(), 1.0)}), 0, 0)


def state(*values: float) -> AdapterState:
    """Two tensors, so that sums go over tensors."""
    whole = torch.tensor(values)
    return AdapterState({"A": whole[:1].clone(), "B": whole[1:].clone()})


def close(found: AdapterState, *values: float) -> None:
    torch.testing.assert_close(torch.cat([found["A"], found["B"]]), torch.tensor(values))


def test_a_vector_loses_its_part_in_the_span_of_others_and_keeps_its_length():
    """(1, 1, 0) beside (1, 0, 0) is (0, 1, 0), and sqrt 2 long."""
    close(around(state(1.0, 1.0, 0.0), [state(5.0, 0.0, 0.0)]), 0.0, math.sqrt(2), 0.0)
    # (1, 2, 3) beside the plane of (1, 1, 0) and (1, -1, 0) is (0, 0, 3), and sqrt 14 long.
    plane = [state(1.0, 1.0, 0.0), state(1e-4, -1e-4, 0.0)]
    close(around(state(1.0, 2.0, 3.0), plane), 0.0, 0.0, math.sqrt(14))


def test_others_that_depend_on_each_other_or_are_zero_do_no_harm():
    twice = [state(1.0, 0.0, 0.0), state(2.0, 0.0, 0.0), state(0.0, 0.0, 0.0), state(1.0, 1e-9, 0.0)]
    close(around(state(1.0, 1.0, 0.0), twice), 0.0, math.sqrt(2), 0.0)
    close(around(state(1.0, 1.0, 0.0), []), 1.0, 1.0, 0.0)
    close(around(state(1.0, 1.0, 0.0), [state(0.0, 0.0, 0.0)]), 1.0, 1.0, 0.0)


def test_nothing_left_is_no_step_rather_than_noise():
    close(around(state(1.0, 2.0, 0.0), [state(1.0, 0.0, 0.0), state(1.0, 1.0, 0.0)]), 0.0, 0.0, 0.0)
    close(around(state(0.0, 0.0, 0.0), [state(1.0, 0.0, 0.0)]), 0.0, 0.0, 0.0)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**16),
    clients=st.integers(1, 8),
    alike=st.floats(-6, 1),
    scale=st.lists(st.floats(-5, 3), min_size=8, max_size=8),
)
def test_the_direction_is_orthogonal_to_every_other_gradient(seed, clients, alike, scale):
    """Also where the others nearly agree (they differ by 10^alike) or differ by orders of magnitude in length."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda: {"A": torch.randn(4, 10, generator=g), "B": torch.randn(30, generator=g)}  # noqa: E731
    common, vector = draw(), AdapterState(draw())
    others = [
        AdapterState({n: 10 ** scale[k] * (common[n] + 10**alike * t) for n, t in draw().items()})
        for k in range(clients)
    ]
    found = around(vector, others)
    assert norm(found) == pytest.approx(norm(vector), rel=1e-5)
    assert inner(found, vector) > 0, "it still goes down"
    for other in others:
        assert abs(inner(found, other)) <= 1e-5 * norm(found) * norm(other)


def test_a_step_takes_the_targets_mean_gradient_around_the_others():
    """An update is w - g. Targets (2, 1, 0) and (0, 1, 0): mean (1, 1, 0); the other (3, 0, 0). So d is (0, sqrt 2, 0),
    and a step of 0.5 from (1, 1, 1) ends at 1 - sqrt 2 / 2 in the second place."""
    begin = state(1.0, 1.0, 1.0)
    sent = {"t": state(-1.0, 0.0, 1.0), "a": state(-2.0, 1.0, 1.0), "u": state(1.0, 0.0, 1.0)}
    updates = [ClientUpdate(c, w, n) for n, (c, w) in enumerate(sent.items(), 1)]
    combined, adapter = Descend(("t", "u"), 0.5).advance(TASK, ServerState(0, begin), iter(updates))
    close(adapter, 1.0, 1 - math.sqrt(2) / 2, 1.0)
    assert combined.client_ids == ("t", "a", "u") and combined.num_examples == 6
    _, adapter = Descend(("t", "u"), 0.5).advance(TASK, ServerState(0, begin), iter(updates[1:2]))
    assert adapter.digest() == begin.digest(), "no target, no step"


def test_recovery_goes_sideways_and_never_nearer_to_where_it_came_from():
    """From (0, 0, 0) to (2, 0, 0). One goes by (-1, 1, 0), which makes (0, sqrt 2, 0); the other by (0, -3, 0)."""
    begin = state(2.0, 0.0, 0.0)
    updates = [ClientUpdate("a", state(1.0, 1.0, 0.0), 1), ClientUpdate("b", state(2.0, -3.0, 0.0), 9)]
    rule = KeepAway(state(0.0, 0.0, 0.0))
    _, adapter = rule.advance(TASK, ServerState(0, begin), iter(updates))
    close(adapter, 2.0, (math.sqrt(2) - 3) / 2, 0.0)
    _, adapter = KeepAway(begin).advance(TASK, ServerState(0, begin), iter(updates))
    close(adapter, 1.5, -1.0, 0.0)  # it has not moved yet: a plain mean


def ingredients(**changes) -> Ingredients:
    who = Situation(changes.pop("targets", ("a",)), changes.pop("retainers", ("b", "c")))
    usual = {"unlearn_epochs": 5.0, "local_epochs": 4.0, "global_rounds": 2, "start": state(1.0, 1.0, 1.0)}
    return Ingredients(who, NPO(), NLL(), **(usual | changes))


def test_the_plan_unlearns_in_rounds_with_everybody_and_recovers():
    unlearn, recover = FedOSD(unlearn_rounds=7, lr=0.2).plan(ingredients()).schedule.phases
    assert (unlearn.rounds, unlearn.always, unlearn.rule) == (7, ("a",), Descend(("a",), 0.2))
    shown = {c: (w.rows, w.objective, w.epochs) for c, w in unlearn.work.items()}
    assert shown == {"a": ("forget", UCE(), 1.0), "b": ("train", NLL(), 1.0), "c": ("train", NLL(), 1.0)}
    assert (recover.rounds, recover.rule.name, dict(recover.work)) == (2, "keep_away", ingredients().retain_work())
    close(recover.rule.origin, 1.0, 1.0, 1.0)
    assert [p.name for p in FedOSD().plan(ingredients(global_rounds=0)).schedule.phases] == ["unlearn"]


def test_a_target_that_keeps_rows_forgets_in_the_rounds_and_recovers_with_the_others():
    unlearn, recover = FedOSD().plan(ingredients(retainers=("a", "b"))).schedule.phases
    assert {c: w.rows for c, w in unlearn.work.items()} == {"a": "forget", "b": "train"}
    assert tuple(recover.work) == ("a", "b")
    two = FedOSD().plan(ingredients(targets=("a", "c"))).schedule.phases[0]
    assert two.always == ("a", "c") and two.rule.targets == ("a", "c") and tuple(two.work) == ("a", "c", "b")


def test_without_another_client_it_is_refused():
    (problem,) = unmet(FedOSD(), Situation(("a",), ("a",)))
    assert problem.startswith("recipe=fedosd: no client but a owns retain rows") and "local_then_recover" in problem
    for params in ({"lr": 0}, {"unlearn_rounds": 0}, {"unlearn_rounds": 2.5}):
        with pytest.raises(ConfigError):
            build_recipe("fedosd", params)


def test_an_update_is_minus_the_gradient_over_all_rows(small_local, small_examples):
    """Ten rows in batches of four: one step, and each token counts once."""
    local = small_local(weight_decay=0.1, max_grad_norm=0.5, warmup_ratio=0.5)
    rows = small_examples[:10]
    g = torch.Generator().manual_seed(0)
    begin = {n: t + 0.1 * torch.randn(t.shape, generator=g) for n, t in snapshot(local.model).items()}
    work = FedOSD().plan(ingredients()).schedule.phases[0].work["b"]
    client = Client(local, {"b": ClientData("b", {"train": rows})})
    update = client.fit(FitTask(Phase("unlearn", 1, {"b": work}), 0, 0), Broadcast(AdapterState(begin)), "b")
    assert update.metrics["steps"] == 1 and update.num_examples == 10
    restore(local.model, begin)
    logps, _ = token_logps(local.model, local.collation.batch(rows))
    (-logps.mean()).backward()
    wanted = {n: p.grad for n, p in trainable_parameters(local.model).items()}
    sent = delta(AdapterState(begin), update.adapter)
    assert norm(sent) > 0.1
    for (name, gradient), found in zip(sorted(wanted.items()), sent.values(), strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-6, msg=name)
