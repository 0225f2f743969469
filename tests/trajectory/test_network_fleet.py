"""Runs whose rows lie at sites, over a link in this process: the same adapter as where all rows are in one place."""

from __future__ import annotations

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from unfed.app.network_fleet import for_sites
from unfed.app.rundir import plain
from unfed.app.runs import run
from unfed.app.site import Site, site_config
from unfed.app.tasks import task_message
from unfed.app.worker import Worker, read_config
from unfed.base.artifacts import read_json, read_tensors
from unfed.base.errors import ConfigError, UnfedError
from unfed.base.types import AdapterState, Broadcast
from unfed.config.schema import EngineConfig, ForgetConfig, MethodConfig, PartitionConfig, RecipeConfig
from unfed.config.site import SiteFile
from unfed.data.chat import EncodedExample
from unfed.federated.client import ClientData
from unfed.federated.messages import Message
from unfed.federated.schedule import FitTask, Phase, Work
from unfed.objectives.registry import OBJECTIVES

NETWORK = EngineConfig("nvflare", timeout=60.0)
SITES = ("north", "south", "west")


def weights(directory) -> AdapterState:
    return read_tensors(directory / "adapter_model.safetensors")


def in_one_place(config, manifest, output):
    """The same run with all rows here, dealt as the sites have them."""
    paths = dataclasses.replace(config.paths, output_dir=str(output))
    partition = PartitionConfig(manifest=str(manifest))
    return dataclasses.replace(config, engine=EngineConfig(), partition=partition, paths=paths)


def all_targets(config):
    given = dataclasses.replace(config.trainer.method_args, target_client_idx="all")
    return dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, method_args=given))


@pytest.fixture(scope="module")
def over_the_network(tmp_path_factory, small_run, fleet):
    """The directory of a fine-tuning across the sites, to be read only."""
    network, link = fleet()
    config = small_run("finetune", tmp_path_factory.mktemp("net") / "ft", engine=NETWORK)
    return run(config, network).directory, config, link


def test_fine_tuning_gives_the_adapter_of_a_run_in_one_place_bit_for_bit(over_the_network, tmp_path):
    directory, config, _ = over_the_network
    partition = read_json(directory / "partition.json")
    assert {c: len(ids) for c, ids in partition["clients"].items()} == dict.fromkeys(SITES, 6)
    here = run(in_one_place(config, directory / "partition.json", tmp_path / "here"))
    assert weights(here.directory).digest() == weights(directory).digest()
    record = read_json(directory / "run.json")
    assert set(record["sites"]) == set(SITES)
    assert record["sites"]["north"]["forget"]["rows"] == 3 and "forget" not in record["sites"]["south"]


def test_no_path_no_row_and_no_text_of_the_server_travels(over_the_network, small_base):
    _, config, link = over_the_network
    said = json.dumps([m.head for _, m in link.told])
    for secret in (str(small_base), config.paths.output_dir, config.paths.root_dir, config.task_name):
        assert secret not in said
    # and of a site's rows the server hears ids and numbers alone
    told = json.dumps([Message.unpack(r).head for r in link.results.values()])
    assert "Oslo" not in told and "bread" not in told


@pytest.mark.parametrize("by", ["forget_split", "ids", "clients"])
def test_unlearning_gives_the_adapter_of_a_run_in_one_place_bit_for_bit(
    by, over_the_network, small_run, fleet, tmp_path, small_data
):
    directory, _, _ = over_the_network
    manifest = read_json(directory / "partition.json")["clients"]
    forget = {
        "forget_split": ForgetConfig(),
        "ids": ForgetConfig(ids=(manifest["north"][4], manifest["south"][1])),
        "clients": ForgetConfig(clients=("west",)),
    }[by]
    args = {"pretrained_model_name_or_path": str(directory)}
    config = all_targets(
        small_run(
            "unlearn", tmp_path / "net", model_args=args, engine=NETWORK, forget=forget, method=MethodConfig("DPO")
        )
    )
    network, link = fleet()
    result = run(config, network)
    here = run(in_one_place(config, directory / "partition.json", tmp_path / "here"))
    assert weights(result.directory).digest() == weights(here.directory).digest()
    assert weights(result.directory).digest() != weights(directory).digest()
    asked = read_json(result.directory / "run.json")["forgotten"][0]
    assert asked["clients"] == read_json(here.directory / "run.json")["forgotten"][0]["clients"]
    own = {c: set(ids) for c, ids in manifest.items()}
    for site, message in link.told:
        if message.head["do"] == "open":  # a site hears of its own rows alone
            named = {i for ids in message.head["rows"].values() for i in ids} | set(message.head["own"])
            assert named <= own[site]


