"""Adapters of the clients' own, end to end: FedSA-LoRA and local fine-tuning after the last round."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from unfed.app.runs import run
from unfed.base.artifacts import read_json, read_tensors
from unfed.config.schema import AggregatorConfig, MethodConfig, PersonaliseConfig, RecipeConfig
from unfed.models.spec import ADAPTER_WEIGHTS

FEDSA = AggregatorConfig("FedAvg", {"adapter": "fedsa", "server_lr": 1.0})
NAMES = ("client_0", "client_1", "client_2")


def weights(place: Path):
    return read_tensors(place / ADAPTER_WEIGHTS)


def parts(state, factor: str) -> dict[str, torch.Tensor]:
    return {n: t for n, t in state.items() if f".lora_{factor}." in n}


@pytest.fixture(scope="module")
def shared(small_run, tmp_path_factory) -> Path:
    """A finished fine-tuning with FedSA."""
    return run(small_run("finetune", tmp_path_factory.mktemp("fedsa") / "run", aggregator=FEDSA)).directory


def test_one_a_for_all_a_b_for_each_and_the_mean_on_top(shared, small_base) -> None:
    top, own = weights(shared), {c: weights(shared / "clients" / c) for c in NAMES}
    record = read_json(shared / "run.json")
    counts = {c: len(ids) for c, ids in read_json(shared / "partition.json")["clients"].items()}
    for name, a in parts(top, "A").items():
        assert all(torch.equal(a, state[name]) for state in own.values())
    for name, b in parts(top, "B").items():
        assert len({state[name].numpy().tobytes() for state in own.values()}) == 3  # each its own
        mean = sum(own[c][name].double() * counts[c] for c in NAMES) / sum(counts.values())
        assert torch.allclose(b.double(), mean, atol=1e-7, rtol=1e-5)
    a_bytes, b_bytes = (sum(t.numel() * 4 for t in parts(top, f).values()) for f in "AB")
    assert [(r["bytes_down"], r["bytes_up"]) for r in record["rounds"]] == [(3 * a_bytes, 3 * a_bytes)] * 2
    assert record["beside_rounds"] == {"served": {"bytes_up": 3 * b_bytes, "bytes_down": 0}}
    made = record["personal"]
    assert made["rule"] == "fedsa" and made["epochs"] == 0
    assert {c: e["adapter"] for c, e in made["clients"].items()} == {c: own[c].digest() for c in NAMES}
    assert made["before_mean"] == pytest.approx(sum(e["before"] for e in made["clients"].values()) / 3)
    for client in NAMES:
        place = shared / "clients" / client
        assert place.stat().st_mode & 0o777 == 0o700
        assert all(f.stat().st_mode & 0o777 == 0o600 for f in place.rglob("*") if f.is_file())
        opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(small_base), str(place))
        live = {n.replace(".default", ""): p for n, p in opened.named_parameters() if "lora_" in n}
        assert all(torch.equal(live[n], t) for n, t in own[client].items())


def test_a_killed_run_goes_on_to_the_same_bytes(small_run, shared, tmp_path, resumed_after_a_round) -> None:
    config = small_run("finetune", tmp_path / "run", aggregator=FEDSA)
    resumed_after_a_round(config)
    for place in (".", *(f"clients/{c}" for c in NAMES)):
        assert weights(tmp_path / "run" / place).digest() == weights(shared / place).digest()


def test_a_client_leaves_with_its_b(small_run, tmp_path, capsys) -> None:
    """The target owns nothing but forget rows: its B is no part of what is served, and it has no adapter any more."""
    made = replace(small_run("finetune", tmp_path / "x").partition, target_shares=False)
    source = run(small_run("finetune", tmp_path / "source", aggregator=FEDSA, partition=made)).directory
    args = {"pretrained_model_name_or_path": str(source)}
    given = {"model_args": args, "aggregator": FEDSA, "method": MethodConfig("GradAscent")}
    left = run(small_run("unlearn", tmp_path / "left", **given)).directory
    target = read_json(left / "run.json")["recipe"]["targets"]
    assert target == ["client_0"]
    assert {d.name for d in (left / "clients").iterdir() if (d / ADAPTER_WEIGHTS).is_file()} == {"client_1", "client_2"}
    counts = {c: len(ids) for c, ids in read_json(left / "partition.json")["clients"].items()}
    top, own = weights(left), {c: weights(left / "clients" / c) for c in ("client_1", "client_2")}
    for name, b in parts(top, "B").items():
        mean = sum(own[c][name].double() * counts[c] for c in own) / sum(counts[c] for c in own)
        assert torch.allclose(b.double(), mean, atol=1e-7, rtol=1e-5)
        # Each went on from its own B: a step or two of 1e-2 from it, and further from the others' mean.
        for client in own:
            ours = weights(source / "clients" / client)[name]
            assert torch.dist(own[client][name], ours) < torch.dist(own[client][name], weights(source)[name])
    said = " ".join(capsys.readouterr().err.split())
    assert "must be deleted" in said and any("must be deleted" in w for w in read_json(left / "run.json")["warnings"])


def test_retraining_without_the_target_is_exact(small_run, shared, tmp_path) -> None:
    """The oracle of a client's deletion: the others' training, which never saw it, down to their own B."""
    args = {"pretrained_model_name_or_path": str(shared)}
    again = run(small_run("unlearn", tmp_path / "again", model_args=args, recipe=RecipeConfig("retrain"))).directory
    record = read_json(again / "run.json")
    assert record["recipe"]["promise"]["kind"] == "exact" and record["personal"]["rule"] == "fedsa"
    forgotten = set(json.loads((again / "run.json").read_text())["forgotten"][0]["ids"])
    seen = set(read_json(again / "train_rows.json"))
    assert seen and not seen & forgotten


def test_local_fine_tuning_after_the_last_round(small_run, finetuned, tmp_path) -> None:
    """The served adapter is the one that it would have been, and every client does better on its own rows."""
    made = run(small_run("finetune", tmp_path / "run", personalise=PersonaliseConfig(4.0))).directory
    assert weights(made).digest() == weights(finetuned).digest()
    personal = read_json(made / "run.json")["personal"]
    assert personal["rule"] is None and personal["epochs"] == 4.0 and set(personal["clients"]) == set(NAMES)
    for client, entry in personal["clients"].items():
        assert entry["after"] > entry["before"]
        assert weights(made / "clients" / client).digest() == entry["adapter"] != weights(made).digest()
    assert "beside_rounds" not in read_json(made / "run.json")  # nothing of it travels
    # Adding it to a finished training changes neither the rounds nor what is served.
    later = small_run("finetune", tmp_path / "later")
    run(later)
    run(replace(later, resume=True, personalise=PersonaliseConfig(4.0)))
    assert read_json(tmp_path / "later" / "run.json")["personal"]["clients"] == personal["clients"]


def test_after_unlearning_clients_are_fine_tuned_on_what_is_retained(from_finetuned, tmp_path) -> None:
    made = run(from_finetuned(tmp_path / "run", personalise=PersonaliseConfig(1.0))).directory
    plain = run(from_finetuned(tmp_path / "plain")).directory
    assert weights(made).digest() == weights(plain).digest()
    assert set(read_json(made / "run.json")["personal"]["clients"]) <= set(NAMES)


def test_it_goes_on_from_what_is_served_where_that_is_made_of_parts(small_run, small_base, tmp_path) -> None:
    """FLoRA's served adapter is a stack: the clients' own have its shape, and the stack is back in its place after."""
    rule = AggregatorConfig("FedAvg", {"adapter": "flora"})
    made = run(small_run("finetune", tmp_path / "run", aggregator=rule, personalise=PersonaliseConfig(1.0))).directory
    record, top = read_json(made / "run.json"), weights(made)
    assert top.digest() == record["adapter"]
    for client, entry in record["personal"]["clients"].items():
        own = weights(made / "clients" / client)
        assert {n: t.shape for n, t in own.items()} == {n: t.shape for n, t in top.items()}
        assert own.digest() == entry["adapter"] != top.digest()
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(small_base), str(made / "clients" / client))
