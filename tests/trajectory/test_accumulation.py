"""A step is a step however it is cut into micro-batches: whole trajectories agree to float32 rounding."""

from __future__ import annotations

import pytest
import torch

from unfed.app.runs import run
from unfed.base.artifacts import read_tensors
from unfed.base.types import AdapterState, Broadcast
from unfed.federated.client import Client, ClientData
from unfed.federated.schedule import FitTask, Phase, Work
from unfed.models.adapter import restore, snapshot
from unfed.models.spec import LoraArgs
from unfed.objectives.nll import NLL
from unfed.objectives.proximal import Proximal
from unfed.objectives.registry import build_objective

OBJECTIVES = {
    "NLL": NLL(),
    "GradAscent": build_objective("GradAscent", {}),
    "GradDiff_KL": build_objective("GradDiff", {"retain_loss_type": "KL"}),
    "NPO_NLL": build_objective("NPO", {}),
    "SimNPO": build_objective("SimNPO", {}),
    "DPO": build_objective("DPO", {}),
    "CEU": build_objective("CEU", {"ignore_first_n_answer_tokens": 4, "gamma": 20.0}),
    "NPO+proximal": Proximal(build_objective("NPO", {}), 5.0),
}


def close(one: AdapterState, two: AdapterState, atol: float) -> None:
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def moved(one: AdapterState, start: AdapterState) -> float:
    return max(float((one[n] - start[n]).abs().max()) for n in start)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_trajectory_of_a_client(small_local, small_examples, name):
    """Eleven rows in steps of eight: the second step is short, and its cuts are uneven."""
    objective = OBJECTIVES[name]
    driver = "train" if name == "NLL" else "forget"
    data = {"forget": small_examples[:11], "retain": small_examples[4:], "train": small_examples[:11]}
    data["alternate"] = small_examples[7:]
    ends = []
    for micro, accumulation in ((8, 1), *((8 // c, c) for c in (2, 4, 8))):
        local = small_local(
            per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation, optim="sgd", learning_rate=0.1,
            max_grad_norm=0.5,
        )  # fmt: skip
        g = torch.Generator().manual_seed(0)
        base = snapshot(local.model)
        start = AdapterState({n: t + 0.05 * torch.randn(t.shape, generator=g) for n, t in base.items()})
        reference = AdapterState({n: t + 0.02 * torch.randn(t.shape, generator=g) for n, t in start.items()})
        restore(local.model, start)
        client = Client(local, {"c": ClientData("c", data)}, reference)
        phase = Phase("p", 1, {"c": Work(driver, objective, 2.0)})
        update = client.fit(FitTask(phase, 0, 0), Broadcast(start), "c")
        ends.append((update.adapter, start, update.metrics))
    first = ends[0]
    for adapter, _, metrics in ends[1:]:
        assert metrics | {"seconds": 0.0} == pytest.approx(first[2] | {"seconds": 0.0}, rel=1e-4)
        close(adapter, first[0], atol=2e-6)
    assert moved(first[0], first[1]) > 1e-3


def test_the_trajectory_of_a_run(small_run, tmp_path):
    """Fine-tuning, unlearning and recovery with AdamW; dropout off, since its masks depend on the batch's shape."""
    shape = LoraArgs(r=4, lora_alpha=8, lora_dropout=0.0)
    ends = []
    for micro, accumulation in ((8, 1), (4, 2)):
        args = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation, "adam_epsilon": 1e-4}
        places = [tmp_path / f"{name}{micro}" for name in ("finetune", "unlearn")]
        run(small_run("finetune", places[0], args=args, model_args={"lora_config": shape}))
        begin = {"lora_config": shape, "pretrained_model_name_or_path": str(places[0])}
        run(small_run("unlearn", places[1], args=args, model_args=begin))
        ends.append([read_tensors(p / "adapter_model.safetensors") for p in places])
    for one, two in zip(*ends, strict=True):
        close(one, two, atol=5e-5)
    assert moved(ends[0][1], ends[0][0]) > 5e-3
