"""Recipes that take a client's summed share out: `subtract` and what begins with it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from unfed.app.runs import run
from unfed.base.artifacts import read_json, read_tensors
from unfed.base.errors import ConfigError, UnfedError
from unfed.config.schema import (
    AggregatorConfig,
    DatasetConfig,
    ForgetConfig,
    HistoryConfig,
    PartitionConfig,
    RecipeConfig,
)
from unfed.data.datasets import load_rows
from unfed.data.partition import Partition
from unfed.federated.client import Client
from unfed.federated.history import History

FORGET = DatasetConfig("locuslab/TOFU", "forget01", max_length=96)
FULL = DatasetConfig("locuslab/TOFU", "full", max_length=96)
ROUNDING = 1e-6
"""Of values below 1: a few additions and one division in float32, whose spacing is 6e-8 there."""


@pytest.fixture(scope="module")
def whole_client(tmp_path_factory, small_data) -> PartitionConfig:
    """Three clients of six rows; client_0 owns the forget set and nothing else."""
    rows = [r["id"] for r in load_rows(FULL, str(small_data))]
    forget = [r["id"] for r in load_rows(FORGET, str(small_data))]
    rest = [i for i in rows if i not in forget]
    file = tmp_path_factory.mktemp("partition") / "partition.json"
    clients = {"client_0": tuple(forget), "client_1": tuple(rest[:4]), "client_2": tuple(rest[4:])}
    Partition(clients, "author", 0, "sha256:test").write(file)
    return PartitionConfig(manifest=str(file))


@pytest.fixture(scope="module")
def summed(tmp_path_factory, small_run, whole_client):
    """Makes a fine-tuning of ``rounds`` rounds that kept its sums; keywords are ``trainer.args``."""

    def make(rounds: int, name: str = "ft", **args):
        given = {"num_clients": None, "global_rounds": rounds}
        output = tmp_path_factory.mktemp(f"summed_{rounds}") / name
        config = small_run("finetune", output, args=args, method_args=given, partition=whole_client)
        return dataclasses.replace(config, history=HistoryConfig(("sums",)))

    return make


@pytest.fixture(scope="module")
def one_round(summed) -> Path:
    return run(summed(1)).directory


@pytest.fixture(scope="module")
def two_rounds(summed) -> Path:
    return run(summed(2)).directory


def adapter(directory: Path):
    return read_tensors(directory / "adapter_model.safetensors")


def distance(one, other) -> float:
    return max(float((one[n] - other[n]).abs().max()) for n in one)


def forgetting(small_run, start: Path, output: Path, recipe: str = "subtract", rounds: int = 0, **params):
    return small_run(
        "unlearn",
        output,
        model_args={"pretrained_model_name_or_path": str(start)},
        method_args={"global_rounds": rounds},
        recipe=RecipeConfig(recipe, params),
    )


def test_after_one_round_subtraction_is_averaging_without_the_target(small_run, summed, one_round, tmp_path):
    config = summed(1, "without")
    without = run(dataclasses.replace(config, data=dataclasses.replace(config.data, exclude=FORGET))).directory
    result = run(forgetting(small_run, one_round, tmp_path / "run"))
    assert result.records == ()
    assert distance(adapter(result.directory), adapter(without)) < ROUNDING
    assert distance(adapter(one_round), adapter(without)) > 1000 * ROUNDING
    promise = read_json(result.directory / "run.json")["recipe"]["promise"]
    assert promise["kind"] == "exact" and "rounding in float32" in promise["text"]


def test_after_more_rounds_it_is_the_others_steps_and_promises_no_more(small_run, two_rounds, tmp_path):
    kept = History(two_rounds)
    renormalized = run(forgetting(small_run, two_rounds, tmp_path / "renormalized")).directory
    expected = {n: kept.start()[n] + t for n, t in kept.sums("client_0").others.items()}
    assert distance(adapter(renormalized), expected) == 0
    plain = run(forgetting(small_run, two_rounds, tmp_path / "plain", renormalize=False)).directory
    expected = {n: adapter(two_rounds)[n] - t for n, t in kept.sums("client_0").own.items()}
    assert distance(adapter(plain), expected) == 0
    assert read_json(plain / "run.json")["recipe"]["promise"]["kind"] == "approximate"
    assert read_json(renormalized / "run.json")["recipe"]["settings"] == {"renormalize": True}


def test_the_others_recover_and_a_resumed_run_ends_in_the_same_bytes(small_run, two_rounds, tmp_path, monkeypatch):
    whole = run(forgetting(small_run, two_rounds, tmp_path / "whole", rounds=2))
    assert [(r.phase, r.clients) for r in whole.records] == [("recover", ("client_1", "client_2"))] * 2
    cut = forgetting(small_run, two_rounds, tmp_path / "cut", rounds=2)
    stopped(monkeypatch, cut, after=1)
    resumed = run(dataclasses.replace(cut, resume=True)).directory
    assert adapter(resumed).digest() == adapter(whole.directory).digest() != adapter(two_rounds).digest()


def stopped(monkeypatch, config, after: int) -> None:
    """Run until ``after`` rounds are done, then fail."""
    fit = Client.fit

    def broken(self, task, adapter, client_id):
        if task.round >= after:
            raise UnfedError("the power went off")
        return fit(self, task, adapter, client_id)

    with monkeypatch.context() as patch:
        patch.setattr(Client, "fit", broken)
        with pytest.raises(UnfedError, match="the power went off"):
            run(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no history", r"recipe=subtract: needs history=sums .* kept nothing; fine-tune with history=sums"),
        ("not linear", r"the fine-tuning's aggregator=FedAdam does not add up the clients' mean updates"),
        ("rows", r"recipe=subtract: removes whole clients, and client_0 would keep other rows"),
    ],
)
def test_it_is_refused_with_the_reason(small_run, summed, finetuned, tmp_path, change, message):
    start = finetuned  # kept nothing, and client_0 has other rows
    if change == "not linear":
        config = dataclasses.replace(summed(1), history=HistoryConfig(), aggregator=AggregatorConfig("FedAdam"))
        start = run(config).directory
    with pytest.raises(ConfigError, match=message):
        run(forgetting(small_run, start, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_what_was_forgotten_since_is_not_brought_back(small_run, two_rounds, tmp_path):
    first = run(forgetting(small_run, two_rounds, tmp_path / "first")).directory
    next_one = ForgetConfig(clients=("client_1",))
    with pytest.raises(ConfigError, match=r"would bring back what was forgotten since"):
        run(dataclasses.replace(forgetting(small_run, first, tmp_path / "second"), forget=next_one))
    config = forgetting(small_run, first, tmp_path / "again", renormalize=False)
    again = run(dataclasses.replace(config, forget=next_one)).directory
    own = History(two_rounds).sums("client_1").own
    assert distance(adapter(again), {n: adapter(first)[n] - t for n, t in own.items()}) == 0


def test_several_clients_go_by_their_own_shares(small_run, two_rounds, tmp_path):
    """Forget what client_0 and client_1 own; client_2 is left."""
    config = forgetting(small_run, two_rounds, tmp_path / "run", renormalize=False)
    forget = DatasetConfig("locuslab/TOFU", "full[:4]+forget01", max_length=96)
    args = dataclasses.replace(config.trainer.method_args, target_client_idx="all")
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, forget=forget, retain=FULL, exclude=forget),
        trainer=dataclasses.replace(config.trainer, method_args=args),
    )
    kept, done = History(two_rounds), adapter(run(config).directory)
    own = [kept.sums(c).own for c in ("client_0", "client_1")]
    assert distance(done, {n: adapter(two_rounds)[n] - own[0][n] - own[1][n] for n in done}) == 0
    with pytest.raises(ConfigError, match=r"renormalize=true takes one client, and client_0, client_1 are to go"):
        run(dataclasses.replace(config, recipe=RecipeConfig("subtract")))


# --- distill ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def well_trained(summed) -> Path:
    """Far enough from its start that there is something to teach."""
    return run(summed(2, num_train_epochs=6)).directory


@pytest.fixture(scope="module")
def distilled(small_run, well_trained, tmp_path_factory):
    """A run of the recipe, and the adapter that its clients took as the teacher. The small rows are alike (most share a
    question's form), so the threshold is high: nothing but the same person's rows would reach it."""
    seen = []

    class Watched(Client):
        def fit(self, task, broadcast, client_id):
            seen.append(self.reference.digest())
            return super().fit(task, broadcast, client_id)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unfed.app.worker.Client", Watched)
        config = forgetting(small_run, well_trained, tmp_path_factory.mktemp("distilled") / "run", **DISTILL)
        return run(config), set(seen)


DISTILL = {"recipe": "distill", "rounds": 1, "distill_rounds": 2, "similarity": 0.9}


def test_the_teacher_is_the_adapter_that_forgets_and_not_the_one_that_it_starts_from(distilled, well_trained):
    result, teachers = distilled
    assert teachers == {adapter(well_trained).digest()} != {result.records[0].adapter_before}


def test_distillation_brings_the_start_nearer_to_the_teacher(distilled):
    records = distilled[0].records
    assert [r.phase for r in records] == ["distill", "distill", "recover"]
    assert all(r.clients == ("client_1", "client_2") for r in records)
    assert 0 < records[1].loss < records[0].loss
    assert read_json(distilled[0].directory / "run.json")["recipe"]["promise"]["kind"] == "approximate"


def test_a_resumed_distillation_ends_in_the_same_bytes(small_run, distilled, well_trained, tmp_path, monkeypatch):
    cut = forgetting(small_run, well_trained, tmp_path / "cut", **DISTILL)
    stopped(monkeypatch, cut, after=1)
    resumed = run(dataclasses.replace(cut, resume=True)).directory
    assert adapter(resumed).digest() == adapter(distilled[0].directory).digest()


def test_rows_near_the_forget_rows_are_left_out_and_counted(small_run, two_rounds, tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"recipe.similarity: every retain row is near the forget rows"):
        run(forgetting(small_run, two_rounds, tmp_path / "none", **DISTILL | {"similarity": 0.001}))
    said = " ".join(capsys.readouterr().err.split())
    assert "proxy rows: 12 of 12 retain rows are near the forget rows" in said
