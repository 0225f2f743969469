"""Adapters that we save open in stock PEFT, the current release and 0.13.2, with equal logits."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from unfed.aggregation.lora import lora_pairs
from unfed.base.types import AdapterState
from unfed.models.adapter import save_adapter, snapshot
from unfed.models.second import LEARNED, SecondAdapter, add_second, as_one

HERE = Path(__file__).parent
GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden" / "models" / "tiny"
SOME = ["q_proj", "v_proj", "down_proj"]
ADAPTERS = {
    "some-modules": {"target_modules": SOME},
    "all-linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": SOME, "use_rslora": True},
    "patterns": {
        "target_modules": SOME,
        "rank_pattern": {"layers.0.self_attn.q_proj": 2},
        "alpha_pattern": {"down_proj": 3},
    },
    "one-layer": {"target_modules": SOME, "layers_to_transform": [1]},
    "head-saved": {"target_modules": SOME, "modules_to_save": ["lm_head"]},
    "stacked": {"target_modules": SOME, "r": 3, "lora_alpha": 10},
}
BASES = ["made-here", "golden-tiny"]
CASES = [f"{base}_{adapter}" for base in BASES for adapter in ADAPTERS]


def make_base(folder):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@torch.no_grad()
def make_case(folder, base, options, *, stacked=False):
    """Save an adapter whose factors are all different from zero, and the logits it gives here."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    shape = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1} | options
    name = LEARNED if stacked else "default"
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **shape), adapter_name=name)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=0.2 if "lora_" in name else 0.02)
    if stacked:  # a second adapter on one layer of it: modules of two ranks, an alpha that is no whole number
        modules = tuple(m for m in lora_pairs(snapshot(model, LEARNED)) if "layers.1." in m)
        add_second(model, SecondAdapter(2, 7, modules), seed=1)
        second = {n: 0.2 * torch.randn_like(t) for n, t in snapshot(model).items()}
        model, _ = as_one(model, AdapterState(second))
    model.eval()
    folder.mkdir(parents=True)
    save_adapter(model, snapshot(model), folder / "adapter")
    ids = torch.randint(3, 120, (2, 24))
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.contiguous()
    with model.disable_adapter():
        base_logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.contiguous()
    save_file({"input_ids": ids, "logits": logits, "base_logits": base_logits}, folder / "logits.safetensors")
    (folder / "case.json").write_text(json.dumps({"base": str(base)}), encoding="utf-8")


def make_cases(root):
    bases = {"made-here": make_base(root / "base")}
    if GOLDEN.is_dir():
        bases["golden-tiny"] = GOLDEN
    for base_name, base in bases.items():
        for name, options in ADAPTERS.items():
            make_case(root / "cases" / f"{base_name}_{name}", base, options, stacked=name == "stacked")
    return root / "cases"


def open_with(python, cases):
    """Run the stock reader under another interpreter, away from this checkout's packages."""
    env = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PYTEST_CURRENT_TEST"}}
    script = HERE / "open_with_stock_peft.py"
    run = subprocess.run([python, script, cases], env=env, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return cases


def check(cases, case, release):
    folder = cases / case
    if not folder.is_dir():
        pytest.skip(f"{GOLDEN.parent.parent} is not here")
    with safe_open(folder / "stock.safetensors", "pt") as stock:
        assert stock.metadata()["peft"] == release
    ours, stock = load_file(folder / "logits.safetensors"), load_file(folder / "stock.safetensors")
    assert (ours["logits"] - ours["base_logits"]).abs().max() > 1e-2, (
        "the adapter does nothing: the test would be blind"
    )
    torch.testing.assert_close(stock["logits"], ours["logits"], atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def current(tmp_path_factory):
    return open_with(sys.executable, make_cases(tmp_path_factory.mktemp("current")))


@pytest.fixture(scope="module")
def old_python(tmp_path_factory):
    """An environment with peft 0.13.2: made here, or the one that ``UNFED_PEFT013_PYTHON`` names."""
    given = os.environ.get("UNFED_PEFT013_PYTHON")
    if given:
        return given
    venv = tmp_path_factory.mktemp("peft013") / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True, timeout=120)
    pip = [venv / "bin" / "python", "-m", "pip", "install", "-q", "-r", HERE / "requirements-peft013.txt"]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return venv / "bin" / "python"


@pytest.fixture(scope="module")
def old(tmp_path_factory, old_python):
    return open_with(old_python, make_cases(tmp_path_factory.mktemp("old")))


@pytest.mark.parametrize("case", CASES)
def test_current_release_gives_equal_logits(current, case):
    check(current, case, version("peft"))


@pytest.mark.compat
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", CASES)
def test_peft_0_13_2_gives_equal_logits(old, case):
    check(old, case, "0.13.2")
