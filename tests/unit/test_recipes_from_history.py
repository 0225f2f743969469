"""FedEraser and PGA: their arithmetic worked by hand on kept rounds, and what they ask of those."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from unfed.aggregation.registry import build_aggregator
from unfed.base.errors import ConfigError
from unfed.base.types import AdapterState, ClientUpdate, ServerState
from unfed.federated.history import History, HistorySettings
from unfed.federated.history_writer import HistoryWriter
from unfed.federated.rounds import RoundsConfig, RunKeeper, run_rounds
from unfed.federated.schedule import Participation, Phase, Schedule, Work
from unfed.objectives.grad_ascent import GradAscent
from unfed.objectives.nll import NLL
from unfed.objectives.npo import NPO
from unfed.training.extent import Extent
from unfed.unlearning.base import Ingredients, Situation, Source, unmet
from unfed.unlearning.federaser import FedEraser, calibrated
from unfed.unlearning.pga import PGA, Ball, last_model, others_alone
from unfed.unlearning.registry import build_recipe
from unfed.unlearning.sgd import plain_sgd

CLIENTS = {"a": 1, "b": 3, "c": 4}
NAME = "m.lora_A.weight"


def state(*values: float) -> AdapterState:
    return AdapterState({NAME: torch.tensor([list(values)])})


class Walkers:
    """Client ``k`` moves the adapter by (examples of ``k``, round counted from 1)."""

    def fit(self, task, broadcast, client_ids):
        for client in client_ids:
            step = torch.tensor([[float(CLIENTS[client]), float(task.round + 1)]])
            yield ClientUpdate(client, AdapterState({NAME: broadcast.adapter[NAME] + step}), CLIENTS[client])


def walked(directory: Path, *, rounds: int = 3, every: int = 1, weighting="examples", clients=CLIENTS, **how) -> Source:
    """A fine-tuning of walkers that began at (0, 0), and kept its updates."""
    rule, kept = build_aggregator("FedAvg", {"weighting": weighting}), HistorySettings(("updates",), every)
    keeper = RunKeeper(history=HistoryWriter(directory, kept, rule))
    assert keeper.history is not None
    keeper.history.begin(ServerState(0, state(0.0, 0.0)))
    schedule = Schedule((Phase("finetune", rounds, {c: Work("train", NLL(), 1.0) for c in clients}),))
    config = RoundsConfig(0, Participation(**how))
    run_rounds(schedule, Walkers(), rule, ServerState(0, state(0.0, 0.0)), config, keeper)
    who = tuple(r.clients for r in keeper.records)
    return Source(directory, who, 9, 0, "FedAvg", 1.0, kept, weighting)


def given(source: Source, targets=("b",), step: float = 1.0, start: AdapterState | None = None) -> Ingredients:
    source = dataclasses.replace(source, mean_step=step)
    retainers = tuple(c for c in CLIENTS if c not in targets)
    return Ingredients(
        Situation(tuple(targets), retainers, source), NPO(), NLL(), 5.0, 4.0, 7, start or state(9.0, 9.0)
    )


def close(found: AdapterState, *values: float) -> None:
    torch.testing.assert_close(found[NAME], torch.tensor([list(values)]))


def test_a_direction_gets_the_kept_length_tensor_by_tensor():
    direction = AdapterState({"A": torch.tensor([3.0, 4.0]), "B": torch.tensor([0.0, 0.0])})
    kept = AdapterState({"A": torch.tensor([0.0, 10.0]), "B": torch.tensor([1.0, 1.0])})
    found = calibrated(direction, kept)
    torch.testing.assert_close(found["A"], torch.tensor([6.0, 8.0]))
    torch.testing.assert_close(found["B"], torch.zeros(2))


def test_a_direction_whose_squares_are_0_in_float32_has_a_length():
    """3e-30 and 4e-30 are 5e-30 long; as long as 10 that is 6 and 8."""
    found = calibrated(state(3e-30, 4e-30), state(0.0, 10.0))
    torch.testing.assert_close(found[NAME], torch.tensor([[6.0, 8.0]]))


def test_it_begins_with_the_first_kept_round_as_it_was_without_the_target(tmp_path):
    """Updates of round 0: a (1, 1), b (3, 1), c (4, 1). Without b: (1 * 1 + 4 * 4) / 5 = 3.4."""
    source = walked(tmp_path)
    close(FedEraser().plan(given(source)).start.adapter, 3.4, 1.0)
    close(FedEraser().plan(given(source, ("a", "b"))).start.adapter, 4.0, 1.0)
    close(FedEraser().plan(given(source, step=0.5)).start.adapter, 1.7, 0.5)
    even = walked(tmp_path / "even", weighting="uniform")
    close(FedEraser().plan(given(even)).start.adapter, 2.5, 1.0)


@pytest.mark.parametrize("step", [1.0, 0.5])
def test_a_round_adds_the_mean_of_kept_lengths_in_new_directions(tmp_path, step):
    """Round 1 kept a (1, 2) and c (4, 2), lengths sqrt 5 and sqrt 20. Now a goes to (0, 10), c to (-2, 0) from where
    the round begins, so the steps are (0, sqrt 5) and (-sqrt 20, 0), and their mean with weights 1 and 4 is
    (-4 sqrt 20, sqrt 5) / 5."""
    phase = FedEraser().plan(given(walked(tmp_path), step=step)).schedule.phases[0]
    task = next(Schedule((phase,)).tasks())
    begin = state(1.0, 1.0)
    updates = [ClientUpdate("a", state(1.0, 11.0), 1), ClientUpdate("c", state(-1.0, 1.0), 4)]
    combined, adapter = phase.rule.advance(task, ServerState(0, begin), iter(updates))
    close(adapter, 1 - step * 4 * math.sqrt(20) / 5, 1 + step * math.sqrt(5) / 5)
    assert combined.client_ids == ("a", "c") and combined.num_examples == 5
    # The phase's second round is the kept round 2: a (1, 3), c (4, 3), lengths sqrt 10 and 5.
    task = list(Schedule((phase,)).tasks())[1]
    _, adapter = phase.rule.advance(task, ServerState(1, begin), iter(updates))
    close(adapter, 1 - step * 4 * 5 / 5, 1 + step * math.sqrt(10) / 5)


def test_the_phases_are_the_kept_rounds_with_those_who_took_part(tmp_path):
    source = walked(tmp_path / "all", rounds=5, every=2)
    (phase,) = FedEraser().plan(given(source)).schedule.phases
    assert (phase.rounds, phase.rule.rounds, phase.always) == (2, (2, 4), ("a", "c"))
    assert dict(phase.work) == {c: Work("train", NLL(), 2.0, shown="retain") for c in ("a", "c")}
    source = walked(tmp_path / "some", rounds=6, fraction_fit=0.67)
    plan = FedEraser(calibration_ratio=1.0, final_rounds=2).plan(given(source))
    *calibrating, last = plan.schedule.phases
    there = [tuple(c for c in r if c != "b") for r in source.participants]
    assert len(set(there)) > 1, "the draw should differ between rounds"
    found = {n: p.always for p in calibrating for n in p.rule.rounds}
    assert found == {n: c for n, c in enumerate(there) if c and n > 0}
    assert all(a.always != b.always for a, b in itertools.pairwise(calibrating))
    assert (last.name, last.rounds, last.rule) == ("recover", 2, "aggregate")


def test_what_leaves_nothing_to_calibrate_is_refused(tmp_path):
    recipe = build_recipe("federaser", {})
    once = walked(tmp_path / "once", rounds=1)
    (problem,) = unmet(recipe, given(once).situation)
    assert "only the first round's updates are kept" in problem and "recipe.final_rounds" in problem
    assert unmet(FedEraser(final_rounds=1), given(once).situation) == []
    alone = walked(tmp_path / "alone", clients={"b": 3})
    (problem,) = unmet(recipe, given(alone).situation)
    assert "no client but b took part" in problem and "recipe=retrain" in problem
    single = Situation(("b",), ("a", "b", "c"), once)
    assert any("removes whole clients" in p for p in unmet(recipe, single))


def test_settings_out_of_their_limits_are_refused():
    for params in ({"calibration_ratio": 0}, {"final_rounds": -1}, {"final_rounds": 1.5}, {"ratio": 0.5}):
        with pytest.raises(ConfigError):
            build_recipe("federaser", params)


def test_history_tells_who_took_part_without_reading_a_tensor(tmp_path, monkeypatch):
    walked(tmp_path)
    monkeypatch.setattr("unfed.federated.history.read_tensors", None)
    assert History(tmp_path).examples(1) == CLIENTS


def test_the_reference_is_the_mean_of_the_others_in_the_last_round(tmp_path):
    """Shares 1/8, 3/8, 4/8: the mean update is (26/8, t) and the training ends at (9.75, 6). In the last round the
    others' mean is (3.4, 3) instead of (3.25, 3): the reference is (9.9, 6)."""
    source, end = walked(tmp_path), state(9.75, 6.0)
    close(others_alone(source, end, ("b",)), 9.9, 6.0)
    close(last_model(source, end, "b"), 9.75 - 3.25 + 3.0, 6.0)
    # Without a and b only c is left, which moved by (4, 3).
    close(others_alone(source, end, ("a", "b")), 9.75 - 3.25 + 4.0, 6.0)
    # Half a step of the server: half the difference.
    half = dataclasses.replace(source, mean_step=0.5)
    close(others_alone(half, state(4.875, 3.0), ("b",)), 4.95, 3.0)
    close(last_model(half, state(4.875, 3.0), "b"), 4.875 - 1.625 + 3.0, 3.0 - 1.5 + 3.0)


