"""Fed-SB end to end: fine-tuning, unlearning within the spaces of the learned adapter, stock PEFT, resuming."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from unfed.app.runs import run
from unfed.base.artifacts import read_json, read_tensors
from unfed.config.schema import AggregatorConfig
from unfed.models.spec import ADAPTER_WEIGHTS

FED_SB = AggregatorConfig("FedAvg", {"adapter": "fed_sb", "adapter_args": {"init_rows": 4}})
TRAINING = {"method_args": {"num_clients": 3, "global_rounds": 2}, "args": {"learning_rate": 0.05}}


def weights(place: Path):
    return read_tensors(place / ADAPTER_WEIGHTS)


@pytest.fixture(scope="module")
def tuned(small_run, tmp_path_factory) -> Path:
    """A finished fine-tuning."""
    return run(
        small_run("finetune", tmp_path_factory.mktemp("fed_sb") / "run", aggregator=FED_SB, **TRAINING)
    ).directory


def test_an_ordinary_adapter_comes_of_tiny_messages(tuned, small_base) -> None:
    saved, record = weights(tuned), read_json(tuned / "run.json")
    assert not any("lora_R" in n for n in saved)
    pairs = [(saved[n], saved[n.replace("lora_A", "lora_B")]) for n in saved if "lora_A" in n]
    core_bytes = len(pairs) * 4 * 4 * 4  # r = 4, float32
    assert [(r["bytes_down"], r["bytes_up"]) for r in record["rounds"]] == [(3 * core_bytes, 3 * core_bytes)] * 2
    assert all(r["aggregation_error"] < 1e-6 for r in record["rounds"])
    factors = 3 * sum(a.numel() * 4 + b.numel() * 4 for a, b in pairs)
    assert record["beside_rounds"] == {"fixed factors": {"bytes_up": factors, "bytes_down": factors}}
    losses = [sum(m["loss"] for m in r["metrics"].values()) for r in record["rounds"]]
    assert losses[1] < losses[0]
    for a, b in pairs:
        assert torch.allclose(b.T @ b, torch.eye(4), atol=1e-5) and bool(a.any())
    opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(small_base), str(tuned))
    live = {n.replace(".default", ""): p for n, p in opened.named_parameters() if "lora_" in n}
    assert set(live) == set(saved) and all(torch.equal(live[n], t) for n, t in saved.items())


def test_a_killed_run_goes_on_to_the_same_bytes(small_run, tuned, tmp_path, resumed_after_a_round) -> None:
    config = small_run("finetune", tmp_path / "run", aggregator=FED_SB, **TRAINING)
    resumed_after_a_round(config)
    assert weights(tmp_path / "run").digest() == weights(tuned).digest()


def test_unlearning_stays_within_what_the_adapter_spans(small_run, tuned, tmp_path) -> None:
    given = {"model_args": {"pretrained_model_name_or_path": str(tuned)}, "aggregator": FED_SB}
    made = run(small_run("unlearn", tmp_path / "run", **given)).directory
    before, after, record = weights(tuned), weights(made), read_json(made / "run.json")
    assert record["forget_loss_agrees"] is True  # the start is that adapter
    assert record["beside_rounds"]["fixed factors"]["bytes_up"] == 0
    assert after.digest() != before.digest()
    for name in (n for n in before if "lora_A" in n):
        space = torch.linalg.qr(before[name].double().T)[0]
        out = after[name].double() - after[name].double() @ space @ space.T
        assert torch.linalg.norm(out) <= 1e-4 * torch.linalg.norm(after[name].double())
