"""Recipes that promise exactness give, to the byte, what training without the forget rows gives."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from unfed.app.runs import run
from unfed.base.artifacts import read_json, read_tensors
from unfed.base.errors import ConfigError
from unfed.config.schema import DatasetConfig, HistoryConfig, PartitionConfig, RecipeConfig
from unfed.federated.history import History

FORGET = DatasetConfig("locuslab/TOFU", "forget01", max_length=96)


def digest(directory: Path) -> str:
    return read_tensors(directory / "adapter_model.safetensors").digest()


def without(config):
    """The same fine-tuning without the forget rows, with the partition that it made with them."""
    manifest = str(Path(config.paths.output_dir) / "partition.json")
    place = dataclasses.replace(config.paths, output_dir=config.paths.output_dir + "_without")
    data = dataclasses.replace(config.data, exclude=FORGET)
    return dataclasses.replace(config, data=data, paths=place, partition=PartitionConfig(manifest=manifest))


@pytest.fixture(scope="module")
def clean_start(tmp_path_factory, small_run) -> Path:
    """Two of four clients a round, with all rounds kept; the target first takes part in a later round."""
    args = {"num_clients": 4, "fraction_fit": 0.5, "global_rounds": 4, "target_client_idx": 3}
    config = small_run("finetune", tmp_path_factory.mktemp("clean") / "ft", method_args=args, aggregator="FedAdam")
    result = run(dataclasses.replace(config, history=HistoryConfig(("rounds",)), seed=CLEAN_SEED))
    assert "client_3" not in result.records[0].clients and any("client_3" in r.clients for r in result.records)
    return result.directory


CLEAN_SEED = 4


def forgetting(small_run, start: Path, output: Path, recipe: str, **method_args):
    """An unlearning run whose own settings differ from the fine-tuning's in everything that a replay must not take."""
    config = small_run(
        "unlearn",
        output,
        model_args={"pretrained_model_name_or_path": str(start)},
        args={"learning_rate": 1e-4, "per_device_train_batch_size": 2},
        method_args={"global_rounds": 1, **method_args},
        recipe=RecipeConfig(recipe),
    )
    return dataclasses.replace(config, seed=9)


def test_retraining_is_training_without_the_rows(small_run, finetuned, tmp_path):
    fresh = run(small_run("finetune", tmp_path / "ft")).directory
    plain = run(without(small_run("finetune", tmp_path / "ft"))).directory
    again = run(forgetting(small_run, fresh, tmp_path / "again", "retrain")).directory
    assert digest(again) == digest(plain) != digest(fresh)
    record = read_json(again / "run.json")
    assert record["recipe"]["promise"]["kind"] == "exact" and record["source"] == str(fresh)
    assert record["recipe"]["targets"] == ["client_0"] and len(record["rounds"]) == 2


def test_rollback_goes_on_from_the_last_round_that_the_target_had_no_part_in(small_run, clean_start, tmp_path):
    config = forgetting(small_run, clean_start, tmp_path / "back", "rollback", target_client_idx=3)
    result = run(config)
    kept = History(clean_start)
    rounds = read_json(clean_start / "run.json")["rounds"]
    first = next(r["round"] for r in rounds if "client_3" in r["clients"])
    assert first >= 1 and [r.round for r in result.records] == list(range(first, 4))
    assert result.records[0].adapter_before == kept.state(first).adapter.digest()
    assert digest(result.directory) != digest(clean_start)
    whole = run(forgetting(small_run, clean_start, tmp_path / "whole", "retrain", target_client_idx=3))
    assert [r.round for r in whole.records] == [0, 1, 2, 3]


def test_rollback_of_a_client_that_was_there_from_the_start_is_retraining(small_run, tmp_path):
    kept = dataclasses.replace(small_run("finetune", tmp_path / "ft"), history=HistoryConfig(("rounds",)))
    start = run(kept).directory
    back = run(forgetting(small_run, start, tmp_path / "back", "rollback")).directory
    again = run(forgetting(small_run, start, tmp_path / "again", "retrain")).directory
    assert digest(back) == digest(again)


def test_rollback_without_its_history_is_refused_with_the_way_out(small_run, finetuned, tmp_path):
    with pytest.raises(ConfigError, match=r"recipe=rollback: needs history=rounds .* fine-tune with history=rounds"):
        run(forgetting(small_run, finetuned, tmp_path / "run", "rollback"))
    assert not (tmp_path / "run").exists()


def test_an_adapter_from_elsewhere_cannot_be_trained_again(small_run, finetuned, tmp_path):
    shutil.copytree(finetuned, tmp_path / "bare")
    (tmp_path / "bare" / "run.json").unlink()
    with pytest.raises(ConfigError, match=r"recipe=retrain: needs the run directory of the fine-tuning"):
        run(forgetting(small_run, tmp_path / "bare", tmp_path / "run", "retrain"))


def test_keeping_history_changes_no_byte_and_a_resumed_run_keeps_the_same(small_run, finetuned, tmp_path):
    config = small_run("finetune", tmp_path / "ft")
    kept = run(dataclasses.replace(config, history=HistoryConfig(("rounds", "updates", "sums")))).directory
    assert digest(kept) == digest(finetuned)
    assert History(kept).rounds() == [0, 1, 2] and History(kept).update_rounds() == [0, 1]
