"""Isolated shards: what is served is their exact sum, and forgetting gives what training without the target gives."""

from __future__ import annotations

import dataclasses
import shutil
import stat
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from unfed.aggregation.lora import lora_pairs
from unfed.app.runs import run
from unfed.base.artifacts import digest_file, read_json, read_tensors
from unfed.base.errors import ArtifactError, ConfigError, UnfedError
from unfed.config.checks import consistency
from unfed.config.schema import DatasetConfig, EvalConfig, HistoryConfig, PartitionConfig, RecipeConfig
from unfed.data.datasets import load_rows
from unfed.data.partition import Partition
from unfed.federated.client import Client
from unfed.federated.shards import ShardStore

SEED = 8
FORGET = DatasetConfig("locuslab/TOFU", "forget01", max_length=96)
FULL = DatasetConfig("locuslab/TOFU", "full", max_length=96)


@pytest.fixture(scope="module")
def whole_client(tmp_path_factory, small_data) -> PartitionConfig:
    """Four clients; client_3 owns the forget set and nothing else."""
    rows = [r["id"] for r in load_rows(FULL, str(small_data))]
    file = tmp_path_factory.mktemp("partition") / "partition.json"
    cuts = {"client_0": rows[:5], "client_1": rows[5:8], "client_2": rows[8:12], "client_3": rows[12:]}
    Partition({c: tuple(ids) for c, ids in cuts.items()}, "author", 0, "sha256:test").write(file)
    return PartitionConfig(manifest=str(file))


@pytest.fixture(scope="module")
def isolating(small_run, whole_client):
    """Makes a fine-tuning in shards."""

    def make(output: Path, shards: int = 0, **changes):
        method_args = {"num_clients": None, "global_rounds": 2, "target_client_idx": 3, "fraction_fit": 0.5}
        config = small_run("finetune", output, method_args=method_args, partition=whole_client)
        return dataclasses.replace(config, recipe=RecipeConfig("isolated", {"shards": shards}), seed=SEED, **changes)

    return make


@pytest.fixture(scope="module")
def one_each(isolating, tmp_path_factory) -> Path:
    return run(isolating(tmp_path_factory.mktemp("one_each") / "ft")).directory


@pytest.fixture(scope="module")
def in_pairs(isolating, tmp_path_factory) -> Path:
    """Shard 0: clients 0 and 2. Shard 1: clients 1 and 3."""
    result = run(isolating(tmp_path_factory.mktemp("in_pairs") / "ft", 2))
    assert any("client_3" in r.clients for r in result.records), "half of a shard a round: the target among them"
    return result.directory


def without(config):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, exclude=FORGET))


def forgetting(small_run, start: Path, output: Path, forget: DatasetConfig = FORGET, recipe: str = "isolated"):
    config = small_run(
        "unlearn",
        output,
        model_args={"pretrained_model_name_or_path": str(start)},
        args={"learning_rate": 1e-4},
        method_args={"target_client_idx": "all"},
        recipe=RecipeConfig(recipe),
    )
    data = dataclasses.replace(config.data, forget=forget, retain=FULL, exclude=forget)
    return dataclasses.replace(config, data=data)


def adapter(directory: Path):
    return read_tensors(directory / "adapter_model.safetensors")


def served(directory: Path) -> dict[str, str]:
    """Digests of what a directory serves, and of its shards."""
    files = [directory / "adapter_model.safetensors", directory / "adapter_config.json"]
    files += sorted((directory / "shards").rglob("*.*"))
    return {str(f.relative_to(directory)): digest_file(f) for f in files}


