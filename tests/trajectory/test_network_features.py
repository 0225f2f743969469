"""Server rules, adapter rules, privacy, robust rules, sampling and recipes across sites: each as in one place."""

from __future__ import annotations

import dataclasses

import pytest

from unfed.app.runs import run
from unfed.base.artifacts import read_json, read_tensors
from unfed.base.types import AdapterState
from unfed.config.schema import (
    AggregatorConfig,
    ClientsConfig,
    EngineConfig,
    ForgetConfig,
    HistoryConfig,
    PartitionConfig,
    PrivacyConfig,
    RecipeConfig,
    RobustConfig,
    WireConfig,
)
from unfed.federated.messages import Message

SITES = ("north", "south", "west")
NETWORK = EngineConfig("nvflare", timeout=60.0)


def weights(directory) -> str:
    return read_tensors(directory / "adapter_model.safetensors").digest()


def both(config, fleet, place, manifest=None):
    """The directories of a run across the sites, and of the same run with all rows here."""
    paths = dataclasses.replace(config.paths, output_dir=str(place / "net"))
    far = run(dataclasses.replace(config, engine=NETWORK, paths=paths), fleet()[0])
    paths = dataclasses.replace(config.paths, output_dir=str(place / "here"))
    partition = dataclasses.replace(config.partition, manifest=str(manifest or far.directory / "partition.json"))
    near = run(dataclasses.replace(config, partition=partition, paths=paths))
    return far, near


def rule(name="FedAvg", **params):
    return {"aggregator": AggregatorConfig(name, params)}


def adapter(name, **params):
    return rule(adapter=name, **params)


def privacy(kind, **params):
    return {"privacy": PrivacyConfig(kind, params)}


def wire(name, **params):
    return {"wire": WireConfig(name, params)}


FINETUNING = {
    "scaffold": rule("Scaffold"),
    "fednova": rule("FedNova"),
    "flora": adapter("flora"),
    "fedex": adapter("fedex"),
    "hetlora": adapter("hetlora") | {"partition": PartitionConfig(ranks=(4, 2, 1))},
    "flexlora": adapter("flexlora") | {"partition": PartitionConfig(ranks=(4, 2, 1))},
    "lora_fair": adapter("lora_fair"),
    "ffa": adapter("ffa"),
    "rolora": adapter("rolora"),
    "central": rule(weighting="uniform") | privacy("central", clip=0.5, noise_multiplier=0.1),
    "local": privacy("local", clip=0.5, noise_multiplier=0.1),
    "example": privacy("example", clip=0.5, noise_multiplier=0.1),
    "bfloat16": wire("bfloat16", down="bfloat16"),
    "int8": wire("int8", rounding="stochastic"),
    "topk": wire("topk", fraction=0.1, down="bfloat16"),
    "float32 up, bfloat16 down": wire("float32", down="bfloat16"),
    "topk and scaffold": wire("topk", down="bfloat16") | rule("Scaffold"),
    "int8 and fedex": wire("int8", down="bfloat16") | adapter("fedex"),
    "int8 and hetlora": wire("int8", down="bfloat16")
    | adapter("hetlora")
    | {"partition": PartitionConfig(ranks=(4, 2, 1))},
    "median": {"robust": RobustConfig("median")},
    "trimmed_mean": {"robust": RobustConfig("trimmed_mean", {"trim": 0.34})},
    "krum": {"robust": RobustConfig("krum", {"num_byzantine": 0})},
    "multi_krum": {"robust": RobustConfig("multi_krum", {"num_byzantine": 0, "m": 2})},
    "norm_clipping": {"robust": RobustConfig("norm_clipping")},
    "screening": {"robust": RobustConfig("screening", max_norm_ratio=3.0)},
    "sampling": {
        "clients": ClientsConfig(sampling="by_size", number=2, local_steps=1),
        "method_args": {"global_rounds": 4, "num_clients": None},
    },
    "turnout": {
        "clients": ClientsConfig(oversample=1.5, number=2, dropout=0.2, speed={"north": 4.0}, deadline=1000.0),
        "method_args": {"global_rounds": 4, "num_clients": None, "min_clients": 1},
    },
}


QUICK = ("scaffold", "hetlora", "local", "topk", "int8 and hetlora", "median", "turnout")
"""The others are slow tests: together they take a minute."""


