"""Whole runs on the small model: every way of training, and every way in which a run can go wrong."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from unfed.app import saving
from unfed.app.runs import run
from unfed.base.artifacts import digest_file, read_json, read_tensors
from unfed.base.errors import AdapterError, ArtifactError, ConfigError, DataError, UnfedError
from unfed.base.types import AdapterState
from unfed.config.schema import AggregatorConfig, DatasetConfig, MethodConfig, PartitionConfig, RecipeConfig
from unfed.federated.client import Client

IDS = torch.tensor([[1, 9, 12, 40, 7, 2], [1, 30, 31, 32, 33, 34]])


def weights(directory: Path) -> AdapterState:
    return read_tensors(directory / "adapter_model.safetensors")


def data(config, **sets):
    chosen = {k: v and DatasetConfig("locuslab/TOFU", v) for k, v in sets.items()}
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **chosen))


# --- ways of training -------------------------------------------------------------------------------------------------


def test_unlearning_raises_the_forget_loss_and_recovery_keeps_the_rest(from_finetuned, finetuned, tmp_path):
    config = from_finetuned(tmp_path / "run", method_args={"unlearn_epochs": 8, "global_rounds": 4})
    result = run(config)
    assert [r.phase for r in result.records] == ["unlearn", *["recover"] * 4]
    assert result.records[0].clients == ("client_0",) and result.records[0].num_examples == 6
    before = read_json(tmp_path / "run" / "run.json")["forget_loss_at_start"]
    after = read_json(tmp_path / "run" / "unfed.json")["forget_loss"]["value"]
    assert after > before + 0.2
    retain = [r.loss for r in result.records[1:]]
    assert retain[-1] < retain[0]


def test_going_on_from_an_adapter_with_other_rows(small_run, finetuned, small_data, tmp_path):
    """New rows find owners; the old ones keep theirs, so that the forget rows can still be unlearned afterwards."""
    root = tmp_path / "data"
    shutil.copytree(small_data, root)
    new = [{"question": f"What does Gus do in month {i}?", "answer": f"Gus mends {i} clocks."} for i in range(6)]
    (root / "tofu" / "news.json").write_text("".join(json.dumps(r) + "\n" for r in new), encoding="utf-8")
    config = data(small_run("finetune", tmp_path / "on", model_args={"lora_model_path": str(finetuned)}), train="news")
    config = dataclasses.replace(config, paths=dataclasses.replace(config.paths, data_dir=str(root)))
    run(config)
    before, after = (read_json(d / "partition.json")["clients"] for d in (finetuned, tmp_path / "on"))
    for client, ids in before.items():
        assert after[client][: len(ids)] == ids and len(after[client]) == len(ids) + 2
    run(small_run("unlearn", tmp_path / "un", model_args={"pretrained_model_name_or_path": str(tmp_path / "on")}))


def test_what_was_saved_opens_in_stock_peft(finetuned, small_base):
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(small_base), str(finetuned))
    names = {n for n, _ in stock.named_parameters() if ".lora_" in n}
    assert names == {n.replace(".weight", ".default.weight") for n in weights(finetuned)}
    assert (finetuned / "tokenizer.json").is_file()


def test_the_same_configuration_gives_the_same_bytes(small_run, finetuned, tmp_path):
    again = run(small_run("finetune", tmp_path / "again")).directory
    assert digest_file(again / "adapter_model.safetensors") == digest_file(finetuned / "adapter_model.safetensors")
    other = run(dataclasses.replace(small_run("finetune", tmp_path / "other"), seed=1)).directory
    assert weights(other).digest() != weights(finetuned).digest()


def test_worker_processes_and_reporting_change_no_byte(small_run, finetuned, tmp_path):
    args = {"dataloader_num_workers": 2, "report_to": "tensorboard", "logging_steps": 1}
    again = run(small_run("finetune", tmp_path / "run", args=args, method_args={"global_rounds": 2})).directory
    assert weights(again).digest() == weights(finetuned).digest()
    assert list((again / "logs").rglob("events.out.tfevents*"))


@pytest.mark.parametrize(
    "rule", ["FedAvg", "FedAvgM", "FedAdagrad", "FedAdam", "FedYogi", "FedProx", "FedNova", "Scaffold"]
)
def test_every_strategy(from_finetuned, finetuned, tmp_path, rule):
    result = run(from_finetuned(tmp_path / "run", aggregator=rule))
    assert len(result.records) == 3 and not any(r.failures for r in result.records)
    assert weights(result.directory).digest() == result.records[-1].adapter_after != weights(finetuned).digest()


@pytest.mark.parametrize(
    ("method", "params"),
    [("GradAscent", {}), ("GradDiff", {}), ("NPO", {"alpha": 0.0}), ("SimNPO", {"retain_loss_type": "KL"})],
)
def test_every_method(from_finetuned, tmp_path, method, params):
    result = run(from_finetuned(tmp_path / "run", method=MethodConfig(method, params)))
    parts = result.records[0].metrics["client_0"]
    assert ("retain" in parts) == (method in {"GradDiff", "SimNPO"}) and "forget" in parts


def test_interleaved(from_finetuned, tmp_path):
    given = {"global_rounds": 3, "unlearn_epochs": 6}
    result = run(from_finetuned(tmp_path / "run", method_args=given, recipe=RecipeConfig("interleaved")))
    assert [(r.phase, r.clients) for r in result.records] == [("interleaved", ("client_0", "client_1", "client_2"))] * 3
    for record in result.records:
        assert record.metrics["client_0"]["steps"] == 4 and "forget" in record.metrics["client_0"]
        assert "train" in record.metrics["client_1"] and "forget" not in record.metrics["client_1"]


def test_partial_participation(small_run, tmp_path):
    given = {"num_clients": 4, "fraction_fit": 0.5, "global_rounds": 6}
    result = run(small_run("finetune", tmp_path / "run", method_args=given))
    assert all(len(r.clients) == 2 for r in result.records) and len({r.clients for r in result.records}) > 1


def test_every_owner_unlearns(small_run, tmp_path):
    """Rows dealt at random: each client owns some of the forget set."""
    dealt = dataclasses.replace(small_run("finetune", tmp_path / "ft"), partition=PartitionConfig("iid"))
    start = run(dealt).directory
    args = {"pretrained_model_name_or_path": str(start)}
    with pytest.raises(UnfedError, match="target_client_idx=all"):
        run(small_run("unlearn", tmp_path / "one", model_args=args))
    result = run(small_run("unlearn", tmp_path / "all", model_args=args, method_args={"target_client_idx": "all"}))
    assert len(result.records[0].clients) > 1 and result.records[0].num_examples == 6


@pytest.mark.parametrize(("mode", "handler"), [("finetune", "finetune"), ("unlearn", "NPO")])
def test_in_one_place(small_run, finetuned, tmp_path, mode, handler):
    args = {"pretrained_model_name_or_path": str(finetuned)} if mode == "unlearn" else {}
    config = small_run(mode, tmp_path / "run", handler=handler, model_args=args, aggregator=None)
    result = run(dataclasses.replace(config, aggregator=None))
    (record,) = result.records
    assert record.clients == ("client_0",) and record.num_examples == (18 if mode == "finetune" else 6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_16_bit_base(from_finetuned, finetuned, tmp_path, dtype):
    args = {"bf16": True} if dtype == "bfloat16" else {}
    run(from_finetuned(tmp_path / "run", model_args={"torch_dtype": dtype}, args=args))
    state = weights(tmp_path / "run")
    assert {t.dtype for t in state.values()} == {torch.float32} and state.digest() != weights(finetuned).digest()


def test_checkpointing_and_accumulation_in_a_run(from_finetuned, tmp_path):
    args = {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    result = run(from_finetuned(tmp_path / "run", args=args))
    assert not any(r.failures for r in result.records)


def test_an_oracle_follows_the_partition(small_run, finetuned, tmp_path):
    """Fine-tuning on the retain rows alone: same owners, and a client whose rows are all forgotten takes no part."""
    config = data(small_run("finetune", tmp_path / "run"), train="retain99", forget=None)
    manifest = PartitionConfig(manifest=str(finetuned / "partition.json"))
    result = run(dataclasses.replace(config, partition=manifest))
    assert result.records[0].num_examples == 12
    assert read_json(tmp_path / "run" / "partition.json") == read_json(finetuned / "partition.json")


# --- all parameters ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full(small_run, tmp_path_factory):
    output = tmp_path_factory.mktemp("full") / "finetune"
    return run(small_run("finetune", output, model_args={"use_lora": False}, args={"learning_rate": 2e-3})).directory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["NPO", "GradDiff"])
def test_without_lora_from_end_to_end(small_run, full, small_base, tmp_path, dtype, method):
    """The full model is saved, opened again, and unlearned with a KL term; the reference is a swap of weights."""
    args = {"pretrained_model_name_or_path": str(full), "use_lora": False, "torch_dtype": dtype}
    config = small_run(
        "unlearn", tmp_path / "run", model_args=args, method=MethodConfig(method, {"retain_loss_type": "KL"}),
        args={"learning_rate": 1e-3}, aggregator="FedProx",
    )  # fmt: skip
    result = run(config)
    metrics = result.records[0].metrics["client_0"]
    assert metrics["proximal"] > 0 and metrics["retain"] > 0 and not any(r.failures for r in result.records)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    begin = AutoModelForCausalLM.from_pretrained(small_base).eval()
    with torch.no_grad():
        assert not torch.allclose(model(IDS).logits.float(), begin(IDS).logits, atol=1e-2)
    assert read_json(tmp_path / "run" / "partition.json") == read_json(full / "partition.json")
    assert result.records[0].aggregation_error is None


def test_without_lora_a_cut_off_run_goes_on_to_the_same_bytes(small_run, full, tmp_path, monkeypatch):
    args = {"pretrained_model_name_or_path": str(full), "use_lora": False}

    def config(name, **changes):
        made = small_run(
            "unlearn", tmp_path / name, model_args=args, args={"learning_rate": 1e-3}, aggregator="FedAdam"
        )
        return dataclasses.replace(made, **changes)

    whole = run(config("whole")).directory
    fail_in_round(monkeypatch, 2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run(config("cut"))
    monkeypatch.undo()
    cut = run(config("cut", resume=True)).directory
    assert digest_file(cut / "model.safetensors") == digest_file(whole / "model.safetensors")


# --- ways of failing --------------------------------------------------------------------------------------------------


def fail_in_round(monkeypatch, round_: int, error: BaseException, client: str | None = None) -> None:
    fit = Client.fit

    def failing(self, task, adapter, client_id):
        if task.round == round_ and client in {None, client_id}:
            raise error
        return fit(self, task, adapter, client_id)

    monkeypatch.setattr(Client, "fit", failing)


def spoil(monkeypatch, how, client: str = "client_1") -> None:
    fit = Client.fit

    def spoiled(self, task, adapter, client_id):
        update = fit(self, task, adapter, client_id)
        return (
            dataclasses.replace(update, adapter=AdapterState(how(dict(update.adapter))))
            if client_id == client
            else update
        )

    monkeypatch.setattr(Client, "fit", spoiled)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (lambda t: {n: torch.full_like(v, float("nan")) for n, v in t.items()}, "not finite"),
        (lambda t: {n: v[:1] for n, v in t.items()}, "has shape"),
        (lambda t: {n + ".x": v for n, v in t.items()}, "missing"),
    ],
)
def test_an_unusable_update_costs_one_client(small_run, tmp_path, monkeypatch, capsys, how, said):
    spoil(monkeypatch, how)
    result = run(small_run("finetune", tmp_path / "run"))
    for record in result.records:
        assert record.clients == ("client_0", "client_2") and said in record.failures["client_1"]
    text = capsys.readouterr().err
    assert text.count("client_1 is left out of this round: update dropped:") == 2
    assert (result.directory / "adapter_model.safetensors").is_file()
    warnings = read_json(result.directory / "run.json")["warnings"]
    assert ("is not finite: lower trainer.args.learning_rate" in " ".join(warnings)) == (said == "not finite")


def test_a_client_that_breaks_costs_one_client(small_run, tmp_path, monkeypatch):
    fail_in_round(monkeypatch, 0, RuntimeError("on fire"), "client_2")
    first, second = run(small_run("finetune", tmp_path / "run")).records
    assert first.failures == {"client_2": "RuntimeError: on fire"} and second.failures == {}


def test_too_few_clients(small_run, tmp_path, monkeypatch):
    fail_in_round(monkeypatch, 1, RuntimeError("on fire"), "client_2")
    with pytest.raises(
        UnfedError, match="only 2 of 3 clients returned a usable update and min_clients=3: client_2: Run"
    ):
        run(small_run("finetune", tmp_path / "run", method_args={"min_clients": 3}))
    record = read_json(tmp_path / "run" / "run.json")
    assert record["status"] == "failed" and len(record["rounds"]) == 1
    assert (tmp_path / "run" / "checkpoints" / "round_00001").is_dir()


def test_a_loss_that_explodes_everywhere_says_what_to_try(small_run, tmp_path, monkeypatch):
    for client in ("client_0", "client_1", "client_2"):
        spoil(monkeypatch, lambda t: {n: torch.full_like(v, float("inf")) for n, v in t.items()}, client)
    with pytest.raises(
        UnfedError, match=r"only 0 of 3 .*Probably the loss of phase finetune \(NLL\) is not finite: lower"
    ):
        run(small_run("finetune", tmp_path / "run"))


def test_a_loss_that_moves_does_not_warn(finetuned):
    assert read_json(finetuned / "run.json")["warnings"] == []


@pytest.mark.parametrize("shape", [{"global_rounds": 2}, {"global_rounds": 1}])
def test_a_loss_that_does_not_move_warns(small_run, tmp_path, capsys, shape):
    """By rounds, or by epochs of the only round; whatever the noise between batches."""
    args = {"learning_rate": 1e-12, "num_train_epochs": 1 if shape["global_rounds"] == 2 else 3}
    result = run(small_run("finetune", tmp_path / "run", args=args, method_args=shape))
    (warning,) = read_json(result.directory / "run.json")["warnings"]
    assert "hardly moved" in warning and "raise trainer.args.learning_rate" in warning
    assert "WARNING: the loss of phase finetune hardly moved" in " ".join(capsys.readouterr().err.split())


def test_out_of_memory_is_answered_with_numbers(small_run, tmp_path, monkeypatch):
    fail_in_round(monkeypatch, 1, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    with pytest.raises(UnfedError, match=r"Tried to allocate 2\.00 GiB") as raised:
        run(small_run("finetune", tmp_path / "run"))
    assert "batch 4 x accumulation 1" in str(raised.value) and "LoRA r 4 on 3 modules" in str(raised.value)
    assert (tmp_path / "run" / "checkpoints" / "round_00001").is_dir()


def test_an_adapter_of_another_base_with_the_same_shape(small_run, finetuned, make_base, tmp_path):
    other = make_base(tmp_path / "other", seed=9)
    args = {"pretrained_model_name_or_path": str(finetuned), "base_model_name_or_path": str(other)}
    with pytest.raises(AdapterError, match=r"was trained on another base model than .*other \(their weights differ\)"):
        run(small_run("unlearn", tmp_path / "run", model_args=args))


def test_a_base_without_the_target_modules(small_run, tmp_path):
    from unfed.models.spec import LoraArgs

    args = {"lora_config": LoraArgs(target_modules=("query_key_value",))}
    with pytest.raises(AdapterError, match="LlamaForCausalLM has no query_key_value"):
        run(small_run("finetune", tmp_path / "run", model_args=args))


def test_rows_that_contradict_each_other(from_finetuned, small_run, tmp_path):
    with pytest.raises(DataError, match="6 rows are both in the forget set and in the retain set"):
        run(data(from_finetuned(tmp_path / "a"), retain="full"))
    with pytest.raises(ConfigError, match=r"data\.forget: unlearning needs a forget set"):
        run(data(from_finetuned(tmp_path / "b"), forget=None))
    with pytest.raises(ConfigError, match=r"data\.train: fine-tuning needs a training set"):
        run(data(small_run("finetune", tmp_path / "c"), train=None))
    with pytest.raises(DataError, match=r"num_clients=19 is more than the 18 examples"):
        run(small_run("finetune", tmp_path / "d", method_args={"num_clients": 19}))
    with pytest.raises(DataError, match="target_client_idx=3 with num_clients=3"):
        run(small_run("finetune", tmp_path / "e", method_args={"target_client_idx": 3}))
    assert list(tmp_path.iterdir()) == []


def test_a_target_without_retain_rows(small_run, tmp_path):
    """Its method needs retain rows beside the forget rows: said with what to do instead."""
    only = data(small_run("finetune", tmp_path / "ft", method_args={"num_clients": 13}), train="full")
    start = run(only).directory
    args = {"pretrained_model_name_or_path": str(start)}
    with pytest.raises(UnfedError, match=r"client_0 has no retain rows.*method=GradAscent"):
        run(small_run("unlearn", tmp_path / "npo", model_args=args))
    result = run(small_run("unlearn", tmp_path / "ga", model_args=args, method=MethodConfig("GradAscent")))
    assert result.records[0].clients == ("client_0",) and "client_0" not in result.records[1].clients


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("broken", ["os.replace", "unfed.base.artifacts.save_file"])
def test_a_full_disk_in_the_middle_loses_nothing(small_run, finetuned, tmp_path, monkeypatch, broken, code):
    """The round before stays whole, the message names the file, and the run goes on when there is room."""
    config = small_run("finetune", tmp_path / "run", method_args={"global_rounds": 2})
    fit = Client.fit

    def refuse(*_args, **_kwargs):
        raise OSError(code, os.strerror(code))

    def filling(self, task, adapter, client_id):
        if task.round == 1:
            monkeypatch.setattr(broken, refuse)
        return fit(self, task, adapter, client_id)

    monkeypatch.setattr(Client, "fit", filling)
    with pytest.raises(ArtifactError, match=f"cannot write .*{os.strerror(code)}"):
        run(config)
    monkeypatch.undo()
    place = tmp_path / "run"
    assert [p.name for p in (place / "checkpoints").iterdir()] == ["round_00001"]
    assert json.loads((place / "run.json").read_text())["rounds"][0]["round"] == 0
    run(dataclasses.replace(config, resume=True))
    assert weights(place).digest() == weights(finetuned).digest()


def test_a_full_disk_at_the_end_keeps_every_round(small_run, finetuned, tmp_path, monkeypatch):
    config = small_run("finetune", tmp_path / "run")
    save = saving.save_adapter

    def full(*args):
        monkeypatch.setattr("unfed.models.adapter.save_file", refuse)
        return save(*args)

    def refuse(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving, "save_adapter", full)
    with pytest.raises(ArtifactError, match="No space left on device"):
        run(config)
    monkeypatch.undo()
    assert not (tmp_path / "run" / "adapter_config.json").exists()
    run(dataclasses.replace(config, resume=True))
    assert weights(tmp_path / "run").digest() == weights(finetuned).digest()


def test_an_aggregator_with_a_wrong_hyperparameter(small_run, tmp_path):
    with pytest.raises(ConfigError, match=r"aggregator\.server_lr: must be a number above 0, not -1"):
        run(small_run("finetune", tmp_path / "run", aggregator=AggregatorConfig("FedAdam", {"server_lr": -1})))


def test_no_secret_of_the_environment_is_written(small_run, tmp_path, monkeypatch, capfd):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "MY_PASSWORD"):
        monkeypatch.setenv(name, f"{name}-4f9d2c")
    directory = run(small_run("finetune", tmp_path / "ft")).directory
    files = [f for f in directory.rglob("*") if f.is_file()]
    assert any(f.name == "run.json" for f in files)
    assert not [f for f in files if b"-4f9d2c" in f.read_bytes()]
    said = capfd.readouterr()
    assert "-4f9d2c" not in said.out + said.err
