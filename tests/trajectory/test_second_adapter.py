"""Recipes whose work is a second adapter: what they save, that it can be taken off, and that a killed run goes on."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from unfed.app.plan import plan
from unfed.app.runs import run
from unfed.app.second import SECOND_DIR, revert
from unfed.base.artifacts import digest_file, read_json, read_tensors
from unfed.base.errors import ArtifactError, ConfigError, UnfedError
from unfed.cli.main import main
from unfed.config.schema import EvalConfig, ForgetConfig, PartitionConfig, RecipeConfig
from unfed.federated.client import Client

ROUNDING = 2e-6
"""Of logits near 1 in float32: other orders of adding up give this much at most here."""
ALL = ("unlearning_adapter", "task_arithmetic")


@pytest.fixture(scope="module")
def forgetting(small_run, finetuned):
    """Configuration of an unlearning run from the fine-tuned adapter with a recipe and its hyperparameters."""

    def make(output: Path, recipe: str, start: Path = finetuned, **given):
        settings = {"r": 3, "lora_alpha": 5, **given.pop("settings", {})}
        return small_run(
            "unlearn",
            output,
            model_args={"pretrained_model_name_or_path": str(start), **given.pop("model_args", {})},
            method_args={"global_rounds": 2, "unlearn_epochs": 4, **given.pop("method_args", {})},
            recipe=RecipeConfig(recipe, settings),
            **given,
        )

    return make


@pytest.fixture(scope="module")
def done(forgetting, tmp_path_factory):
    """The directory of a finished run of each recipe, made once."""
    made: dict[str, Path] = {}

    def get(recipe: str) -> Path:
        if recipe not in made:
            made[recipe] = run(forgetting(tmp_path_factory.mktemp(recipe) / "run", recipe)).directory
        return made[recipe]

    return get


def opened(base: Path, *adapters: Path) -> PeftModel:
    """The base with these adapters active, by stock PEFT."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapters[0], adapter_name="a0")
    for number, place in enumerate(adapters[1:], 1):
        model.load_adapter(place, adapter_name=f"a{number}")
    model.base_model.set_adapter([f"a{number}" for number in range(len(adapters))])
    return model.eval()


@torch.no_grad()
def logits(model: PeftModel) -> torch.Tensor:
    ids = torch.arange(5, 61).reshape(4, 14)
    return model(input_ids=ids).logits


def forget_losses(directory: Path) -> tuple[float, float]:
    return read_json(directory / "run.json")["forget_loss_at_start"], read_json(directory / "unfed.json")[
        "forget_loss"
    ]["value"]