def some(names, quick):
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.mark.parametrize("name", some(FINETUNING, QUICK))
def test_fine_tuning_is_as_in_one_place(name, small_run, fleet, tmp_path):
    given = {"method_args": {"global_rounds": 3, "num_clients": None}} | FINETUNING[name]
    far, near = both(small_run("finetune", tmp_path / "run", **given), fleet, tmp_path)
    assert [r.failures for r in far.records] == [r.failures for r in near.records]
    assert [(r.clients, r.bytes_up, r.bytes_down) for r in far.records] == [
        (r.clients, r.bytes_up, r.bytes_down) for r in near.records
    ]
    assert weights(far.directory) == weights(near.directory)


@pytest.fixture(scope="module")
def learned(tmp_path_factory, small_run, fleet):
    """A fine-tuning across the sites whose history is kept whole."""
    place = tmp_path_factory.mktemp("learned")
    history = HistoryConfig(("rounds", "updates", "sums"))
    method_args = {"global_rounds": 3, "num_clients": None}
    config = small_run("finetune", place / "ft", method_args=method_args, history=history)
    far, near = both(config, fleet, place)
    assert weights(far.directory) == weights(near.directory)
    return far.directory


RECIPES = ("interleaved", "retrain", "rollback", "federaser", "pga", "fedosd", "subtract", "not_lora")


@pytest.mark.parametrize("name", some(RECIPES, ("interleaved", "federaser")))
def test_recipes_are_as_in_one_place(name, learned, small_run, fleet, tmp_path):
    given = {
        "model_args": {"pretrained_model_name_or_path": str(learned)},
        "recipe": RecipeConfig(name),
        "forget": ForgetConfig(clients=("west",)),
        "method_args": {"target_client_idx": "all", "unlearn_epochs": 1, "global_rounds": 1},
    }
    far, near = both(small_run("unlearn", tmp_path / "run", **given), fleet, tmp_path, learned / "partition.json")
    assert weights(far.directory) == weights(near.directory) != weights(learned)
    assert (
        read_json(far.directory / "run.json")["recipe"]["promise"]
        == (read_json(near.directory / "run.json")["recipe"]["promise"])
    )


@pytest.mark.parametrize("name", ["scaffold", "topk"])
def test_a_run_that_was_cut_short_finds_what_its_sites_kept(name, small_run, fleet, tmp_path):
    """Sites that were started again read their control variates, and what the wire lost, from their own state."""
    given = {"method_args": {"global_rounds": 4, "num_clients": None}, "engine": NETWORK} | FINETUNING[name]
    whole = run(small_run("finetune", tmp_path / "whole", **given), fleet()[0])
    states = {s: {"state": str(tmp_path / s)} for s in SITES}
    network, link = fleet(states)
    begin = link.begin

    def dies_in_round_three(client_id, message):
        if message.head.get("round") == 2 and client_id == "south":
            raise KeyboardInterrupt
        return begin(client_id, message)

    link.begin = dies_in_round_three
    config = small_run("finetune", tmp_path / "cut", **given)
    with pytest.raises(KeyboardInterrupt):
        run(config, network)
    resumed = run(dataclasses.replace(config, resume=True), fleet(states)[0])
    assert [r.round for r in resumed.records] == [0, 1, 2, 3]
    assert weights(resumed.directory) == weights(whole.directory)
    kept = [f for s in SITES for f in (tmp_path / s).rglob("*.safetensors")]
    assert kept and all(f.stat().st_mode & 0o777 == 0o600 for f in kept)
    again = run(small_run("finetune", tmp_path / "cut", **given), fleet(states)[0])  # another run of the same name
    assert weights(again.directory) == weights(whole.directory)


def test_bytes_that_are_no_change_of_the_wires_are_one_clients_failure(small_run, fleet, tmp_path):
    network, link = fleet()
    begin = link.begin

    def spoiled(client_id, message):
        ticket = begin(client_id, message)
        if message.head["do"] == "fit" and client_id == "west":
            answer = Message.unpack(link.results[client_id])
            half = answer.states["up"]["bytes"][:-40].clone()
            link.results[client_id] = Message(answer.head, {"up": AdapterState({"bytes": half})}).pack()
        return ticket

    link.begin = spoiled
    config = small_run("finetune", tmp_path / "run", engine=NETWORK, wire=WireConfig("int8"))
    found = run(config, network).records[0]
    assert found.clients == ("north", "south")
    assert found.failures["west"].startswith("its change is not what wire=int8 makes")
