"""Adapter rules and unequal ranks in whole runs: fine-tuning, unlearning, stock PEFT, resumption, refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unfed.app.runs import run
from unfed.base.errors import ConfigError
from unfed.config.schema import AggregatorConfig, PartitionConfig, RecipeConfig
from unfed.federated.client import Client
from unfed.models.spec import LoraArgs

RANKS = {"client_0": 1, "client_1": 2}
"""Of three; the adapter has rank 4, as the last client."""
RUNS = [("flexlora", (1, 2, 4)), ("hetlora", (1, 2, 4)), ("fedit", (1, 2, 4)), ("lora_fair", None)]


def rule(adapter: str, name: str = "FedAvg", **settings) -> AggregatorConfig:
    return AggregatorConfig(name, {"adapter": adapter, **settings})


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def record(directory: Path) -> dict:
    return json.loads((directory / "run.json").read_text())


def opened_by_peft(directory: Path, base: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the saved adapter on its base, without anything of ours."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), directory)
    with torch.no_grad():
        return model.eval()(tokens).logits


def base_alone(base: Path, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(base).eval()(tokens).logits


class KilledError(BaseException):
    """Stands for the end of the process."""


def cut_in_round(monkeypatch, number: int) -> None:
    fit = Client.fit

    def cut(self, task, broadcast, client_id):
        if task.round == number:
            raise KilledError
        return fit(self, task, broadcast, client_id)

    monkeypatch.setattr(Client, "fit", cut)


@pytest.mark.parametrize(("name", "ranks"), RUNS)
def test_fine_tune_unlearn_open_and_resume(small_run, small_base, tmp_path, monkeypatch, name, ranks):
    given = {"aggregator": rule(name), "partition": PartitionConfig(ranks=ranks)}
    whole = run(small_run("finetune", tmp_path / "whole", **given))
    kept, learnt = record(whole.directory), weights(whole.directory)
    assert kept["settings"].get(f"adapters {name}", {}).get("ranks") == (RANKS if ranks else None)
    assert kept["config"]["partition"]["ranks"] == (list(ranks) if ranks else None)
    size = sum(t.numel() * 4 for t in learnt.values())
    expected = sum(size * r // 4 for r in ranks) if ranks else 3 * size
    for told in whole.records:
        assert told.bytes_up == told.bytes_down == expected and not told.failures
    assert whole.records[0].aggregation_error is not None and whole.records[0].aggregation_error > 1e-4
    tokens = torch.arange(12).reshape(1, 12)
    logits = opened_by_peft(whole.directory, small_base, tokens)
    assert float((logits - base_alone(small_base, tokens)).abs().max()) > 1e-3

    cut_in_round(monkeypatch, 1)
    with pytest.raises(KilledError):
        run(small_run("finetune", tmp_path / "cut", **given))
    monkeypatch.undo()
    again = run(dataclasses.replace(small_run("finetune", tmp_path / "cut", **given), resume=True))
    assert (again.directory / "adapter_model.safetensors").read_bytes() == (
        whole.directory / "adapter_model.safetensors"
    ).read_bytes()

    shape = {"pretrained_model_name_or_path": str(whole.directory)}
    config = small_run("unlearn", tmp_path / "unlearn", model_args=shape, **given)
    forgot = run(config)
    assert weights(forgot.directory).keys() == learnt.keys()
    assert torch.isfinite(opened_by_peft(forgot.directory, small_base, tokens)).all()
    assert next(r.phase for r in forgot.records) == "unlearn"


def test_hetlora_clients_give_ranks_up(small_run, tmp_path, monkeypatch):
    """With a strong regulariser the upper half shrinks once it has been learnt (the first round begins at 0, where
    nothing can shrink): a client that began with r goes on with r/2, sends as much less, and so after a resumption."""
    settings = {"gamma": 0.5, "prune_lambda": 30.0}

    def config(name: str, **changes):
        shape = {"global_rounds": 4}
        given = {"aggregator": rule("hetlora", adapter_args=settings), "partition": PartitionConfig(ranks=(2, 4, 4))}
        return dataclasses.replace(small_run("finetune", tmp_path / name, method_args=shape, **given), **changes)

    whole = run(config("whole"))
    left = {"client_0": 2, "client_1": 4, "client_2": 4}
    size = sum(t.numel() * 4 for t in weights(whole.directory).values()) // 4
    given_up = 0
    for told in whole.records:
        assert told.bytes_down == size * sum(left.values())
        for client, metrics in told.metrics.items():
            if "rank" in metrics:
                assert metrics["rank"] == left[client] // 2
                left[client], given_up = left[client] // 2, given_up + 1
        assert told.bytes_up == size * sum(left.values())
    assert given_up > 0 and not any("rank" in m for m in whole.records[0].metrics.values())
    assert all("pruning" in m for m in whole.records[0].metrics.values())
    assert record(whole.directory)["settings"]["adapters hetlora"]["gamma"] == 0.5

    cut_in_round(monkeypatch, 3)
    with pytest.raises(KilledError):
        run(config("cut"))
    monkeypatch.undo()
    again = run(config("cut", resume=True))
    assert weights(again.directory).keys() == weights(whole.directory).keys()
    assert again.records[-1].adapter_after == whole.records[-1].adapter_after


def test_a_client_of_smaller_rank_trains_as_one_of_that_rank_with_its_alpha(small_run, tmp_path):
    """alpha grows with the rank, so that alpha/r is one number: a client of rank 2 in an adapter of rank 4, alpha 8,
    does what one with r = 2 and alpha = 4 does from the same factors."""
    from unfed.aggregation.adapters.ranks import truncated

    sent: dict[int, list] = {}

    def remembered(r: int, alpha: int, ranks):
        fit = Client.fit

        def kept(self, task, broadcast, client_id):
            if r == 2:  # its own random factors are not those of the larger adapter
                broadcast = dataclasses.replace(broadcast, adapter=sent[4][0])
            update = fit(self, task, broadcast, client_id)
            sent[r] = [truncated(broadcast.start(client_id), 2), update.adapter]
            return update

        lora = LoraArgs(r=r, lora_alpha=alpha, lora_dropout=0.0, target_modules=("q_proj", "down_proj"))
        shape = {"num_clients": 1, "global_rounds": 1}
        config = small_run(
            "finetune",
            tmp_path / f"r{r}",
            model_args={"lora_config": lora},
            method_args=shape,
            aggregator=rule("flexlora"),
            partition=PartitionConfig(scheme="iid", ranks=ranks),
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Client, "fit", kept)
            run(config)

    remembered(4, 8, 2)
    remembered(2, 4, None)
    assert sent[4][0].digest() == sent[2][0].digest()
    assert any(not torch.equal(sent[4][0][n], sent[4][1][n]) for n in sent[4][0])
    for name, tensor in sent[4][1].items():
        assert tensor.shape == sent[2][1][name].shape
        torch.testing.assert_close(tensor, sent[2][1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("adapter", "ranks", "said"),
    [
        ("flexlora", (2, 4), r"partition\.ranks=\[2,4\]: 2 ranks for 3 clients; give one for each"),
        ("flexlora", (2, 8, 4), r"client_1 has rank 8, the adapter 4; set model\.model_args\.lora_config\.r=8"),
        ("ffa", (2, 4, 4), r"adapter=ffa: cannot take .*same, whole, at every client; use one of .*flexlora, hetlora"),
        ("lora_fair", 2, r"partition\.ranks=2 with aggregator\.adapter=lora_fair: cannot take"),
    ],
)
def test_ranks_that_do_not_fit_are_refused_before_a_model_is_loaded(
    small_run, tmp_path, monkeypatch, adapter, ranks, said
):
    monkeypatch.setattr("unfed.app.runs.load_model", None)
    config = small_run("finetune", tmp_path / "no", aggregator=rule(adapter), partition=PartitionConfig(ranks=ranks))
    with pytest.raises(ConfigError, match=said):
        run(config)
    assert not (tmp_path / "no").exists()


def test_one_number_that_is_the_adapters_own_changes_nothing(small_run, tmp_path):
    ours = run(small_run("finetune", tmp_path / "a", aggregator=rule("lora_fair"), partition=PartitionConfig(ranks=4)))
    plain = run(small_run("finetune", tmp_path / "b", aggregator=rule("lora_fair")))
    assert weights(ours.directory).keys() == weights(plain.directory).keys()
    assert all(torch.equal(t, weights(plain.directory)[n]) for n, t in weights(ours.directory).items())


def test_a_recipe_with_its_own_server_rule_is_refused(from_finetuned, tmp_path):
    config = from_finetuned(
        tmp_path / "no",
        aggregator=rule("fedit"),
        partition=PartitionConfig(ranks=(1, 2, 4)),
        recipe=RecipeConfig("fedosd"),
    )
    with pytest.raises(ConfigError, match=r"partition\.ranks: the recipe's own server rule .* factors of one rank"):
        run(config)


def test_dora_is_refused_before_a_model_is_loaded_but_for_fedit(finetuned, from_finetuned, tmp_path, monkeypatch):
    place = tmp_path / "dora"
    place.mkdir()
    for file in finetuned.iterdir():
        if file.is_file():
            (place / file.name).write_bytes(file.read_bytes())
    shape = json.loads((place / "adapter_config.json").read_text()) | {"use_dora": True}
    (place / "adapter_config.json").write_text(json.dumps(shape))
    monkeypatch.setattr("unfed.app.runs.load_model", None)
    for adapter in ("flexlora", "hetlora", "lora_fair", "ffa", "rolora"):
        config = from_finetuned(
            tmp_path / "no", model_args={"pretrained_model_name_or_path": str(place)}, aggregator=rule(adapter)
        )
        with pytest.raises(ConfigError, match=rf"adapter={adapter}: .*dora is DoRA.*only adapter=fedit"):
            run(config)
