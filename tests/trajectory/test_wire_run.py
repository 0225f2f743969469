"""Whole runs over a wire: what is counted, kept, gone on with, replayed, and refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from unfed.app.runs import run
from unfed.base.artifacts import digest_file, read_json, read_tensors
from unfed.config.checks import consistency
from unfed.config.schema import (
    DatasetConfig,
    MethodArgs,
    PartitionConfig,
    RecipeConfig,
    TrainerConfig,
    WireConfig,
)
from unfed.federated.wired import Wired

FORGET = DatasetConfig("locuslab/TOFU", "forget01", max_length=96)
TOPK = WireConfig("topk", {"fraction": 0.1, "down": "bfloat16"})
ROUNDS = {"num_clients": 3, "global_rounds": 4, "fraction_fit": 0.67}


def digest(directory: Path) -> str:
    return read_tensors(directory / "adapter_model.safetensors").digest()


@pytest.fixture(scope="module")
def over_topk(tmp_path_factory, small_run) -> Path:
    config = small_run("finetune", tmp_path_factory.mktemp("topk") / "ft", method_args=ROUNDS, wire=TOPK)
    return run(config).directory


def test_bytes_are_those_of_the_messages_and_memory_is_private(over_topk, finetuned):
    record = read_json(over_topk / "run.json")
    plain = read_json(finetuned / "run.json")["rounds"][0]
    whole = plain["bytes_up"] / len(plain["clients"])
    for found in record["rounds"]:
        each = len(found["clients"])
        # A tenth of the values at 6 bytes, a header; half of the bytes down, headers with names.
        assert 0.15 * whole < found["bytes_up"] / each < 0.15 * whole + 400
        assert 0.5 * whole < found["bytes_down"] / each < 0.5 * whole + 2500
        assert all(0 < m["wire_lost"] < 1 for m in found["metrics"].values())
    memory = sorted((over_topk / "clients").rglob("*.safetensors"))
    assert memory and all(f.stat().st_mode & 0o777 == 0o600 for f in memory)
    assert {f.parent.name for f in memory} == {"wire"}


def test_a_run_that_was_cut_short_goes_on_to_the_same_bytes(small_run, over_topk, tmp_path, monkeypatch):
    config = small_run("finetune", tmp_path / "ft", method_args=ROUNDS, wire=TOPK)
    fits, fit = [], Wired.__call__

    def failing(self, task, broadcast, client_id):
        fits.append((task.round, client_id))
        if len(fits) == 6:  # the second client of the third round: the first has written its memory of it
            raise KeyboardInterrupt
        return fit(self, task, broadcast, client_id)

    monkeypatch.setattr(Wired, "__call__", failing)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    assert fits[-1][0] == 2 == fits[-2][0]
    result = run(dataclasses.replace(config, resume=True))
    assert digest(result.directory) == digest(over_topk)
    for file in (over_topk / "clients").rglob("*.safetensors"):
        assert digest_file(result.directory / file.relative_to(over_topk)) == digest_file(file)


def test_retraining_replays_the_wire_and_stays_exact(small_run, over_topk, tmp_path):
    """The unlearning run names no wire; what is replayed has that of the fine-tuning."""
    original = small_run("finetune", over_topk, method_args=ROUNDS, wire=TOPK)
    without = dataclasses.replace(
        original,
        data=dataclasses.replace(original.data, exclude=FORGET),
        paths=dataclasses.replace(original.paths, output_dir=str(tmp_path / "without")),
        partition=PartitionConfig(manifest=str(over_topk / "partition.json")),
    )
    plain = run(without).directory
    again = run(unlearning(small_run, over_topk, tmp_path / "again", "retrain")).directory
    assert digest(again) == digest(plain) != digest(over_topk)
    assert read_json(again / "run.json")["recipe"]["promise"]["kind"] == "exact"


def unlearning(small_run, start: Path, output: Path, recipe: str, **rest):
    model = {"pretrained_model_name_or_path": str(start)}
    return small_run("unlearn", output, model_args=model, recipe=RecipeConfig(recipe), **rest)


@pytest.mark.parametrize("recipe", ["not_lora", "local_then_recover"])
def test_recipes_get_what_was_decoded(small_run, finetuned, tmp_path, recipe):
    """NoT has a rule of its own, local unlearning is adopted: both take the bytes as they came."""
    rest = {"method_args": {"global_rounds": 1, "unlearn_epochs": 1}, "wire": WireConfig("int8")}
    result = run(unlearning(small_run, finetuned, tmp_path / "run", recipe, **rest))
    plain = read_json(finetuned / "run.json")["rounds"][0]
    whole = plain["bytes_up"] // len(plain["clients"])
    for found in result.records:
        assert whole / 4 < found.bytes_up / len(found.metrics) < 0.3 * whole
        assert found.bytes_down == whole * len(found.metrics)
        assert all(0 < m["wire_lost"] < 0.1 for m in found.metrics.values())


def test_one_place_sends_nothing(small_run, tmp_path):
    config = small_run("unlearn", tmp_path / "x", wire=WireConfig("int8"))
    config = dataclasses.replace(config, trainer=TrainerConfig("NPO", {}, MethodArgs()), aggregator=None, recipe=None)
    assert [p for p in consistency(config) if p.startswith("wire=int8")] == [
        "wire=int8: trainer=NPO works in one place and sends nothing; leave it out"
    ]
    ok = dataclasses.replace(config, wire=WireConfig("float32"))
    assert not [p for p in consistency(ok) if p.startswith("wire")]
