"""Recipes that turn signs: what they compute is what dense matrices give, and they run, forget and resume."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unfed.aggregation.lora import lora_pairs
from unfed.app.runs import run
from unfed.app.second import SECOND_DIR
from unfed.base.artifacts import digest_file, read_json, read_tensors
from unfed.base.errors import ConfigError
from unfed.base.types import AdapterState, ClientUpdate
from unfed.config.schema import MethodConfig, PartitionConfig, RecipeConfig
from unfed.federated.client import Client
from unfed.unlearning.base import Situation, unmet
from unfed.unlearning.negation import multiplied
from unfed.unlearning.registry import build_recipe
from unfed.unlearning.task_arithmetic import Negate


def dense(adapter: AdapterState, scaling: float) -> dict[str, torch.Tensor]:
    """``s B A`` of each module in float64."""
    return {m: scaling * adapter[b].double() @ adapter[a].double() for m, (a, b) in lora_pairs(adapter).items()}


def saved(directory: Path) -> tuple[AdapterState, float]:
    """An adapter of one shape in all modules, and its scaling."""
    config = read_json(directory / "adapter_config.json")
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    return read_tensors(directory / "adapter_model.safetensors"), config["lora_alpha"] / config["r"]


@given(st.integers(1, 4), st.floats(0.01, 3), st.integers(0, 1000))
def test_one_factor_turns_the_update_and_both_leave_it(r, by, seed):
    draw = torch.Generator().manual_seed(seed)
    tensors = {f"{m}.lora_A.weight": torch.randn(r, 5, generator=draw) for m in "pq"}
    adapter = AdapterState(tensors | {f"{m}.lora_B.weight": torch.randn(3, r, generator=draw) for m in "pq"})
    before, one = dense(adapter, 2.0), multiplied(adapter, -1.0, ["p"])
    assert torch.equal(dense(one, 2.0)["p"], -before["p"]) and torch.equal(dense(one, 2.0)["q"], before["q"])
    both = dense(multiplied(one, -1.0, ["p"], "A"), 2.0)
    assert all(torch.equal(both[m], before[m]) for m in before)
    scaled = dense(multiplied(adapter, by), 2.0)
    torch.testing.assert_close(scaled["p"], by * before["p"], rtol=1e-6, atol=1e-6)


def unlearning(small_run, start: Path, output: Path, recipe: str, *, settings=None, **method_args):
    return small_run(
        "unlearn",
        output,
        model_args={"pretrained_model_name_or_path": str(start)},
        method_args={"unlearn_epochs": 4, "global_rounds": 2, **method_args},
        recipe=RecipeConfig(recipe, settings or {}),
    )


@pytest.fixture(scope="module")
def spread(small_run, tmp_path_factory) -> Path:
    """A fine-tuning whose forget rows belong to several clients."""
    config = small_run("finetune", tmp_path_factory.mktemp("spread") / "ft", partition=PartitionConfig(scheme="iid"))
    return run(config).directory


@pytest.mark.parametrize("targets", ["one", "several"])
def test_what_was_learned_of_the_forget_rows_is_subtracted(
    small_run, finetuned, spread, tmp_path, monkeypatch, targets
):
    """``W - scale tau_f``: the learned update minus 0.7 times that of the adapter that the targets learned."""
    learned_then = []
    advance = Negate.advance

    def kept(self, task, state, updates):
        combined, adapter = advance(self, task, state, updates)
        learned_then.append(combined)
        return combined, adapter

    monkeypatch.setattr(Negate, "advance", kept)
    start, who = (finetuned, {}) if targets == "one" else (spread, {"target_client_idx": "all"})
    settings = {"r": 3, "lora_alpha": 5, "scale": 0.7}
    result = run(
        unlearning(small_run, start, tmp_path / "run", "task_arithmetic", settings=settings, global_rounds=0, **who)
    )
    (combined,) = learned_then
    assert (len(combined.client_ids) > 1) is (targets == "several")
    tau, before, after = dense(combined.adapter, 5 / 3), dense(*saved(start)), dense(*saved(result.directory))
    assert max(float(t.abs().max()) for t in tau.values()) > 1e-2
    for module, matrix in before.items():
        torch.testing.assert_close(after[module], matrix - 0.7 * tau[module], atol=1e-6, rtol=0)
    second, scaling = saved(result.directory / SECOND_DIR)
    for module, matrix in dense(second, scaling).items():
        torch.testing.assert_close(matrix, -0.7 * tau[module], atol=1e-6, rtol=0)
    record, own = read_json(result.directory / "run.json"), read_json(result.directory / "unfed.json")
    assert own["forget_loss"]["value"] > record["forget_loss_at_start"] + 0.1
    assert record["schedule"][0][3] == "NLL on forget"


def test_its_method_does_not_matter(small_run, finetuned, tmp_path):
    config = unlearning(small_run, finetuned, tmp_path / "a", "task_arithmetic")
    other = unlearning(small_run, finetuned, tmp_path / "b", "task_arithmetic")
    one = run(config).directory
    two = run(dataclasses.replace(other, method=MethodConfig("GradDiff"))).directory
    assert saved(one)[0].digest() == saved(two)[0].digest()


def not_lora(small_run, start: Path, output: Path, **given):
    return unlearning(small_run, start, output, "not_lora", **given)


def test_the_update_of_the_chosen_layers_alone_is_negated(small_run, finetuned, tmp_path, monkeypatch):
    """What the first round starts from; the clients' own steps are left out."""
    seen = []

    def untouched(self, task, broadcast, client_id):
        seen.append(broadcast.adapter)
        return ClientUpdate(client_id, broadcast.adapter, 1, {"loss": 0.0})

    monkeypatch.setattr(Client, "fit", untouched)
    before, scaling = saved(finetuned)
    for settings, negated in (({}, "layers.0."), ({"layers": "down_proj"}, "down_proj"), ({"layers": "all"}, "")):
        seen.clear()
        run(not_lora(small_run, finetuned, tmp_path / "run", settings=settings))
        after = dense(seen[0], scaling)
        assert any(negated in m for m in after)
        for module, matrix in dense(before, scaling).items():
            assert matrix.any() and torch.equal(after[module], -matrix if negated in module else matrix)


