"""Recipes that take a whole client out, on the small model: they forget, go on after a kill, and say what they lack."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from unfed.aggregation.tree import RunningMean, delta, inner, moved, norm
from unfed.app.runs import run
from unfed.base.artifacts import read_json, read_tensors
from unfed.base.errors import ConfigError
from unfed.config.schema import DatasetConfig, HistoryConfig, PartitionConfig, RecipeConfig
from unfed.data.datasets import data_digest, load_rows
from unfed.data.partition import Partition
from unfed.federated.checkpoint import Checkpoints
from unfed.federated.client import Client
from unfed.federated.history import History
from unfed.models.adapter import snapshot
from unfed.unlearning import fedosd, pga

ROUNDS = 3
RECIPES = {"federaser": {}, "pga": {}, "fedosd": {"unlearn_rounds": 6, "lr": 10.0}}
LACKING = {r: rf"recipe={r}: needs history=updates .* fine-tune with history=updates" for r in ("federaser", "pga")}


def digest(directory: Path) -> str:
    return read_tensors(directory / "adapter_model.safetensors").digest()


def forget_loss(directory: Path) -> float:
    return read_json(directory / "unfed.json")["forget_loss"]["value"]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory, small_data) -> str:
    """Four clients with three rows each, and ``client_4`` with the six forget rows; nobody owns both kinds."""
    rows = load_rows(DatasetConfig("locuslab/TOFU", "full"), str(small_data))
    ids = [r["id"] for r in rows]
    clients = {f"client_{i}": tuple(ids[3 * i : 3 * i + 3]) for i in range(4)} | {"client_4": tuple(ids[12:])}
    path = tmp_path_factory.mktemp("partition") / "partition.json"
    Partition(clients, "target", 0, data_digest(rows)).write(path)
    return str(path)


@pytest.fixture(scope="module")
def start(tmp_path_factory, small_run, manifest) -> Path:
    """A fine-tuning that kept every update."""
    args = {"num_clients": None, "global_rounds": ROUNDS}
    training = {"num_train_epochs": 4, "learning_rate": 3e-2}
    config = small_run("finetune", tmp_path_factory.mktemp("whole") / "ft", method_args=args, args=training)
    config = dataclasses.replace(
        config, history=HistoryConfig(("updates",)), partition=PartitionConfig(manifest=manifest)
    )
    return run(config).directory


@pytest.fixture
def forgetting(small_run, start):
    def make(output: Path, recipe: str, params=None, *, source: Path = start, **method_args):
        return small_run(
            "unlearn",
            output,
            model_args={"pretrained_model_name_or_path": str(source)},
            method_args={"global_rounds": 1, "target_client_idx": 4} | method_args,
            recipe=RecipeConfig(recipe, params or {}),
        )

    return make


class KilledError(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_forgets_and_a_killed_run_goes_on_to_the_same_bytes(forgetting, start, tmp_path, monkeypatch, recipe):
    result = run(forgetting(tmp_path / "run", recipe, RECIPES[recipe]))
    assert forget_loss(result.directory) > forget_loss(start) + 0.3
    assert not [f for r in result.records for f in r.failures]
    record = read_json(result.directory / "run.json")
    assert record["recipe"]["promise"]["kind"] == "approximate" and record["recipe"]["targets"] == ["client_4"]

    fit = Client.fit

    def cut(self, task, adapter, client_id):
        if task.round == result.records[-1].round:
            raise KilledError
        return fit(self, task, adapter, client_id)

    monkeypatch.setattr(Client, "fit", cut)
    with pytest.raises(KilledError):
        run(forgetting(tmp_path / "cut", recipe, RECIPES[recipe]))
    monkeypatch.undo()
    again = run(dataclasses.replace(forgetting(tmp_path / "cut", recipe, RECIPES[recipe]), resume=True))
    assert digest(again.directory) == digest(result.directory)


@pytest.mark.parametrize("recipe", LACKING)
def test_without_its_history_it_is_refused_with_the_way_out(small_run, finetuned, tmp_path, forgetting, recipe):
    with pytest.raises(ConfigError, match=LACKING[recipe]):
        run(forgetting(tmp_path / "run", recipe, source=finetuned, target_client_idx=0))
    assert not (tmp_path / "run").exists()


def test_federaser_trains_the_others_alone_and_its_rounds_are_those_that_were_kept(forgetting, start, tmp_path):
    result = run(forgetting(tmp_path / "run", "federaser", {"final_rounds": 1}))
    assert [(r.phase, len(r.clients)) for r in result.records] == [("calibrate", 4)] * 2 + [("recover", 4)]
    assert all("client_4" not in r.clients for r in result.records)
    # The first kept round is added as it is. Clients 0 to 3 have three rows each, so their mean is plain.
    kept = History(start)
    mean = RunningMean()
    for client, update in kept.updates(0):
        if client != "client_4":
            mean.add(update.delta, 3.0)
    begin = moved(kept.start(), mean.result(), 1.0, kept.start())
    assert result.records[0].adapter_before == begin.digest()


@pytest.fixture
def distances(monkeypatch):
    """(from the center, from the last model, whether it stops) after each step of PGA's ascent, and its limits."""
    found, limits, bind = [], [], pga.Ball.bind

    def spying(self, model):
        hold = bind(self, model)
        limits.append(self)

        def held() -> bool:
            stops, now = hold(), snapshot(model)
            found.append((norm(delta(now, self.center)), norm(delta(now, self.last)), stops))
            return stops

        return held

    monkeypatch.setattr(pga.Ball, "bind", spying)
    return found, limits