@pytest.mark.parametrize("recipe", ALL)
def test_it_forgets_and_what_is_saved_is_base_and_both_adapters(done, finetuned, small_base, recipe):
    directory = done(recipe)
    before, after = forget_losses(directory)
    assert after > before + 0.2
    old, stack = logits(opened(small_base, finetuned)), logits(opened(small_base, directory))
    both = logits(opened(small_base, finetuned, directory / SECOND_DIR))
    assert (stack - old).abs().max() > 1e-2
    torch.testing.assert_close(stack, both, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("recipe", ALL)
def test_taken_off_the_old_logits_are_back_bit_for_bit(done, finetuned, small_base, tmp_path, recipe):
    """By PEFT's own switch, and by the adapter that is cut out of the stack, which is the old file byte for byte."""
    directory, old = done(recipe), logits(opened(small_base, finetuned))
    model = opened(small_base, finetuned, directory / SECOND_DIR)
    assert not torch.equal(logits(model), old)
    model.set_adapter("a0")
    assert torch.equal(logits(model), old)
    assert main(["revert", str(directory), "--output", str(tmp_path / "back")]) == 0
    for file in ("adapter_model.safetensors", "adapter_config.json", "partition.json", "tokenizer.json"):
        assert digest_file(tmp_path / "back" / file) == digest_file(finetuned / file)
    assert torch.equal(logits(opened(small_base, tmp_path / "back")), old)


@pytest.mark.parametrize("recipe", ALL)
def test_the_record_names_both_adapters_and_counts_the_bytes_of_the_second(done, finetuned, recipe):
    directory = done(recipe)
    record = read_json(directory / "run.json")
    second = read_tensors(directory / SECOND_DIR / "adapter_model.safetensors")
    stack = read_tensors(directory / "adapter_model.safetensors")
    learned = read_tensors(finetuned / "adapter_model.safetensors")
    told = record["second_adapter"]
    assert told["learned"] == {"path": str(finetuned), "digest": learned.digest()}
    assert (told["second"], told["stack"]) == (second.digest(), stack.digest()) and record["adapter"] == stack.digest()
    assert record["rounds"][-1]["adapter_after"] == second.digest()
    assert second.nbytes < learned.nbytes < stack.nbytes == second.nbytes + learned.nbytes
    assert [r["bytes_down"] for r in record["rounds"]] == [second.nbytes * len(r["clients"]) for r in record["rounds"]]
    assert record["recipe"]["cost"]["nbytes"] == sum(r["bytes_down"] + r["bytes_up"] for r in record["rounds"])
    assert digest_file(directory / "partition.json") == digest_file(finetuned / "partition.json")


def test_the_plan_counts_the_second_adapter(forgetting, done, tmp_path):
    second = read_tensors(done("unlearning_adapter") / SECOND_DIR / "adapter_model.safetensors")
    found = plan(forgetting(tmp_path / "run", "unlearning_adapter"))
    assert (found.adapter_bytes, found.trainable_parameters, found.rounds) == (second.nbytes, second.numel, 3)
    half = plan(forgetting(tmp_path / "run", "unlearning_adapter", settings={"layers": 0.5, "forget": "none"}))
    assert half.adapter_bytes == second.nbytes / 2 and half.rounds == 2


def cut_in_round(monkeypatch, number: int) -> None:
    fit = Client.fit

    def cut(self, task, adapter, client_id):
        if task.round == number:
            raise KeyboardInterrupt
        return fit(self, task, adapter, client_id)

    monkeypatch.setattr(Client, "fit", cut)


@pytest.mark.parametrize("recipe", ALL)
@pytest.mark.parametrize("round_", [0, 2])
def test_a_killed_run_goes_on_to_the_same_bytes(forgetting, done, tmp_path, monkeypatch, recipe, round_):
    cut_in_round(monkeypatch, round_)
    with pytest.raises(KeyboardInterrupt):
        run(forgetting(tmp_path / "run", recipe))
    monkeypatch.undo()
    run(forgetting(tmp_path / "run", recipe, resume=True))
    for name in ("adapter_model.safetensors", "adapter_config.json", "unfed.json"):
        assert digest_file(tmp_path / "run" / name) == digest_file(done(recipe) / name)
        if name != "unfed.json":
            assert digest_file(tmp_path / "run" / SECOND_DIR / name) == digest_file(done(recipe) / SECOND_DIR / name)


def test_evaluation_between_and_after_the_rounds_changes_no_byte(forgetting, done, small_data, tmp_path, monkeypatch):
    """The base beneath both is looked at in every round (priv's reference model): the learned one must stay frozen."""
    from unfed.evaluation import runner

    seen = []
    evaluate = runner.evaluate

    def with_reference(model, *args, **kwargs):
        reference = runner._base_of(model)
        assert reference is not None
        with reference() as base:
            seen.append(base)
        return evaluate(model, *args, **kwargs)

    for module in ("unfed.app.during", "unfed.app.evaluate"):
        monkeypatch.setattr(f"{module}.evaluate", with_reference)
    shutil.copytree(small_data, tmp_path / "data")
    tofu = tmp_path / "data" / "tofu"
    shutil.copyfile(tofu / "forget01.json", tofu / "forget01_perturbed.json")
    suite = EvalConfig(metrics=("forget_Q_A_Prob",), round_metrics=("forget_Q_A_Prob",), forget_split="forget01")
    config = forgetting(tmp_path / "run", "unlearning_adapter", args={"eval_strategy": "round"}, eval=suite)
    config = dataclasses.replace(config, paths=dataclasses.replace(config.paths, data_dir=str(tmp_path / "data")))
    result = run(config)
    assert digest_file(tmp_path / "run" / "adapter_model.safetensors") == digest_file(
        done("unlearning_adapter") / "adapter_model.safetensors"
    )
    record = read_json(result.directory / "run.json")
    between = [e["scores"]["forget_Q_A_Prob"] for e in record["evaluations"]]
    assert len(between) == 4 and len(seen) == 5 and between[1] < between[0]
    assert result.summary["forget_Q_A_Prob"] == pytest.approx(between[-1], abs=1e-6)
    scored = read_json(result.directory / "TOFU_EVAL.json")
    assert record["adapter"] in json.dumps(scored)
    later = dataclasses.replace(
        config,
        mode="eval",
        trainer=None,
        method=None,
        recipe=None,
        aggregator=None,
        paths=dataclasses.replace(config.paths, output_dir=str(tmp_path / "eval")),
        model=dataclasses.replace(
            config.model,
            model_args=dataclasses.replace(
                config.model.model_args, pretrained_model_name_or_path=str(result.directory)
            ),
        ),
    )
    assert run(later).summary == result.summary


def test_a_further_run_goes_on_from_the_stack(forgetting, done, small_base, tmp_path):
    """It is an ordinary adapter: of another recipe, and of a second adapter again."""
    first, others = done("unlearning_adapter"), ForgetConfig(clients=("client_1",))
    config = dataclasses.replace(forgetting(tmp_path / "plain", "unlearning_adapter", first), forget=others)
    plain = run(dataclasses.replace(config, recipe=RecipeConfig("local_then_recover")))
    assert plain.records[0].adapter_before == read_tensors(first / "adapter_model.safetensors").digest()
    layers = {"layers": "layers\\.1\\."}
    config = forgetting(tmp_path / "again", "unlearning_adapter", first, settings=layers)
    again = run(dataclasses.replace(config, forget=others))
    config = read_json(again.directory / "adapter_config.json")
    assert config["r"] == 7 and set(config["rank_pattern"].values()) == {10} and len(config["rank_pattern"]) == 3
    both = logits(opened(small_base, first, again.directory / SECOND_DIR))
    torch.testing.assert_close(logits(opened(small_base, again.directory)), both, atol=ROUNDING, rtol=0)
    revert(again.directory, tmp_path / "back")
    assert digest_file(tmp_path / "back" / "adapter_model.safetensors") == digest_file(
        first / "adapter_model.safetensors"
    )
    gone = set(read_json(first / "run.json")["forgotten"][0]["ids"])
    asked = ForgetConfig(clients=("client_2",))
    after = run(
        dataclasses.replace(
            forgetting(tmp_path / "after", "not_lora", tmp_path / "back"), forget=asked, recipe=RecipeConfig("not_lora")
        )
    )
    told = read_json(after.directory / "run.json")
    assert [gone, set(told["forgotten"][1]["ids"])] == [set(r["ids"]) for r in told["forgotten"]]
    assert set(told["forgotten"][1]["clients"]) == {"client_2"}, "the request that was reverted does not count"


def test_several_targets_and_overwriting_alone(small_run, forgetting, tmp_path):
    start = run(small_run("finetune", tmp_path / "ft", partition=PartitionConfig(scheme="iid"))).directory
    target = {"method_args": {"target_client_idx": "all"}}
    several = run(forgetting(tmp_path / "several", "unlearning_adapter", start, **target))
    assert several.records[0].phase == "unlearn" and len(several.records[0].clients) > 1
    before, after = forget_losses(several.directory)
    assert after > before
    alone = run(forgetting(tmp_path / "alone", "unlearning_adapter", start, settings={"forget": "none"}, **target))
    assert [r.phase for r in alone.records] == ["overwrite", "overwrite"]


REFUSED = {
    "all parameters": {"use_lora": False},
    "a model without one": {"pretrained_model_name_or_path": "BASE"},
}


@pytest.mark.parametrize("recipe", ALL)
@pytest.mark.parametrize("why", REFUSED)
def test_without_a_learned_adapter_it_is_refused_before_a_model_is_opened(
    forgetting, small_base, tmp_path, monkeypatch, recipe, why
):
    monkeypatch.setattr("unfed.app.runs.load_model", None)
    args = {k: str(small_base) if v == "BASE" else v for k, v in REFUSED[why].items()}
    with pytest.raises(ConfigError, match=rf"recipe={recipe}: works on a learned LoRA adapter.*{why}.*use recipe="):
        run(forgetting(tmp_path / "run", recipe, model_args=args))
    assert not (tmp_path / "run").exists()


def test_an_adapter_that_is_more_than_lora_is_refused(forgetting, finetuned, tmp_path):
    shutil.copytree(finetuned, tmp_path / "more")
    config = read_json(tmp_path / "more" / "adapter_config.json")
    (tmp_path / "more" / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["lm_head"]}))
    with pytest.raises(ConfigError, match=r"works on plain LoRA.*it sets modules_to_save; use recipe="):
        run(forgetting(tmp_path / "run", "unlearning_adapter", tmp_path / "more"))


def test_a_run_that_is_not_there_is_told_apart_from_one_without_a_second_adapter(tmp_path):
    with pytest.raises(UnfedError, match="there is no such directory"):
        revert(tmp_path / "nope", tmp_path / "out")


def test_there_is_nothing_to_revert_in_another_run_nor_in_an_altered_one(done, finetuned, tmp_path, capsys):
    assert main(["revert", str(finetuned)]) == 2
    assert "no run of recipe=unlearning_adapter" in capsys.readouterr().err
    shutil.copytree(done("unlearning_adapter"), tmp_path / "run")
    with pytest.raises(UnfedError, match="exists already"):
        revert(tmp_path / "run", finetuned)
    shutil.copyfile(finetuned / "adapter_model.safetensors", tmp_path / "run" / "adapter_model.safetensors")
    with pytest.raises(ArtifactError, match="is not the stack"):
        revert(tmp_path / "run", tmp_path / "back")
    assert not (tmp_path / "back").exists()
