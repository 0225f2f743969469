"""Evaluation between rounds: what it finds, that training does not notice it, and that a resumed run keeps it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from unfed.app.runs import run
from unfed.base.artifacts import read_json, read_tensors
from unfed.base.errors import ConfigError
from unfed.config.schema import AggregatorConfig, EvalConfig
from unfed.config.schema_eval import GenerationConfig
from unfed.data.chat import encode_rows
from unfed.data.datasets import DatasetSpec, load_rows
from unfed.data.spec import Template
from unfed.federated import rounds as federated_rounds

SUITE = EvalConfig(
    forget_split="forget01", metrics=("forget_Q_A_Prob",), round_metrics=("forget_Q_A_Prob",), round_limit=4,
    generation=GenerationConfig(max_new_tokens=4), max_length=96,
)  # fmt: skip


@pytest.fixture(scope="module")
def data(small_data, tmp_path_factory) -> Path:
    """The small data with what the evaluation reads."""
    root = tmp_path_factory.mktemp("between")
    (root / "tofu").mkdir()
    for file in (small_data / "tofu").glob("*.json"):
        (root / "tofu" / file.name).write_text(file.read_text())
    (root / "tofu" / "forget01_perturbed.json").write_text((small_data / "tofu" / "forget01.json").read_text())
    return root


def given(config, data: Path, strategy: str):
    trainer = replace(config.trainer, args={**config.trainer.args, "eval_strategy": strategy})
    return replace(config, eval=SUITE, trainer=trainer, paths=replace(config.paths, data_dir=str(data)))


def by_hand(directory: Path, base: Path, rows: list) -> float:
    """Mean of exp(mean log-probability) of the answers, one after the other."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(directory)).eval()
    values = []
    for e in encode_rows(tokenizer, Template(), rows, 96):
        ids = torch.tensor([e.input_ids])
        with torch.no_grad():
            logps = model(ids).logits[0, :-1].float().log_softmax(-1)
        own = [float(logps[k - 1, e.input_ids[k]]) for k in range(e.prompt_len, len(e))]
        values.append(np.exp(np.mean(own)))
    return float(np.mean(values))


def test_rounds_are_looked_at_and_training_does_not_notice(small_run, small_base, data, tmp_path):
    with_it = run(given(small_run("finetune", tmp_path / "with"), data, "round"))
    without = run(given(small_run("finetune", tmp_path / "without"), data, "no"))
    files = [read_tensors(d / "adapter_model.safetensors").digest() for d in (with_it.directory, without.directory)]
    assert files[0] == files[1]
    found = read_json(tmp_path / "with" / "run.json")["evaluations"]
    assert [(e["round"], e["phase"]) for e in found] == [(0, "start"), (1, "finetune"), (2, "finetune")]
    assert "evaluations" not in read_json(tmp_path / "without" / "run.json")

    last = found[-1]
    rows = load_rows(DatasetSpec("locuslab/TOFU", "forget01_perturbed", limit=4), data)
    assert last["scores"]["forget_Q_A_Prob"] == pytest.approx(by_hand(with_it.directory, small_base, rows), rel=1e-4)
    full = {r["id"]: r for r in load_rows(DatasetSpec("locuslab/TOFU", "full"), data)}
    clients = read_json(tmp_path / "with" / "partition.json")["clients"]
    for client, ids in clients.items():
        own = [full[i] for i in sorted(ids)[:4]]
        assert last["clients"][client] == pytest.approx(by_hand(with_it.directory, small_base, own), rel=1e-4)
    values = list(last["clients"].values())
    assert last["client_mean"] == pytest.approx(sum(values) / 3) and last["client_worst"] == min(values)
    assert last["client_gap"] == pytest.approx(max(values) - min(values))


def test_phases_and_a_tracker(from_finetuned, data, tmp_path):
    config = given(from_finetuned(tmp_path / "u", args={"report_to": "tensorboard"}), data, "phase")
    run(config)
    found = read_json(tmp_path / "u" / "run.json")["evaluations"]
    assert [(e["round"], e["phase"]) for e in found] == [(0, "start"), (1, "unlearn"), (3, "recover")]
    events = b"".join(p.read_bytes() for p in (tmp_path / "u" / "logs").rglob("events*"))
    assert b"eval/forget_Q_A_Prob" in events and b"eval/client_worst" in events


def test_a_resumed_run_keeps_what_was_found(small_run, data, tmp_path, monkeypatch):
    whole = run(given(small_run("finetune", tmp_path / "whole"), data, "round"))
    advance = federated_rounds._finish

    def stop_at_two(task, *rest):
        if task.round == 1:
            raise KeyboardInterrupt
        return advance(task, *rest)

    cut = given(small_run("finetune", tmp_path / "cut"), data, "round")
    monkeypatch.setattr(federated_rounds, "_finish", stop_at_two)
    with pytest.raises(KeyboardInterrupt):
        run(cut)
    monkeypatch.undo()
    record = read_json(tmp_path / "cut" / "run.json")
    assert [e["round"] for e in record["evaluations"]] == [0, 1]
    record["evaluations"].pop()  # as if it had been killed before it looked
    (tmp_path / "cut" / "run.json").write_text(json.dumps(record))
    run(replace(cut, resume=True))
    found = [read_json(d / "run.json")["evaluations"] for d in (tmp_path / "cut", whole.directory)]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("strategy", "said"),
    [("steps", r"eval_strategy=steps: between rounds.*choices: no, phase, round"), ("rounds", "did you mean 'round'")],
)
def test_other_strategies_are_refused(small_run, data, tmp_path, strategy, said):
    with pytest.raises(ConfigError, match=said):
        run(given(small_run("finetune", tmp_path / "x"), data, strategy))


def test_clients_that_keep_a_factor_are_scored_with_it(small_run, data, tmp_path):
    """FedSA: after the last round the clients' scores are those of their own adapters, the others of what is served."""
    config = small_run("finetune", tmp_path / "run", aggregator=AggregatorConfig("FedAvg", {"adapter": "fedsa"}))
    run(given(config, data, "round"))
    record = read_json(tmp_path / "run" / "run.json")
    last, own = record["evaluations"][-1], record["personal"]["clients"]
    assert last["clients"] == pytest.approx({c: e["after"] for c, e in own.items()})
    assert last["clients"] != pytest.approx({c: e["before"] for c, e in own.items()})
    assert last["scores"]["forget_Q_A_Prob"] != record["evaluations"][0]["scores"]["forget_Q_A_Prob"]