def test_retraining_without_the_rows_works_over_a_network(over_the_network, small_run, fleet, capsys, tmp_path):
    """The rows are counted as the request names them, not as the sites' own splits do."""
    directory, _, _ = over_the_network
    args = {"pretrained_model_name_or_path": str(directory)}
    forget = ForgetConfig(clients=("west",))
    config = small_run(
        "unlearn", tmp_path / "net", model_args=args, engine=NETWORK, forget=forget, recipe=RecipeConfig("retrain")
    )
    result = run(config, fleet()[0])
    here = run(in_one_place(config, directory / "partition.json", tmp_path / "here"))
    assert weights(result.directory).digest() == weights(here.directory).digest()
    assert {c for r in result.records for c in r.clients} == {"north", "south"}
    said = capsys.readouterr().err
    assert "north: 6 retain rows\n" in said and "south: 6 retain rows\n" in said and "west: 6 forget rows\n" in said


def test_a_run_that_was_cut_short_goes_on_from_its_last_round(over_the_network, fleet, tmp_path):
    directory, config, _ = over_the_network
    paths = dataclasses.replace(config.paths, output_dir=str(tmp_path / "cut"))
    config = dataclasses.replace(config, paths=paths)
    network, link = fleet()

    class GoneError(Exception):
        pass

    begin = link.begin

    def dies_in_round_two(client_id, message):
        if message.head.get("round") == 1:
            raise GoneError
        return begin(client_id, message)

    link.begin = dies_in_round_two
    with pytest.raises(GoneError):
        run(config, network)
    resumed = run(dataclasses.replace(config, resume=True), fleet()[0])
    assert [r.round for r in resumed.records] == [0, 1]
    assert weights(resumed.directory).digest() == weights(directory).digest()


def test_another_base_model_at_a_site_is_refused_with_both_named(small_run, fleet, make_base, tmp_path):
    other = make_base(tmp_path / "other", seed=1)
    network, _ = fleet({"south": {"base_model": str(other)}})
    with pytest.raises(UnfedError, match=r"south has another base model than the server: its weights: \w+, the"):
        run(small_run("finetune", tmp_path / "ft", engine=NETWORK), network)


def test_another_tokenizer_at_a_site_is_refused(small_run, small_base, fleet, tmp_path):
    other = shutil.copytree(small_base, tmp_path / "other")
    template = other / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8") + " ", encoding="utf-8")
    network, _ = fleet({"west": {"base_model": str(other)}})
    with pytest.raises(UnfedError, match=r"west has another base model than the server: its tokenizer: \w"):
        run(small_run("finetune", tmp_path / "ft", engine=NETWORK), network)


def test_another_release_at_a_site_is_refused_unless_it_may_differ(small_run, fleet, monkeypatch, tmp_path):
    from unfed.app import site

    found = site.versions()
    monkeypatch.setattr(site, "versions", lambda: {**found, "torch": "2.0.1"})
    with pytest.raises(UnfedError, match=r"north has torch 2\.0\.1 and the server 2\."):
        run(small_run("finetune", tmp_path / "ft", engine=NETWORK), fleet()[0])
    config = small_run("finetune", tmp_path / "ft", engine=dataclasses.replace(NETWORK, same_versions=False))
    assert len(run(config, fleet()[0]).records) == 2


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ({"tasks": ("unlearn",)}, "south: it does not permit finetune"),
        ({"datasets": ("muse-bench/MUSE-News",)}, "south: it does not permit the data set 'locuslab/TOFU'"),
        ({"data_dir": "/nowhere"}, "south: DataError; the site's own log says more"),
    ],
)
def test_a_site_that_does_not_permit_or_cannot_says_so_and_no_more(small_run, fleet, tmp_path, file, reason):
    with pytest.raises(UnfedError, match=reason) as raised:
        run(small_run("finetune", tmp_path / "ft", engine=NETWORK), fleet({"south": file})[0])
    assert "nowhere" not in str(raised.value) and not (tmp_path / "ft").exists()


