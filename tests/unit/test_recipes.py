"""Recipes are schedules: who does what, in which order, with which objective."""

from __future__ import annotations

import pytest

from unfed.app.outcome import left_out
from unfed.base.errors import ConfigError, UnfedError
from unfed.config.schema import RECIPES as NAMES
from unfed.federated.checkpoint import RoundRecord
from unfed.federated.schedule import Participation, Phase, Schedule, Work
from unfed.objectives.nll import NLL
from unfed.objectives.npo import NPO
from unfed.objectives.proximal import Proximal
from unfed.unlearning.base import Ingredients, Situation
from unfed.unlearning.cost import Cost, cost_of, steps_of
from unfed.unlearning.finetune import finetune
from unfed.unlearning.registry import RECIPES, build_recipe


def given(**changes) -> Ingredients:
    who = {"targets": ("client_0",), "retainers": ("client_0", "client_1", "client_2")}
    usual = {
        "situation": Situation(**(who | {k: tuple(changes.pop(k)) for k in who if k in changes})),
        "forget": NPO(),
        "retain": NLL(),
        "unlearn_epochs": 6.0,
        "local_epochs": 2.0,
        "global_rounds": 3,
    }
    return Ingredients(**(usual | changes))


def local_then_recover(ingredients: Ingredients) -> Schedule:
    return build_recipe("local_then_recover", {}).plan(ingredients).schedule


def interleaved(ingredients: Ingredients) -> Schedule:
    return build_recipe("interleaved", {}).plan(ingredients).schedule


def test_fine_tuning_is_one_phase():
    schedule = finetune(["a", "b"], NLL(), 2, 5)
    assert schedule.num_rounds == 5 and [p.name for p in schedule.phases] == ["finetune"]
    assert schedule.phases[0].work == {"a": Work("train", NLL(), 2), "b": Work("train", NLL(), 2)}
    assert schedule.phases[0].rule == "aggregate"


def test_the_target_unlearns_alone_and_all_recover():
    unlearn, recover = local_then_recover(given()).phases
    assert (unlearn.rounds, unlearn.rule, dict(unlearn.work)) == (1, "adopt", {"client_0": Work("forget", NPO(), 6.0)})
    assert (recover.rounds, recover.rule) == (3, "aggregate")
    assert dict(recover.work) == {f"client_{i}": Work("train", NLL(), 2.0, shown="retain") for i in range(3)}


@pytest.mark.parametrize("changes", [{"global_rounds": 0}, {"retainers": []}])
def test_without_rounds_or_retain_rows_there_is_no_recovery(changes):
    assert [p.name for p in local_then_recover(given(**changes)).phases] == ["unlearn"]


def test_several_targets():
    unlearn, _ = local_then_recover(given(targets=["client_0", "client_2"])).phases
    assert list(unlearn.work) == ["client_0", "client_2"]


def test_interleaved_spreads_the_epochs_and_each_client_does_one_thing():
    (phase,) = interleaved(given(targets=["client_1"])).phases
    assert phase.rounds == 3 and phase.rule == "aggregate"
    assert dict(phase.work) == {
        "client_0": Work("train", NLL(), 2.0, shown="retain"),
        "client_1": Work("forget", NPO(), 2.0, spread=True),
        "client_2": Work("train", NLL(), 2.0, shown="retain"),
    }
    assert list(phase.work) == ["client_0", "client_1", "client_2"]


def test_interleaved_keeps_the_clients_in_order_of_their_numbers():
    many = [f"client_{i}" for i in range(12)]
    (phase,) = interleaved(given(targets=["client_11"], retainers=many)).phases
    assert list(phase.work) == many


def test_every_recipe_has_its_name_and_says_what_it_promises():
    assert tuple(RECIPES) == NAMES
    for name, cls in RECIPES.items():
        assert build_recipe(name, {}).name == name and cls.promise.text and cls.__doc__


def test_a_flag_is_true_or_false():
    assert build_recipe("subtract", {"renormalize": False}).settings() == {"renormalize": False}
    for value in ("yes", 1, None):
        with pytest.raises(ConfigError, match=r"recipe.renormalize: must be true or false, not"):
            build_recipe("subtract", {"renormalize": value})


def test_what_the_rule_adds_to_a_clients_loss_is_added_to_another_objective_too():
    assert given(retain=Proximal(NLL(), 0.1)).as_retain(NPO()) == Proximal(NPO(), 0.1)
    assert given().as_retain(NPO()) == NPO()


def test_cost_counts_steps_and_bytes_both_ways():
    """Unlearning: 6 epochs of ceil(5/4) = 2 steps. Three rounds: 2 epochs of 1, 2 and 3 steps. 8 bytes, both ways."""
    rows = {"client_0": {"forget": 5, "train": 4}, "client_1": {"train": 8}, "client_2": {"train": 9}}
    cost = cost_of(local_then_recover(given()), 0, rows, 4, 8)
    assert cost == Cost(4, 12 + 3 * 2 * (1 + 2 + 3), 2 * 8 * (1 + 3 * 3))
    assert cost_of(local_then_recover(given()), 2, rows, 4, 8) == Cost(2, 2 * 2 * 6, 2 * 8 * 6)
    assert cost.against(Cost(9, 96, 320)) == "50% of the fine-tuning's client steps, 50% of its bytes"
    assert steps_of(Work("forget", NPO(), 0.5, spread=True), 8, 4, spread=4) == 1


