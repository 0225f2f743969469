"""The commands that users were promised, word for word, on a small model; all six strategies."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from unfed.base.artifacts import read_tensors
from unfed.cli import fed_train

TRAIN = "--config-name=train-lora.yaml experiment=finetune/tofu/default task_name=SAMPLE_TRAIN"
UNLEARN = (
    "--config-name=unlearn-lora.yaml experiment=unlearn/tofu/default forget_split=forget10 retain_split=retain90 "
    "trainer=FederatedUnlearningTrainer task_name=fed_lora_unlearn model=Llama-3.2-3B-Instruct-lora "
    "model.model_args.pretrained_model_name_or_path=saves/finetune/SAMPLE_TRAIN"
)
SCRIPT = (
    "experiment=unlearn/tofu/default forget_split=forget10 retain_split=retain90 task_name=by_script "
    "model.model_args.pretrained_model_name_or_path=saves/finetune/SAMPLE_TRAIN"
)
STRATEGIES = ("FedAvg", "FedAvgM", "FedAdagrad", "FedAdam", "FedYogi", "FedProx", "FedNova", "Scaffold")
SHORT = "eval.generation.max_new_tokens=8 eval.limit=8"  # the suite's time, nothing else


@pytest.fixture(scope="module")
def test_base(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> Path:
    """A small trained Llama: the shared one, or the generator's."""
    shared = repo_root.parent / "shared" / "golden" / "models" / "tiny"
    if shared.is_dir():
        return shared
    from unfed.app.tiny_base import tiny_base

    return tiny_base(tmp_path_factory.mktemp("base"), size="test")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, data_dir: Path, test_base: Path) -> Path:
    """A directory with ``saves/finetune/SAMPLE_TRAIN``, made by the promised command."""
    place = tmp_path_factory.mktemp("user")
    model = f"model=tiny-lora model.model_args.pretrained_model_name_or_path={test_base}"
    code = in_process(place, data_dir, f"{TRAIN} {model} {SHORT} trainer.method_args.global_rounds=1")
    assert code == 0
    return place


def in_process(place: Path, data: Path, command: str) -> int:
    """What ``python src/fed_train.py <command>`` does in ``place``, without starting another interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("UNFED_DATA_DIR", str(data))
        return fed_train.main(shlex.split(command))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_unlearning_under_every_strategy(workplace: Path, data_dir: Path, strategy: str) -> None:
    task = f"fed_lora_unlearn_{strategy}"
    command = UNLEARN.replace("task_name=fed_lora_unlearn", f"task_name={task}")
    chosen = f"trainer.method_args.aggregation_strategy={strategy}"
    assert in_process(workplace, data_dir, f"{command} {SHORT} {chosen}") == 0
    out = workplace / "saves" / "unlearn" / task
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["config"]["aggregator"]["name"] == strategy
    assert [r["phase"] for r in record["rounds"]] == ["unlearn", "recover", "recover"]
    assert all(not r["failures"] for r in record["rounds"])
    assert len({r["adapter_after"] for r in record["rounds"]}) == 3, "every round moved the adapter"
    assert record["forget_loss_agrees"] is True, "unlearning began from the fine-tuned adapter"
    assert {"forget_Q_A_Prob", "model_utility"} <= json.loads((out / "TOFU_SUMMARY.json").read_text()).keys()


def test_the_command_verbatim_and_stock_peft(workplace: Path, data_dir: Path, test_base: Path, repo_root: Path) -> None:
    """A real process, the promised arguments and nothing else; then stock PEFT opens what it saved."""
    environment = {**os.environ, "UNFED_DATA_DIR": str(data_dir), "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(repo_root / "src" / "fed_train.py")]
    done = subprocess.run(
        [*script, *shlex.split(UNLEARN)], cwd=workplace, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    out = workplace / "saves" / "unlearn" / "fed_lora_unlearn"
    base = AutoModelForCausalLM.from_pretrained(test_base, dtype=torch.float32)
    untouched = {n: p.clone() for n, p in base.named_parameters()}
    model = PeftModel.from_pretrained(base, out)
    saved = read_tensors(out / "adapter_model.safetensors")
    own = {n.replace(".default", ""): p for n, p in model.named_parameters() if "lora_" in n}
    assert set(own) == set(saved)
    assert all(torch.equal(own[n], saved[n]) for n in saved)
    assert any(bool(t.abs().max() > 0) for n, t in saved.items() if "lora_B" in n)
    assert all(torch.equal(p, untouched[n]) for n, p in model.unload().named_parameters()), "the base never changes"
    assert AutoTokenizer.from_pretrained(out).chat_template


def test_the_script_has_trainer_and_model_as_defaults(workplace: Path, data_dir: Path, repo_root: Path) -> None:
    environment = {**os.environ, "UNFED_DATA_DIR": str(data_dir), "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(repo_root / "scripts" / "run_federated_lora_unlearn.py")]
    done = subprocess.run(
        [*script, *shlex.split(f"{SCRIPT} {SHORT}")],
        cwd=workplace, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    config = json.loads((workplace / "saves" / "unlearn" / "by_script" / "run.json").read_text())["config"]
    assert config["trainer"]["handler"] == "FederatedUnlearningTrainer"
    assert config["model"]["model_args"]["torch_dtype"] == "bfloat16"
    assert config["method"]["name"] == "NPO"


def test_going_on_from_an_adapter(workplace: Path, data_dir: Path, test_base: Path) -> None:
    """``lora_model_path`` on a base: the adapter trains on, its first round starts from its own digest."""
    adapter = workplace / "saves" / "finetune" / "SAMPLE_TRAIN"
    command = (
        f"--config-name=unlearn-lora.yaml experiment=unlearn/tofu/default task_name=go_on model=tiny-lora "
        f"model.model_args.pretrained_model_name_or_path={test_base} model.model_args.lora_model_path={adapter} "
        "eval.enabled=false trainer.method_args.unlearn_epochs=1"
    )
    assert in_process(workplace, data_dir, command) == 0
    record = json.loads((workplace / "saves" / "unlearn" / "go_on" / "run.json").read_text())
    assert record["rounds"][0]["adapter_before"] == read_tensors(adapter / "adapter_model.safetensors").digest()
    assert record["rounds"][0]["adapter_after"] != record["rounds"][0]["adapter_before"]


def test_presets_checkpointing_and_workers_work_together(workplace: Path, data_dir: Path, test_base: Path) -> None:
    for preset, r, modules in (("quick", 8, 2), ("balanced", 16, 7), ("high", 64, 7)):
        command = (
            f"{TRAIN.replace('SAMPLE_TRAIN', preset)} model=tiny-lora lora={preset} eval.enabled=false "
            f"model.model_args.pretrained_model_name_or_path={test_base} model.model_args.torch_dtype=bfloat16 "
            "trainer.args.gradient_checkpointing=true trainer.args.dataloader_num_workers=1 "
            "trainer.method_args.global_rounds=1 trainer.args.max_steps=2"
        )
        assert in_process(workplace, data_dir, command) == 0
        saved = json.loads((workplace / "saves" / "finetune" / preset / "adapter_config.json").read_text())
        assert (saved["r"], saved["lora_alpha"], len(saved["target_modules"])) == (r, 2 * r, modules)
        tensors = read_tensors(workplace / "saves" / "finetune" / preset / "adapter_model.safetensors")
        assert all(bool(t.abs().max() > 0) for n, t in tensors.items() if "lora_B" in n), "every B received a gradient"