def test_pga_stays_in_its_ball_after_every_step(forgetting, tmp_path, distances):
    """Steps ten times the paper's reach the ball's surface and go on along it; with a wide reach nothing stops them."""
    found, limits = distances
    result = run(forgetting(tmp_path / "run", "pga", {"lr": 0.1, "early_stop": 5.0}))
    (ball,) = limits
    assert len(found) == 10, "5 epochs of 6 rows in batches of 4"
    assert all(away <= ball.radius * (1 + 1e-6) for away, _, _ in found)
    on_it = [away for away, _, _ in found if away > ball.radius * (1 - 1e-5)]
    assert len(on_it) >= 3 and found[0][0] < 0.5 * ball.radius
    assert [r.phase for r in result.records] == ["ascent", "recover"]
    assert [r.clients for r in result.records] == [("client_4",), tuple(f"client_{i}" for i in range(4))]
    assert result.records[0].adapter_before == ball.center.digest()


def test_pga_stops_where_the_target_is_far_from_what_it_sent(forgetting, tmp_path, distances):
    found, limits = distances
    result = run(forgetting(tmp_path / "run", "pga", {"early_stop": 0.01}, global_rounds=0))
    (ball,) = limits
    assert [stops for _, _, stops in found] == [False] * (len(found) - 1) + [True] and 1 < len(found) < 10
    assert all(away <= ball.reach for _, away, stops in found if not stops) and found[-1][1] > ball.reach
    assert result.records[0].metrics["client_4"]["steps"] == len(found)


def test_fedosd_steps_around_the_others_and_does_not_come_back(forgetting, start, tmp_path, monkeypatch):
    """Rounds in which every step is orthogonal to what the others sent, and a recovery that goes no nearer."""
    found, around = [], fedosd.around

    def spying(vector, others):
        direction = around(vector, others)
        found.append((direction, others))
        return direction

    monkeypatch.setattr(fedosd, "around", spying)
    places = []
    monkeypatch.setattr(Checkpoints, "save", lambda self, state, records: places.append(state.adapter))
    result = run(forgetting(tmp_path / "run", "fedosd", {"unlearn_rounds": 3, "lr": 10.0}, global_rounds=2))
    assert [(r.phase, len(r.clients)) for r in result.records] == [("unlearn", 5)] * 3 + [("recover", 4)] * 2
    assert len(found) == 3 + 2 * 4 and [len(others) for _, others in found[:3]] == [4] * 3
    for direction, others in found:
        assert max(abs(inner(direction, o)) / (norm(direction) * norm(o)) for o in others) < 1e-5
    begin = read_tensors(start / "adapter_model.safetensors")
    away = [norm(delta(place, begin)) for place in places]
    assert 0 < away[2] <= away[3] <= away[4]
    assert read_json(result.directory / "run.json")["warnings"] == [], "gradients are not judged as training"


def test_fedosd_forgets_single_rows_and_several_targets_at_once(small_run, finetuned, tmp_path):
    """Of a default partition: ``client_0`` keeps rows, and goes on with the others in the recovery."""
    config = small_run(
        "unlearn",
        tmp_path / "run",
        model_args={"pretrained_model_name_or_path": str(finetuned)},
        method_args={"global_rounds": 1},
        recipe=RecipeConfig("fedosd", {"unlearn_rounds": 2}),
    )
    result = run(config)
    assert [set(r.clients) for r in result.records] == [{"client_0", "client_1", "client_2"}] * 3
    assert all(m["steps"] == 1 for r in result.records[:2] for m in r.metrics.values())


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_clients_are_forgotten_at_once(forgetting, small_data, tmp_path, recipe):
    """``client_3`` and ``client_4``: the last nine rows."""
    shutil.copytree(small_data, tmp_path / "data")
    rows = (small_data / "tofu" / "full.json").read_text(encoding="utf-8").splitlines(keepends=True)
    for name, part in (("last", rows[9:]), ("first", rows[:9])):
        (tmp_path / "data" / "tofu" / f"{name}.json").write_text("".join(part), encoding="utf-8")
    config = forgetting(tmp_path / "run", recipe, RECIPES[recipe], target_client_idx="all")
    data = dataclasses.replace(
        config.data,
        forget=dataclasses.replace(config.data.forget, name="last"),
        retain=dataclasses.replace(config.data.retain, name="first"),
    )
    paths = dataclasses.replace(config.paths, data_dir=str(tmp_path / "data"))
    result = run(dataclasses.replace(config, data=data, paths=paths))
    assert read_json(result.directory / "run.json")["recipe"]["targets"] == ["client_3", "client_4"]
    who = {"federaser": (), "pga": ("client_3", "client_4"), "fedosd": ("client_3", "client_4")}[recipe]
    assert {c for c in result.records[0].clients if c in {"client_3", "client_4"}} == set(who)
    assert result.records[-1].clients == ("client_0", "client_1", "client_2")