def test_tasks_count_over_the_schedule_and_within_the_phase():
    schedule = local_then_recover(given())
    tasks = [(t.round, t.phase.name, t.phase_round) for t in schedule.tasks()]
    assert tasks == [(0, "unlearn", 0), (1, "recover", 0), (2, "recover", 1), (3, "recover", 2)]
    assert [t.round for t in schedule.tasks(2)] == [2, 3]
    assert list(schedule.tasks(4)) == []


def test_the_table_says_who_does_what():
    many = [f"client_{i}" for i in range(5)]
    table = local_then_recover(given(retainers=many)).table()
    assert table == [
        ("unlearn", "1", "client_0", "NPO on forget", "6"),
        ("recover", "3", "client_0 .. client_4", "NLL on retain", "2"),
    ]


def test_an_empty_phase_is_refused():
    for phases in ((Phase("p", 0, {"a": Work("train", NLL(), 1)}),), (Phase("p", 1, {}),)):
        with pytest.raises(ValueError, match="a round and a client at least"):
            Schedule(phases)


@pytest.mark.parametrize(
    ("fraction", "least", "count"), [(1.0, 1, 10), (0.5, 1, 5), (0.01, 1, 1), (0.1, 4, 4), (0.1, 40, 10)]
)
def test_how_many_take_part(fraction, least, count):
    clients = [f"c{i}" for i in range(10)]
    chosen = Participation(fraction, least).select(clients, 0, 3)
    assert len(chosen) == count and chosen == [c for c in clients if c in chosen]


def test_who_takes_part_depends_on_seed_and_round():
    clients = [f"c{i}" for i in range(10)]
    half = Participation(0.5)
    rounds = [tuple(half.select(clients, 0, r)) for r in range(20)]
    assert rounds == [tuple(half.select(clients, 0, r)) for r in range(20)]
    assert len(set(rounds)) > 15 and {c for r in rounds for c in r} == set(clients)
    assert tuple(half.select(clients, 1, 0)) != rounds[0]


def test_clients_that_unlearn_take_part_in_every_round():
    clients = [f"client_{i}" for i in range(6)]
    half = Participation(0.5, 1)
    for round_ in range(20):
        chosen = half.select(clients, 0, round_, ["client_4"])
        assert len(chosen) == 3 and "client_4" in chosen and chosen == sorted(chosen)
    assert len({tuple(half.select(clients, 0, r, ["client_4"])) for r in range(20)}) > 3
    assert half.select(clients, 0, 0, clients[:5]) == clients[:5], "all targets, though they are more than half"
    for name in ("local_then_recover", "interleaved"):
        schedule = build_recipe(name, {}).plan(given(targets=["client_1", "client_2"])).schedule
        assert schedule.phases[0].always == ("client_1", "client_2")


def test_too_few_survivors():
    with pytest.raises(UnfedError, match=r"only 1 of 3 clients.*min_clients=2: client_0: broken; client_2: late"):
        Participation(1.0, 2).check(1, 3, ["client_0: broken", "client_2: late"])
    with pytest.raises(UnfedError, match="only 0 of 3"):
        Participation(1.0, 1).check(0, 3, [])
    Participation(1.0, 2).check(1, 1, [])  # a phase with fewer clients than min_clients
    Participation(1.0, 2).check(2, 3, [])


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("local_then_recover", {}), ("interleaved", {}), ("fedosd", {"unlearn_rounds": 3}), ("task_arithmetic", {}),
        ("unlearning_adapter", {}), ("unlearning_adapter", {"forget": "none"}),
    ],
)  # fmt: skip
def test_rounds_before_the_global_ones_are_those_of_the_plan(name, params):
    recipe = build_recipe(name, params)
    ingredients = given()
    planned = recipe.plan(ingredients).schedule.num_rounds
    assert recipe.rounds_before + ingredients.global_rounds == planned


def test_a_run_in_which_no_target_unlearned_is_not_finished():
    """Each in one of two rounds is enough; one that is silent in both is told; where both are, nothing was done."""
    schedule = build_recipe("fedosd", {"unlearn_rounds": 2}).plan(given(targets=["client_0", "client_1"])).schedule
    targets = ["client_0", "client_1"]

    def record(number: int, *clients: str) -> RoundRecord:
        failures = {c: "NaN" for c in targets if c not in clients}
        return RoundRecord(number, "unlearn", clients, failures, 1, "", "", 0, 0, 0.0, None, False)

    assert left_out(schedule, [record(0, "client_0"), record(1, "client_1")], targets) == []
    assert left_out(schedule, [record(0, "client_0"), record(1, "client_0")], targets) == [
        "client_1 did not unlearn in phase unlearn: NaN"
    ]
    with pytest.raises(UnfedError, match=r"nothing was unlearned in phase unlearn, .*client_0: NaN; client_1: NaN"):
        left_out(schedule, [record(0, "client_2"), record(1, "client_2")], targets)
