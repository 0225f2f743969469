"""What a request to forget goes back to may be gone, altered or another one by now; nothing is taken from it unseen."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from unfed.app import sequence as sequences
from unfed.app.runs import run
from unfed.app.source import source_directory
from unfed.base.artifacts import read_json, read_tensors, write_json, write_tensors
from unfed.base.errors import ArtifactError, UnfedError
from unfed.config.schema import DatasetConfig, ForgetConfig, HistoryConfig, MethodConfig, PartitionConfig, RecipeConfig
from unfed.data.datasets import load_rows
from unfed.data.partition import Partition

FULL = DatasetConfig("locuslab/TOFU", "full", max_length=96)


@pytest.fixture(scope="module")
def learning(small_run, small_data, tmp_path_factory):
    """Makes a fine-tuning of three clients of which the last owns the forget set and nothing else."""
    rows = [r["id"] for r in load_rows(FULL, str(small_data))]
    file = tmp_path_factory.mktemp("dealt") / "partition.json"
    cuts = {"client_0": rows[:5], "client_1": rows[5:12], "client_2": rows[12:]}
    Partition({c: tuple(ids) for c, ids in cuts.items()}, "author", 0, "sha256:test").write(file)

    def make(output: Path, **changes):
        method_args = {"num_clients": None, "global_rounds": 2, "target_client_idx": 2}
        config = small_run("finetune", output, method_args=method_args, partition=PartitionConfig(manifest=str(file)))
        return dataclasses.replace(config, history=HistoryConfig(("rounds", "updates", "sums")), **changes)

    return make


@pytest.fixture(scope="module")
def learnt(learning, tmp_path_factory) -> Path:
    return run(learning(tmp_path_factory.mktemp("learnt") / "ft")).directory


@pytest.fixture
def copy(learnt, tmp_path) -> Path:
    """One to break."""
    return Path(shutil.copytree(learnt, tmp_path / "ft"))


@pytest.fixture
def asking(small_run):
    def make(start: Path, output: Path, recipe: str = "local_then_recover", **changes):
        config = small_run(
            "unlearn",
            output,
            model_args={"pretrained_model_name_or_path": str(start)},
            method_args={"target_client_idx": "all", "unlearn_epochs": 1, "global_rounds": 1},
            recipe=RecipeConfig(recipe),
        )
        return dataclasses.replace(config, **changes)

    return make


def test_training_again_is_refused_where_the_start_had_seen_the_rows(small_run, asking, learnt, tmp_path):
    """A second fine-tuning goes on from the first: without the forget rows it would still begin with them."""
    config = small_run(
        "finetune",
        tmp_path / "on",
        model_args={"pretrained_model_name_or_path": str(learnt)},
        method_args={"num_clients": None, "global_rounds": 1, "target_client_idx": 2},
    )
    on = run(dataclasses.replace(config, history=HistoryConfig(("rounds", "updates", "sums")))).directory
    for recipe in ("retrain", "rollback", "federaser"):
        with pytest.raises(
            UnfedError, match=rf"recipe={recipe}: .* went on from a model that had been trained on 6 of"
        ):
            run(asking(on, tmp_path / recipe, recipe))
    taken = run(asking(on, tmp_path / "subtract", "subtract")).directory
    assert read_json(taken / "run.json")["recipe"]["promise"]["kind"] == "approximate", "though of one round alone"


def test_another_training_in_the_same_place_is_not_taken_for_the_first(learning, asking, copy, tmp_path, capsys):
    first = run(asking(copy, tmp_path / "first", forget=ForgetConfig(clients=(2,)))).directory
    again = asking(first, tmp_path / "second", "subtract", forget=ForgetConfig(clients=(1,)))
    assert source_directory(again) == copy
    run(learning(copy, seed=5))
    assert (tmp_path / "ft.1").is_dir() and source_directory(again) is None
    assert "holds another training now" in " ".join(capsys.readouterr().err.split())


def test_rows_that_are_gone_from_the_data_are_missed(asking, copy, small_data, tmp_path):
    shutil.copytree(small_data, tmp_path / "data")
    for name in ("full", "retain99"):
        file = tmp_path / "data" / "tofu" / f"{name}.json"
        file.write_text("".join(file.read_text().splitlines(keepends=True)[2:]))
    config = asking(copy, tmp_path / "run", "retrain")
    config = dataclasses.replace(config, paths=dataclasses.replace(config.paths, data_dir=str(tmp_path / "data")))
    with pytest.raises(UnfedError, match=r"recipe=retrain: 2 rows that .* was fine-tuned on are not in the data any"):
        run(config)


def test_a_lost_manifest_is_not_dealt_anew(asking, copy, tmp_path):
    (copy / "partition.json").unlink()
    with pytest.raises(ArtifactError, match=r"its partition.json, which says whose row is whose, is gone"):
        run(asking(copy, tmp_path / "run"))


def test_a_history_belongs_to_the_adapter_that_it_led_to(asking, copy, tmp_path):
    file = copy / "adapter_model.safetensors"
    write_tensors(file, {n: t * 2 for n, t in read_tensors(file).items()})
    with pytest.raises(ArtifactError, match=r"recipe=subtract: .* is not the adapter that the fine-tuning saved"):
        run(asking(copy, tmp_path / "run", "subtract"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rounds": [{}]}, "its rounds cannot be read"),
        ({"rounds": "none"}, "its rounds cannot be read"),
        ({"mode": "unlearn", "forgotten": [{}]}, "what it says was forgotten cannot be read"),
        ({"mode": "unlearn", "forgotten": "all"}, "what it says was forgotten cannot be read"),
        ({"mode": "unlearn", "forgotten": 3}, "what it says was forgotten cannot be read"),
    ],
)
def test_an_altered_record_is_named(asking, copy, tmp_path, change, said):
    write_json(copy / "run.json", {**read_json(copy / "run.json"), **change})
    with pytest.raises(ArtifactError, match=rf"run\.json: {said}"):
        run(asking(copy, tmp_path / "run", "subtract"))


@pytest.mark.parametrize("recipe", ["subtract", "isolated"])
def test_a_sequence_foresees_what_a_later_request_will_find(learning, asking, learnt, tmp_path, recipe):
    """After another request neither the sums of the fine-tuning nor its shards are about the adapter any more."""
    start = learnt
    if recipe == "isolated":
        config = learning(tmp_path / "shards", recipe=RecipeConfig("isolated"))
        start = run(dataclasses.replace(config, history=HistoryConfig())).directory
    place = tmp_path / "s"
    steps = {
        "one": asking(start, place / "1", forget=ForgetConfig(clients=(2,))),
        "two": asking(start, place / "2", recipe, forget=ForgetConfig(clients=(1,))),
    }
    with pytest.raises(UnfedError, match=rf"request two: recipe={recipe}"):
        sequences.run_sequence(sequences.Plan("Two", "unfed sequence r.yaml", place, steps))
    assert not place.exists()


@pytest.mark.parametrize("first", ["unlearning_adapter", "not_lora", "retrain", "fedosd"])
def test_shares_are_taken_out_of_the_adapter_that_they_are_in_alone(asking, learnt, tmp_path, first):
    """A second adapter makes the rank another one, a negation the sign, training again all of it; steps do not."""
    one = run(asking(learnt, tmp_path / "one", first, forget=ForgetConfig(clients=(2,)))).directory
    config = asking(one, tmp_path / "two", forget=ForgetConfig(clients=(1,)))
    config = dataclasses.replace(config, recipe=RecipeConfig("subtract", {"renormalize": False}))
    if first == "fedosd":
        assert len(run(config).records) == 1
        return
    with pytest.raises(UnfedError, match=rf"recipe=subtract: .* recipe={first} has since made one by other steps"):
        run(config)


def test_a_client_that_leaves_as_a_whole_unlearns_with_pdu(asking, learnt, tmp_path):
    config = asking(learnt, tmp_path / "run", method=MethodConfig("PDU"), forget=ForgetConfig(clients=(2,)))
    assert [(r.phase, r.failures) for r in run(config).records] == [("unlearn", {}), ("recover", {})]