@pytest.fixture(scope="module")
def by_heart(small_run, tmp_path_factory) -> Path:
    """A fine-tuning that has something to lose."""
    place = tmp_path_factory.mktemp("by_heart") / "ft"
    return run(small_run("finetune", place, args={"num_train_epochs": 12})).directory


def test_negated_and_trained_anew_it_forgets_and_asks_nothing_of_the_target(small_run, by_heart, tmp_path):
    result = run(not_lora(small_run, by_heart, tmp_path / "run"))
    record = read_json(result.directory / "run.json")
    assert read_json(result.directory / "unfed.json")["forget_loss"]["value"] > record["forget_loss_at_start"] + 0.1
    assert (
        record["recipe"]["needs"] == ["a learned LoRA adapter"]
        and "experimental" in record["recipe"]["promise"]["text"]
    )
    partition = read_json(result.directory / "partition.json")["clients"]
    assert {r.phase for r in result.records} == {"fine-tune"}
    assert all(set(r.clients) <= set(partition) for r in result.records)


def test_a_killed_run_goes_on_to_the_same_bytes(small_run, finetuned, tmp_path, monkeypatch):
    whole = run(not_lora(small_run, finetuned, tmp_path / "whole")).directory
    fit = Client.fit

    def cut(self, task, adapter, client_id):
        if task.round == 1:
            raise KeyboardInterrupt
        return fit(self, task, adapter, client_id)

    monkeypatch.setattr(Client, "fit", cut)
    with pytest.raises(KeyboardInterrupt):
        run(not_lora(small_run, finetuned, tmp_path / "cut"))
    monkeypatch.undo()
    run(dataclasses.replace(not_lora(small_run, finetuned, tmp_path / "cut"), resume=True))
    for name in ("adapter_model.safetensors", "adapter_config.json", "unfed.json"):
        assert digest_file(tmp_path / "cut" / name) == digest_file(whole / name)


def test_several_targets_train_on_what_they_keep(small_run, spread, tmp_path):
    result = run(not_lora(small_run, spread, tmp_path / "run", target_client_idx="all"))
    partition = read_json(result.directory / "partition.json")["clients"]
    assert len(read_json(result.directory / "run.json")["recipe"]["targets"]) > 1
    assert set(result.records[0].clients) == set(partition)


def test_it_is_refused_on_all_parameters_and_without_anybody_to_train(small_run, small_base, finetuned, tmp_path):
    config = not_lora(small_run, finetuned, tmp_path / "run")
    model = config.model.model_args
    for args, why in (
        ({"use_lora": False}, "trains all parameters"),
        ({"pretrained_model_name_or_path": str(small_base)}, "is a model without one"),
    ):
        other = dataclasses.replace(config.model, model_args=dataclasses.replace(model, **args))
        with pytest.raises(ConfigError, match=rf"recipe=not_lora: works on a learned LoRA adapter.*{why}"):
            run(dataclasses.replace(config, model=other))
    nobody = Situation(("client_0",), ())
    assert "no client has rows to keep" in unmet(build_recipe("not_lora", {}), nobody)[0]