def test_with_equal_weights_the_reference_is_the_papers(tmp_path):
    """N/(N-1) w_T - 1/(N-1) w_u with N = 3; the mean update is (8/3, t), so the training ends at (8, 6)."""
    source, end = walked(tmp_path, weighting="uniform"), state(8.0, 6.0)
    sent = last_model(source, end, "b")
    close(sent, 8 - 8 / 3 + 3, 6.0)
    paper = 1.5 * end[NAME] - 0.5 * sent[NAME]
    torch.testing.assert_close(others_alone(source, end, ("b",))[NAME], paper)


def test_a_target_that_was_not_in_the_last_round_is_taken_out_of_its_own_last_one(tmp_path):
    source = walked(tmp_path, rounds=6, fraction_fit=0.67)
    last = max(n for n, there in enumerate(source.participants) if "b" in there)
    others = [c for c in source.participants[last] if c != "b"]
    weight = sum(CLIENTS[c] for c in others)
    mean = sum(CLIENTS[c] ** 2 for c in source.participants[last]) / (weight + 3)
    alone = sum(CLIENTS[c] ** 2 for c in others) / weight
    close(others_alone(source, state(1.0, 1.0), ("b",)), 1 + alone - mean, 1.0)


def test_pga_plans_an_ascent_in_a_ball_and_a_recovery_without_the_targets(tmp_path):
    """From (0, 0) to (9.75, 6) is 11.448; the reference (9.9, 6) is 0.4 from what b sent, (9.5, 6)."""
    plan = PGA(radius=0.5, early_stop=0.1).plan(given(walked(tmp_path), start=state(9.75, 6.0)))
    ascent, recover = plan.schedule.phases
    assert (ascent.rounds, ascent.rule, ascent.always, tuple(recover.work)) == (1, "adopt", ("b",), ("a", "c"))
    close(plan.start.adapter, 9.9, 6.0)
    work, travelled = ascent.work["b"], math.hypot(9.75, 6.0)
    assert (work.rows, work.objective, work.epochs) == ("forget", GradAscent(), 5)
    assert work.constraint.radius == pytest.approx(0.5 * travelled)
    assert work.constraint.reach == pytest.approx(0.4 + 0.1 * travelled)
    two = PGA().plan(given(walked(tmp_path), ("a", "b"), start=state(9.75, 6.0))).schedule.phases[0]
    assert two.always == ("a", "b") and two.work["a"].constraint.reach != two.work["b"].constraint.reach


