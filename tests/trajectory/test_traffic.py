"""What ``unfed plan`` says a run will send is what the run then sends."""

from __future__ import annotations

import pytest
import torch

from unfed.app.plan import plan
from unfed.app.runs import run
from unfed.app.traffic import traffic
from unfed.base.artifacts import read_json
from unfed.config.schema import AggregatorConfig, PartitionConfig, WireConfig

THREE_ROUNDS = {"num_clients": 3, "global_rounds": 3}


def sent_and_planned(config):
    rounds = read_json(run(config).directory / "run.json")["rounds"]
    assert len(rounds) == 3 and all(len(r["clients"]) == 3 for r in rounds)
    found = plan(config).sent
    return (sum(r["bytes_up"] for r in rounds), sum(r["bytes_down"] for r in rounds)), (found.up, found.down)


@pytest.mark.parametrize("name", ["fedit", "ffa", "rolora", "fedsa", "fed_sb", "flexlora"])
def test_bytes_of_an_adapter_rule(name, small_run, tmp_path):
    aggregator = AggregatorConfig("FedAvg", {"adapter": name})
    sent, planned = sent_and_planned(
        small_run("finetune", tmp_path / "run", method_args=THREE_ROUNDS, aggregator=aggregator)
    )
    assert sent == planned


def test_bytes_of_unequal_ranks_and_of_control_variates(small_run, tmp_path):
    hetlora = AggregatorConfig("FedAvg", {"adapter": "hetlora", "adapter_args": {"gamma": 1.0}})
    ranks = PartitionConfig(ranks=(1, 2, 4))
    sent, planned = sent_and_planned(
        small_run("finetune", tmp_path / "ranks", method_args=THREE_ROUNDS, aggregator=hetlora, partition=ranks)
    )
    assert sent == planned
    assert sent[0] < 3 * 9 * 4 * 1000
    scaffold = AggregatorConfig("Scaffold", {})
    sent, planned = sent_and_planned(
        small_run("finetune", tmp_path / "scaffold", method_args=THREE_ROUNDS, aggregator=scaffold)
    )
    assert sent == planned


@pytest.mark.parametrize("name", ["flora", "fedex"])
def test_what_lies_beneath_is_counted_at_its_greatest(name, small_run, tmp_path):
    aggregator = AggregatorConfig("FedAvg", {"adapter": name})
    sent, planned = sent_and_planned(
        small_run("finetune", tmp_path / "run", method_args=THREE_ROUNDS, aggregator=aggregator)
    )
    assert sent[0] == planned[0]
    assert sent[1] <= planned[1] < 1.5 * sent[1]


def test_bytes_of_a_wire_but_for_headers(small_run, tmp_path):
    wire = WireConfig("int8", {"down": "bfloat16"})
    sent, planned = sent_and_planned(small_run("finetune", tmp_path / "run", method_args=THREE_ROUNDS, wire=wire))
    headers = 3 * 3 * 4000
    assert all(0 < real - said < headers for real, said in zip(sent, planned, strict=True))


def test_traffic_by_hand(small_run, tmp_path):
    """A 4 x 10 and a 6 x 4 factor, two clients, three rounds: 64 values each way and time; beneath, the matrix of
    6 x 10 has at most rank 6, reached by two clients of rank 4 after the first round: 6 * 16 values."""
    shapes = {"m.lora_A.weight": torch.Size((4, 10)), "m.lora_B.weight": torch.Size((6, 4))}
    clients = ("client_0", "client_1")

    def of(**given):
        config = small_run("finetune", tmp_path / "never", method_args={"num_clients": 2}, **given)
        found = traffic(config, shapes, torch.float32, clients, 3)
        return found.up, found.down

    assert of() == (3 * 2 * 64 * 4, 3 * 2 * 64 * 4)
    assert of(wire=WireConfig("bfloat16", {"down": "bfloat16"})) == (3 * 2 * 64 * 2, 3 * 2 * 64 * 2)
    assert of(wire=WireConfig("topk", {"fraction": 0.05})) == (pytest.approx(3 * 2 * 64 * 0.3), 3 * 2 * 64 * 4)
    flora = AggregatorConfig("FedAvg", {"adapter": "flora"})
    assert of(aggregator=flora) == (3 * 2 * 64 * 4, 2 * 4 * (3 * 64 + 0 + 96 + 96))
    fed_sb = AggregatorConfig("FedAvg", {"adapter": "fed_sb"})
    assert of(aggregator=fed_sb) == (3 * 2 * 16 * 4, 3 * 2 * 16 * 4)
    rolora = AggregatorConfig("FedAvg", {"adapter": "rolora"})
    assert of(aggregator=rolora) == (2 * 4 * (24 + 40 + 24), 3 * 2 * 64 * 4)