def test_a_site_refuses_to_train_on_few_rows_and_the_round_goes_on(small_run, fleet, tmp_path):
    result = run(small_run("finetune", tmp_path / "ft", engine=NETWORK), fleet({"west": {"smallest_share": 7}})[0])
    assert result.records[0].clients == ("north", "south")
    assert result.records[0].failures == {"west": "it does not train on fewer than 7 rows (smallest_share)"}


def test_one_row_named_often_does_not_pass_for_many(small_run, fleet, tmp_path):
    """A server that names one row of a site seven times, and would get an update of that row."""
    network, link = fleet({"west": {"smallest_share": 3}})
    begin = link.begin

    def greedy(client_id, message):
        if message.head["do"] == "open" and client_id == "west":
            row = message.head["own"][0]
            chosen = {split: [row] * 7 * (split == "train") for split in message.head["rows"]}
            message = Message({**message.head, "rows": chosen, "own": [row] * 7}, message.states)
        return begin(client_id, message)

    link.begin = greedy
    with pytest.raises(UnfedError, match="west: the server names a row twice"):
        run(small_run("finetune", tmp_path / "ft", engine=NETWORK), network)


def test_few_forget_rows_are_not_hidden_by_many_retain_rows(small_base, site_data):
    """Whichever of the two a server makes an epoch of: an update is made of both."""
    site = Site("north", SiteFile(str(site_data["north"]), str(small_base), ("locuslab/TOFU",), smallest_share=3))
    row, state = EncodedExample((1, 2), (1, 2), 1), AdapterState({"x": torch.ones(1)})
    rows = {"forget": [row], "retain": [row] * 9, "train": [row] * 9}
    client = SimpleNamespace(data={"north": ClientData("north", rows)})
    site._worker = Worker(client, state)  # pyright: ignore[reportArgumentType]
    objective = OBJECTIVES["GradDiff"]()
    for driver in ("retain", "forget"):
        task = FitTask(Phase("p", 1, {"north": Work(driver, objective, 1.0)}), 0, 0)
        answer = site.answer(task_message(task, Broadcast(state), "north"))
        assert answer.head == {"refused": "it does not train on fewer than 3 rows (smallest_share)"}


@pytest.mark.parametrize("rows", [None, "ids", {"train": 5}, {"train": "abc"}, {"train": [7]}, {"train": ["a", "a"]}])
def test_a_site_that_describes_its_rows_otherwise_is_named(small_run, fleet, tmp_path, rows):
    network, link = fleet()
    begin = link.begin

    def odd(client_id, message):
        ticket = begin(client_id, message)
        if client_id == "south":
            told = Message.unpack(link.results[client_id])
            link.results[client_id] = Message({**told.head, "rows": rows}).pack()
        return ticket

    link.begin = odd
    with pytest.raises(UnfedError, match="south names its rows by something else than ids, or one of them twice"):
        run(small_run("finetune", tmp_path / "ft", engine=NETWORK), network)


def test_a_loss_that_is_no_number_is_left_out_of_what_a_site_measures(small_run, fleet, monkeypatch, tmp_path):
    """JSON has none: the answer could not be written, and the site's process ended of it."""
    monkeypatch.setattr("unfed.app.site.avg_loss", lambda scores: np.array([np.nan]))
    network, _ = fleet()
    result = run(small_run("finetune", tmp_path / "ft", engine=NETWORK), network)
    told = read_json(result.directory / "run.json")["sites"]
    assert set(told) == set(SITES) and told["north"]["train"] == {"rows": 6}


def test_an_error_at_a_site_travels_as_its_name_alone(small_run, fleet, monkeypatch, tmp_path):
    from unfed.federated.client import Client

    fit = Client.fit

    def broken(self, task, broadcast, client_id):
        if client_id == "south":
            raise RuntimeError("Ana bakes bread in Oslo")
        return fit(self, task, broadcast, client_id)

    monkeypatch.setattr(Client, "fit", broken)
    result = run(small_run("finetune", tmp_path / "ft", engine=NETWORK), fleet()[0])
    assert result.records[1].failures == {"south": "RuntimeError; the site's own log says more"}