def test_stock_peft_opens_the_exact_sum_of_the_shards(one_each, small_base):
    """Ranks add up and the scaling stays 8 / 4. A module's update is sum_k p_k (8/4) B_k A_k, weighted by rows."""
    store = ShardStore(one_each)
    shards = store.shards()
    assert [list(s.rows) for s in shards] == [["client_0"], ["client_1"], ["client_2"], ["client_3"]]
    parts = [(n / 18, store.adapter(s)) for n, s in zip((5, 3, 4, 6), shards, strict=True)]
    told = read_json(one_each / "shards" / "shards.json")["shards"]
    assert [s["weight"] for s in told.values()] == [p for p, _ in parts]
    config = read_json(one_each / "adapter_config.json")
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (16, 32, {})
    opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(small_base), one_each)
    modules = {n: m for n, m in opened.named_modules() if "default" in getattr(m, "lora_A", {})}
    pairs = lora_pairs(parts[0][1])
    assert set(modules) == set(pairs)
    for name, module in modules.items():
        a, b = pairs[name]
        expected = sum(p * 2 * s[b].double() @ s[a].double() for p, s in parts)
        assert torch.allclose(module.get_delta_weight("default").double(), expected, atol=1e-6)
        assert expected.abs().max() > 1e-3


def test_what_is_kept_is_for_its_owner_alone(one_each):
    kept = one_each / "shards"
    files = [f for f in kept.rglob("*") if f.is_file()]
    assert len(files) == 9 and all(stat.S_IMODE(f.stat().st_mode) == 0o600 for f in files)
    folders = (kept, *(f.parent for f in files), one_each / "checkpoints")
    assert all(stat.S_IMODE(d.stat().st_mode) == 0o700 for d in folders)


def test_a_client_with_a_shard_of_its_own_goes_without_a_step(small_run, isolating, one_each, tmp_path, monkeypatch):
    plain = run(without(isolating(tmp_path / "plain"))).directory
    with monkeypatch.context() as patch:
        patch.setattr(Client, "fit", lambda *_: pytest.fail("a client was asked to train"))
        result = run(forgetting(small_run, one_each, tmp_path / "run"))
    assert result.records == () and served(result.directory) == served(plain)
    assert adapter(result.directory).digest() != adapter(one_each).digest()
    recipe = read_json(result.directory / "run.json")["recipe"]
    assert recipe["promise"]["kind"] == "exact" and recipe["cost"]["client_steps"] == 0


def test_what_is_scored_after_the_run_is_what_was_saved(small_run, one_each, small_data, tmp_path):
    shutil.copytree(small_data, tmp_path / "data")
    shutil.copy(tmp_path / "data" / "tofu" / "forget01.json", tmp_path / "data" / "tofu" / "forget01_perturbed.json")
    config = forgetting(small_run, one_each, tmp_path / "run")
    suite = EvalConfig(forget_split="forget01", metrics=("forget_Q_A_Prob",), max_length=96)
    config = dataclasses.replace(
        config, eval=suite, paths=dataclasses.replace(config.paths, data_dir=str(tmp_path / "data"))
    )
    result = run(config)
    args = dataclasses.replace(config.model.model_args, pretrained_model_name_or_path=str(result.directory))
    again = dataclasses.replace(
        config,
        mode="eval",
        model=dataclasses.replace(config.model, model_args=args),
        paths=dataclasses.replace(config.paths, output_dir=str(tmp_path / "eval")),
        **dict.fromkeys(("trainer", "method", "aggregator", "recipe")),
    )
    assert 0 < result.summary["forget_Q_A_Prob"] == run(again).summary["forget_Q_A_Prob"]


def test_a_shard_that_keeps_clients_is_trained_again_and_no_other(small_run, isolating, in_pairs, tmp_path):
    plain = run(without(isolating(tmp_path / "plain", 2))).directory
    result = run(forgetting(small_run, in_pairs, tmp_path / "run"))
    assert [(r.round, r.phase, r.clients) for r in result.records] == [
        (0, "shard_00001", ("client_1",)),
        (1, "shard_00001", ("client_1",)),
    ]
    assert served(result.directory) == served(plain)
    kept = Path("shards") / "shard_00000" / "adapter.safetensors"
    assert digest_file(in_pairs / kept) == digest_file(result.directory / kept)
    changed = Path("shards") / "shard_00001" / "adapter.safetensors"
    assert digest_file(in_pairs / changed) != digest_file(result.directory / changed)