def test_a_target_of_which_no_update_is_kept_is_refused(tmp_path):
    source = walked(tmp_path, rounds=6, every=6, fraction_fit=0.34)
    absent = next(c for c in CLIENTS if c not in source.participants[0])
    situation = Situation((absent,), tuple(c for c in CLIENTS if c != absent), source)
    (problem,) = unmet(PGA(), situation)
    assert f"kept no update of {absent} (history.every=6)" in problem and "history.every=1" in problem


def test_its_optimizer_is_sgd_with_momentum_and_a_clipped_gradient(small_local):
    plain = small_local(weight_decay=0.1, warmup_ratio=0.5, lr_scheduler_type="cosine")
    args = dataclasses.replace(plain.args, **plain_sgd(0.02, 3.0, momentum=0.8))
    local = type(plain)(plain.model, args, plain.collation, 0)
    optimizer, scheduler = local._optimizer(Extent(10, 0), 1)
    assert isinstance(optimizer, torch.optim.SGD)
    assert {(g["lr"], g["momentum"], g["weight_decay"]) for g in optimizer.param_groups} == {(0.02, 0.8, 0.0)}
    assert local.args.max_grad_norm == 3.0 and scheduler.get_last_lr() == [0.02]


def test_a_ball_holds_weights_and_says_when_they_are_far_enough():
    """(3, 4) is 5 from the center and comes back to length 2; from (-1, 0) that is then hypot(2.2, 1.6)."""
    model = nn.Linear(2, 1, bias=False)
    center = AdapterState({"weight": torch.zeros(1, 2)})
    last = AdapterState({"weight": torch.tensor([[-1.0, 0.0]])})
    reach = math.hypot(2.2, 1.6)
    for margin, stops in ((1e-3, False), (-1e-3, True)):
        model.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
        assert Ball(2.0, reach + margin, center, last).bind(model)() is stops
        torch.testing.assert_close(model.weight.data, torch.tensor([[1.2, 1.6]]))
    model.weight.data.copy_(torch.tensor([[0.3, 0.4]]))
    assert Ball(2.0, 9.0, center, last).bind(model)() is False
    torch.testing.assert_close(model.weight.data, torch.tensor([[0.3, 0.4]]))


def test_a_rollback_without_kept_rounds_says_so_once(tmp_path):
    """``walked`` keeps updates alone, so no state of a round is there either."""
    source = walked(tmp_path)
    (problem,) = unmet(build_recipe("rollback", {}), Situation(("b",), ("a", "c"), source))
    assert "needs history=rounds of the fine-tuning" in problem
