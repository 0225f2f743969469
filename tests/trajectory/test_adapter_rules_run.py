"""Whole runs under each adapter rule: what is saved is one ordinary adapter that does what the rounds ended with."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from unfed.app import runs
from unfed.app.runs import run
from unfed.base.artifacts import digest_file, read_json, read_tensors
from unfed.base.errors import ConfigError, UnfedError
from unfed.config.schema import AggregatorConfig, HistoryConfig, RecipeConfig
from unfed.models.adapter import restore
from unfed.models.residual import put_residual, residual_of

RULES = ("ffa", "rolora", "flora", "fedex")
EXACT = ("flora", "fedex")
WEIGHTS = "adapter_model.safetensors"


def with_rule(name: str, **args) -> AggregatorConfig:
    return AggregatorConfig("FedAvg", {"adapter": name, **args})


@pytest.fixture(scope="module")
def learned(small_run, tmp_path_factory):
    """Two rounds of fine-tuning under each rule, made when they are first asked for."""
    made = {}

    def get(name: str):
        if name not in made:
            config = small_run("finetune", tmp_path_factory.mktemp(name) / "ft", aggregator=with_rule(name))
            made[name] = run(dataclasses.replace(config, history=HistoryConfig(("rounds",)))).directory
        return made[name]

    return get


def logits(base, adapter=None):
    model = AutoModelForCausalLM.from_pretrained(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    ids = torch.arange(5, 25).view(2, 10)
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.mark.parametrize("name", RULES)
def test_both_trainings_end_in_an_adapter_that_stock_peft_opens(name, learned, small_base, small_run, tmp_path):
    before = digest_file(small_base / "model.safetensors")
    made = learned(name)
    record = read_json(made / "run.json")
    assert all(r["aggregation_error"] < 1e-6 for r in record["rounds"])
    assert read_tensors(made / WEIGHTS).digest() == record["adapter"]
    tuned = logits(small_base, made)
    assert float((tuned - logits(small_base)).abs().max()) > 1e-3
    args = {"pretrained_model_name_or_path": str(made)}
    result = run(small_run("unlearn", tmp_path / "un", model_args=args, aggregator=with_rule(name)))
    note = read_json(result.directory / "run.json")
    assert note["forget_loss_agrees"] is True
    assert float((logits(small_base, result.directory) - tuned).abs().max()) > 1e-4
    assert digest_file(small_base / "model.safetensors") == before


@pytest.mark.parametrize("name", EXACT)
def test_what_is_saved_does_what_adapter_and_residual_do(name, small_run, small_base, tmp_path, monkeypatch):
    """The logits of the model in training, the residual beneath its layers, are those of the saved adapter."""
    seen = {}

    def watched(work, state):
        model = work.loaded.model
        restore(model, state.adapter)
        put_residual(model, state.base_residual)
        assert residual_of(model) is state.base_residual
        with torch.no_grad():
            seen["logits"] = model.eval()(torch.arange(5, 25).view(2, 10)).logits
        return served(work, state)

    served = runs._served
    monkeypatch.setattr(runs, "_served", watched)
    made = run(small_run("finetune", tmp_path / "ft", aggregator=with_rule(name))).directory
    torch.testing.assert_close(logits(small_base, made), seen["logits"], atol=1e-5, rtol=1e-4)


def test_ffa_sends_one_factor_back_and_rolora_takes_turns(learned):
    ffa, rolora = (read_json(learned(n) / "run.json")["rounds"] for n in ("ffa", "rolora"))
    a = sum(t.nbytes for n, t in read_tensors(learned("ffa") / WEIGHTS).items() if "lora_A" in n)
    b = sum(t.nbytes for n, t in read_tensors(learned("ffa") / WEIGHTS).items() if "lora_B" in n)
    assert [r["bytes_up"] for r in ffa] == [3 * b, 3 * b] and ffa[0]["bytes_down"] == 3 * (a + b)
    assert [r["bytes_up"] for r in rolora] == [3 * b, 3 * a]


@pytest.mark.parametrize("name", EXACT)
def test_a_run_cut_between_rounds_ends_in_the_same_bytes(name, learned, small_run, tmp_path, resumed_after_a_round):
    config = small_run("finetune", tmp_path / "ft", aggregator=with_rule(name))
    config = dataclasses.replace(config, history=HistoryConfig(("rounds",)))
    resumed_after_a_round(config)
    assert digest_file(tmp_path / "ft" / WEIGHTS) == digest_file(learned(name) / WEIGHTS)


def test_rolling_back_finds_what_lay_beneath(learned, small_run, tmp_path):
    """The target took part from the first round on, so rollback is retraining; both run, and agree."""
    ends = []
    for recipe in ("rollback", "retrain"):
        args = {"pretrained_model_name_or_path": str(learned("flora"))}
        config = small_run("unlearn", tmp_path / recipe, model_args=args, recipe=RecipeConfig(recipe))
        ends.append(digest_file(run(config).directory / WEIGHTS))
    assert ends[0] == ends[1]


def test_a_recipe_that_works_on_factors_is_refused(learned, small_run, tmp_path):
    args = {"pretrained_model_name_or_path": str(learned("ffa"))}
    recipe = RecipeConfig("unlearning_adapter")
    config = small_run("unlearn", tmp_path / "x", model_args=args, recipe=recipe, aggregator=with_rule("flora"))
    with pytest.raises(ConfigError, match=r"recipe=unlearning_adapter with aggregator.adapter=flora: .*adapter=fedit"):
        run(config)
    summing = dataclasses.replace(
        small_run("finetune", tmp_path / "y", aggregator=with_rule("fedex")), history=HistoryConfig(("sums",))
    )
    with pytest.raises(UnfedError, match=r"history=sums: FedAvg with aggregator\.adapter=fedex does not just add up"):
        run(summing)
