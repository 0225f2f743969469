"""Three engines, one result: the same fine-tuning and unlearning in one process, on Ray workers, and across the sites
of an NVFlare network (processes of their own, mutual TLS). Needs both extras, and takes minutes."""

from __future__ import annotations

import importlib.util

import pytest
from network_fixtures import SITES, TRAINING, Network, unfed

from unfed.base.artifacts import read_json

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("nvflare", "ray")),
        reason="NVFlare or Ray is not installed (unfed[network,ray])",
    ),
]
MODEL = "model.model_args.pretrained_model_name_or_path="
HERE = {"inprocess": (), "ray": ("engine=ray", "engine.workers=2")}
"""Engines whose rows lie in one place, where the network's lie at its sites."""


def compared(network: Network, name: str) -> tuple[dict[str, str], dict[str, list]]:
    """Each engine's weights, and what its rounds say but how long they took."""
    found, rounds = {}, {}
    for engine in ("nvflare", *HERE):
        found[engine] = network.weights(f"{name}/{engine}")
        record = read_json(network.place / "saves" / name / engine / "run.json")["rounds"]
        rounds[engine] = [
            (r["clients"], r["adapter_after"], {c: m["loss"] for c, m in r["metrics"].items()}) for r in record
        ]
    return found, rounds


def all_one(values: dict) -> bool:
    return all(value == values["inprocess"] for value in values.values())


def test_the_engines_give_equal_adapters(network, small_base):
    base, rounds = f"{MODEL}{small_base}", ("forget_split=forget01", "trainer.method_args.global_rounds=2")
    network.submit(base, "task_name=nvflare", *rounds)
    dealt = ("partition.manifest=saves/finetune/nvflare/partition.json", "paths.data_dir=data")
    for name, engine in HERE.items():
        unfed("train", *TRAINING, base, f"task_name={name}", *rounds, *dealt, *engine, cwd=network.place)
    learnt, learning = compared(network, "finetune")
    assert all_one(learnt) and all_one(learning)
    assert [clients for clients, *_ in learning["ray"]] == [list(SITES)] * 2

    forgetting = ("method=NPO", "forget_split=forget01", "retain_split=retain99", "trainer.method_args.global_rounds=1")
    network.submit(f"{MODEL}saves/finetune/nvflare", "task_name=nvflare", *forgetting, config="unlearn-lora.yaml")
    everybody = ("trainer.method_args.target_client_idx=all", "paths.data_dir=data")
    for name, engine in HERE.items():
        start = f"{MODEL}saves/finetune/{name}"
        words = ("unlearn", *TRAINING, start, f"task_name={name}", *forgetting, *everybody, *engine)
        unfed(*words, cwd=network.place)
    forgot, forgetting = compared(network, "unlearn")
    assert all_one(forgot) and all_one(forgetting)
    assert forgot["ray"] != learnt["ray"]
    assert [clients for clients, *_ in forgetting["ray"]] == [["site-1", "site-3"], list(SITES)]