def test_a_second_request_does_not_bring_back_the_first(small_run, isolating, in_pairs, tmp_path):
    """First two rows of client_0, then the forget set: as if both had been left out from the start."""
    few = dataclasses.replace(FORGET, name="full[:2]")
    first = run(forgetting(small_run, in_pairs, tmp_path / "first", few)).directory
    second = run(forgetting(small_run, first, tmp_path / "second")).directory
    both = dataclasses.replace(FORGET, name="full[:2]+forget01")
    config = isolating(tmp_path / "plain", 2)
    plain = run(dataclasses.replace(config, data=dataclasses.replace(config.data, exclude=both))).directory
    assert served(second) == served(plain)


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_fine_tuning_that_was_cut_short_goes_on_within_its_shard(isolating, in_pairs, tmp_path, monkeypatch, after):
    """Two shards of two rounds: cut in the first, between the two, and in the second."""
    config, fit, done = isolating(tmp_path / "cut", 2), Client.fit, set()

    def broken(self, task, given, client_id):
        done.add((task.phase.name, task.round))
        if len(done) > after:
            raise UnfedError("the power went off")
        return fit(self, task, given, client_id)

    with monkeypatch.context() as patch:
        patch.setattr(Client, "fit", broken)
        with pytest.raises(UnfedError, match="the power went off"):
            run(config)
    resumed = run(dataclasses.replace(config, resume=True))
    assert served(resumed.directory) == served(in_pairs)
    assert [(r.round, r.phase) for r in resumed.records] == [
        (0, "shard_00000"), (1, "shard_00000"), (2, "shard_00001"), (3, "shard_00001")
    ]  # fmt: skip


def test_it_is_refused_with_the_reason(small_run, finetuned, in_pairs, tmp_path, isolating):
    with pytest.raises(ConfigError, match=r"has no shards: it was not made with recipe=isolated; use recipe=retrain"):
        run(forgetting(small_run, finetuned, tmp_path / "run"))
    with pytest.raises(UnfedError, match=r"recipe=retrain: .* was fine-tuned in isolated shards; use recipe=isolated"):
        run(forgetting(small_run, in_pairs, tmp_path / "run", recipe="retrain"))
    with pytest.raises(UnfedError, match=r"recipe.shards=9: there are 4 clients; use 4 or less"):
        run(isolating(tmp_path / "many", 9))
    dealt_anew = RecipeConfig("isolated", {"shards": 2})
    with pytest.raises(ConfigError, match=r"recipe.shards=2: unlearning has the shards of the fine-tuning"):
        run(dataclasses.replace(forgetting(small_run, in_pairs, tmp_path / "run"), recipe=dealt_anew))
    assert not (tmp_path / "run").exists()


def test_settings_that_do_not_go_with_shards_are_found_before_anything_is_opened(isolating, tmp_path):
    config = isolating(tmp_path / "run", history=HistoryConfig(("sums",)))
    args = config.model.model_args
    lora = dataclasses.replace(args.lora_config, bias="all")
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, model_args=dataclasses.replace(args, lora_config=lora))
    )
    found = "; ".join(consistency(config))
    assert "history.keep=sums: recipe=isolated keeps its shards" in found
    assert "lora_config.bias=all: recipe=isolated puts LoRA factors side by side" in found
    other = dataclasses.replace(config, recipe=RecipeConfig("retrain"), history=HistoryConfig())
    assert any("fine-tuning forgets nothing; leave it out, or take recipe=isolated" in p for p in consistency(other))


def test_an_altered_shard_is_not_served(small_run, one_each, tmp_path):
    shutil.copytree(one_each, tmp_path / "ft")
    with (tmp_path / "ft" / "shards" / "shard_00000" / "adapter.safetensors").open("ab") as f:
        f.write(b"x")
    with pytest.raises(ArtifactError, match=r"shard_00000/adapter.safetensors is missing or was altered"):
        run(forgetting(small_run, tmp_path / "ft", tmp_path / "run"))