def test_a_row_at_two_sites_is_refused(small_run, fleet, site_data, tmp_path):
    both = shutil.copytree(site_data["south"], tmp_path / "both")
    with (both / "tofu" / "full.json").open("a", encoding="utf-8") as f:
        f.write((site_data["north"] / "tofu" / "full.json").read_text(encoding="utf-8").splitlines()[0] + "\n")
    with pytest.raises(UnfedError, match="1 rows of south are at north as well"):
        run(small_run("finetune", tmp_path / "ft", engine=NETWORK), fleet({"south": {"data_dir": str(both)}})[0])


def test_a_site_takes_no_place_from_the_server(small_run, small_base, tmp_path):
    """Whatever a server writes into a run: a site opens its own model and reads its own data, as settings permit."""
    said = for_sites(small_run("finetune", tmp_path / "ft"))
    said["model"]["model_args"] |= {"pretrained_model_name_or_path": "/etc", "lora_model_path": "/etc/passwd"}
    said["model"]["model_args"]["trust_remote_code"] = True
    said["paths"] = {"root_dir": "/", "data_dir": "/", "output_dir": "/x"}
    said["data"]["idk"] = "/etc/passwd"
    file = SiteFile("/own/data", str(small_base), ("locuslab/TOFU",))
    config = site_config(said, file)
    args = config.model.model_args
    assert (args.pretrained_model_name_or_path, args.lora_model_path) == (str(small_base), None)
    assert not args.trust_remote_code and config.data.idk is None
    assert set(vars(config.paths).values()) == {"/own/data"}
    said["data"]["train"]["split"] = "../../elsewhere"
    with pytest.raises(UnfedError, match="is no name"):
        site_config(said, file)


def test_a_site_answers_nothing_but_its_tasks(small_base, site_data, caplog):
    site = Site("north", SiteFile(str(site_data["north"]), str(small_base), ("locuslab/TOFU",)))
    for head in ({}, {"do": "shell"}, {"do": 7}, {"do": "fit"}, {"do": "measure"}, {"do": "open", "config": {}}):
        answer = site.answer(Message(head, {"opened": AdapterState({"x": torch.ones(1)})}))
        assert set(answer.head) == {"refused"} and not answer.states


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"recipe": RecipeConfig("distill")}, "would have to leave their sites"),
        ({"recipe": RecipeConfig("unlearning_adapter")}, "second adapter"),
        ({"forget": ForgetConfig(topics=("bread",))}, "travels as forget.ids"),
        ({"engine": dataclasses.replace(NETWORK, ping=0.0)}, "engine.ping=0"),
        ({"oracle": "auto"}, "a run of its own"),
    ],
)
def test_what_needs_the_rows_at_the_server_is_refused(small_run, tmp_path, given, words):
    from unfed.config.checks_engine import engine_settings

    found = list(engine_settings(small_run("unlearn", tmp_path / "u", **({"engine": NETWORK} | given))))
    assert len(found) == 1 and words in found[0]


def test_a_network_run_is_not_started_by_itself(small_run, tmp_path):
    with pytest.raises(ConfigError, match="unfed network submit"):
        run(small_run("finetune", tmp_path / "ft", engine=NETWORK))


def test_a_configuration_comes_back_from_plain_data(small_run, tmp_path):
    config = small_run("unlearn", tmp_path / "u", forget=ForgetConfig(clients=("west", 1)))
    assert read_config(json.loads(json.dumps(plain(config)))) == config


def test_what_the_sites_measured_is_said_and_an_odd_answer_ends_nothing(small_run, fleet, capsys, tmp_path):
    network, link = fleet({"west": {"tasks": ("finetune",)}})
    begin = link.begin

    def odd(client_id, message):
        ticket = begin(client_id, message)
        if message.head["do"] == "measure" and client_id == "south":
            link.results[client_id] = Message({"measured": {"train": {"probability": "x"}, "forget": 3}}).pack()
        return ticket

    link.begin = odd
    config = small_run(
        "finetune", tmp_path / "ft", engine=NETWORK, method_args={"num_clients": None, "global_rounds": 1}
    )
    assert read_json(run(config, network).directory / "run.json")["status"] == "finished"
    said = capsys.readouterr().err
    assert "north: mean probability of its answers: train 0." in said
    assert "south: mean probability of its answers: not told" in said and "west: mean" not in said
