"""Runs whose clients are dealt to workers, over a pool in this process: in every setting the result of one process.

What Ray itself does is in ``test_ray.py``; here a worker is an object, and all that passes is bytes.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from contextlib import contextmanager

import pytest
import torch

from unfed.app.errands import read_rows, rows_message
from unfed.app.fleet import Fleet
from unfed.app.ray_fleet import RayFleet
from unfed.app.ray_worker import open_worker
from unfed.app.rundir import training_identity
from unfed.app.runs import run
from unfed.base.artifacts import read_json, read_tensors
from unfed.base.errors import UnfedError
from unfed.config.checks_engine import engine_settings
from unfed.config.schema import (
    AggregatorConfig,
    EngineConfig,
    HistoryConfig,
    HostileConfig,
    PartitionConfig,
    PersonaliseConfig,
    PrivacyConfig,
    RecipeConfig,
    RobustConfig,
    WireConfig,
    WrapperConfig,
)
from unfed.config.schema_clients import ClientsConfig
from unfed.federated.client import Client, ClientData
from unfed.federated.messages import Message
from unfed.federated.pool import WorkerDiedError

RAY = EngineConfig("ray", workers=2)


class Pool:
    """Workers in this process; the last one begun ends first. ``kills``: (round, client), as often as it takes its
    worker with it."""

    def __init__(self, opening, size, kills=()):
        self.size, self.opening, self.kills, self.workers, self.did = size, opening, list(kills), {}, []

    def start(self, worker):
        self.workers[worker] = open_worker(Message.unpack(self.opening))
        return ("told", self.workers[worker].told.pack(), worker)

    def share(self, message):
        return message.pack()

    def begin(self, worker, message, shared):
        packed = message.pack()
        if (who := (message.head["round"], message.head["client"])) in self.kills:
            self.kills.remove(who)
            return ("dead", len(self.did), len(self.kills))
        self.did.append((worker, *who))
        answer = self.workers[worker].answer(Message.unpack(packed), Message.unpack(shared))
        return ("done", answer.pack(), len(self.did))

    def wait(self, handles, seconds):
        return handles[-1]

    def check(self, handle):
        if handle[0] == "dead":
            raise WorkerDiedError("killed")

    def answer(self, handle):
        self.check(handle)
        return Message.unpack(handle[1])


@pytest.fixture
def dealt():
    """A fleet whose pools are in this process; ``pools`` are those that it has made."""

    def make(kills=(), pools=None):
        @contextmanager
        def pool(config, opening, most):
            made = Pool(opening.pack(), min(config.engine.workers or 1, most), kills)
            if pools is not None:
                pools.append(made)
            yield made

        return RayFleet(pool)

    return make


def same(result, other):
    """The adapters, and what is recorded of the rounds but how long they took."""

    def records(r):
        rounds = [dict(e) for e in read_json(r.directory / "run.json")["rounds"]]
        for entry in rounds:
            entry.pop("seconds")
            for metrics in entry["metrics"].values():
                metrics.pop("seconds")
        return rounds

    def weights(r):
        found = r.directory / "adapter_model.safetensors"
        return read_tensors(found if found.exists() else r.directory / "model.safetensors").digest()

    assert weights(result) == weights(other)
    assert records(result) == records(other)


def adapter(name, **args):
    return AggregatorConfig("FedAvg", {"adapter": name, **args})


PATTERN = {
    "scaffold": {"aggregator": AggregatorConfig("Scaffold")},
    "topk": {"wire": WireConfig("topk", {"fraction": 0.1, "down": "bfloat16"})},
    "fedsa": {"aggregator": adapter("fedsa")},
    "fed_sb": {"aggregator": adapter("fed_sb", adapter_args={"init_rows": 4})},
    "flora": {"aggregator": adapter("flora")},
}
"""Settings of a fine-tuning in which something travels or stays beside the adapter."""
MORE = {
    "fedex": {"aggregator": adapter("fedex"), "personalise": PersonaliseConfig(1.0)},
    "rolora": {"aggregator": adapter("rolora")},
    "FedYogi": {"aggregator": AggregatorConfig("FedYogi")},
    "FedProx": {"aggregator": AggregatorConfig("FedProx")},
    "FedNova": {"aggregator": AggregatorConfig("FedNova"), "clients": ClientsConfig(dropout=0.3)},
    "hetlora": {"aggregator": adapter("hetlora"), "partition": PartitionConfig(ranks=(4, 2, 1))},
    "int8": {"wire": WireConfig("int8"), "aggregator": AggregatorConfig("Scaffold")},
    "fltrust": {"robust": RobustConfig("fltrust", root=4)},
    "krum": {"robust": RobustConfig("median"), "hostile": HostileConfig("random"), "method_args": {"num_clients": 5}},
    "label_flip": {"hostile": HostileConfig("label_flip")},
    "local": {"privacy": PrivacyConfig("local", {"clip": 1.0, "noise_multiplier": 0.1})},
    "example": {"privacy": PrivacyConfig("example", {"clip": 1.0, "noise_multiplier": 0.5})},
    "isolated": {"recipe": RecipeConfig("isolated", {"shards": 2}), "method_args": {"num_clients": 4}},
    "full": {"model_args": {"use_lora": False, "lora_config": None}, "args": {"learning_rate": 1e-3}},
    "half": {"args": {"bf16": True, "gradient_checkpointing": True}},
}


def both(small_run, dealt, place, mode, pools=None, **given):
    here = run(small_run(mode, place / "here", **given))
    with_workers = run(small_run(mode, place / "dealt", engine=RAY, **given), dealt(pools=pools))
    same(with_workers, here)
    return with_workers.directory


def test_fine_tuning_gives_the_adapter_of_one_process_bit_for_bit(small_run, dealt, finetuned, tmp_path):
    pools = []
    result = run(small_run("finetune", tmp_path / "ft", engine=RAY), dealt(pools=pools))
    assert read_tensors(result.directory / "adapter_model.safetensors").digest() == (
        read_tensors(finetuned / "adapter_model.safetensors").digest()
    )
    assert {w for w, *_ in pools[0].did} == {0, 1} and len(pools[0].did) == 6


@pytest.mark.parametrize("name", PATTERN)
def test_what_stays_at_a_client_or_lies_beneath_the_adapter_goes_with_it_to_any_worker(
    small_run, dealt, tmp_path, name
):
    pools = []
    given = {"method_args": {"num_clients": 3, "global_rounds": 3}, **PATTERN[name]}
    both(small_run, dealt, tmp_path, "finetune", pools, **given)
    places = {}
    for worker, _, client in pools[0].did:
        places.setdefault(client, set()).add(worker)
    assert any(len(found) == 2 for found in places.values())  # a client was at either worker


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_every_setting_of_a_fine_tuning_is_that_of_one_process(small_run, dealt, tmp_path, name):
    both(small_run, dealt, tmp_path, "finetune", **MORE[name])


@pytest.mark.parametrize(
    "given",
    [
        {"recipe": RecipeConfig("unlearning_adapter", {"r": 3, "lora_alpha": 5})},
        {"method": ("DPO", {}), "wrapper": WrapperConfig("EWC", {"fisher_rows": 2})},
    ],
    ids=["unlearning_adapter", "DPO"],
)
def test_unlearning_gives_the_adapter_of_one_process(small_run, dealt, finetuned, tmp_path, given):
    args = {"pretrained_model_name_or_path": str(finetuned)}
    both(small_run, dealt, tmp_path, "unlearn", model_args=args, **given)


@pytest.fixture(scope="module")
def with_history(tmp_path_factory, small_run):
    """A fine-tuning that kept everything, whose first client owns the forget rows and nothing else."""
    place, whole_client = tmp_path_factory.mktemp("kept") / "ft", PartitionConfig(target_shares=False)
    config = small_run("finetune", place, method_args={"num_clients": 4, "global_rounds": 3}, partition=whole_client)
    return run(dataclasses.replace(config, history=HistoryConfig(("rounds", "updates", "sums")))).directory


RECIPES = {
    "interleaved": {},
    "retrain": {},
    "federaser": {},
    "pga": {},
    "fedosd": {},
    "subtract": {},
    "distill": {"similarity": 0.9},
    "task_arithmetic": {"r": 3, "lora_alpha": 5},
    "not_lora": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_that_of_one_process(small_run, dealt, with_history, tmp_path, recipe):
    args, given = {"pretrained_model_name_or_path": str(with_history)}, RecipeConfig(recipe, RECIPES[recipe])
    both(small_run, dealt, tmp_path, "unlearn", model_args=args, recipe=given, method=("GradAscent", {}))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["KLMin", "RMU", "FLAT", "SAM", "GRU"])
def test_methods_that_look_at_the_old_model_are_those_of_one_process(small_run, dealt, finetuned, tmp_path, method):
    args = {"pretrained_model_name_or_path": str(finetuned)}
    params = {"module_regex": r"model\.layers\.0", "trainable_params_regex": [".*"]} if method == "RMU" else {}
    given = {"wrapper": WrapperConfig(method)} if method in {"SAM", "GRU"} else {"method": (method, params)}
    both(small_run, dealt, tmp_path, "unlearn", model_args=args, **given)


def test_a_killed_worker_changes_nothing_and_one_that_is_killed_twice_fails(small_run, dealt, finetuned, tmp_path):
    once = run(small_run("finetune", tmp_path / "once", engine=RAY), dealt([(0, "client_1"), (1, "client_0")]))
    assert read_tensors(once.directory / "adapter_model.safetensors").digest() == (
        read_tensors(finetuned / "adapter_model.safetensors").digest()
    )
    twice = run(small_run("finetune", tmp_path / "twice", engine=RAY), dealt([(0, "client_1")] * 2))
    assert twice.records[0].clients == ("client_0", "client_2")
    assert list(twice.records[0].failures) == ["client_1"] and "died" in twice.records[0].failures["client_1"]
    assert twice.records[1].clients == ("client_0", "client_1", "client_2")


def breaking(monkeypatch, error):
    fit = Client.fit

    def broken(self, task, broadcast, client_id):
        if client_id == "client_1":
            raise error
        return fit(self, task, broadcast, client_id)

    monkeypatch.setattr(Client, "fit", broken)


def test_an_error_at_a_client_is_told_as_in_one_process(small_run, dealt, monkeypatch, tmp_path, caplog):
    breaking(monkeypatch, RuntimeError("Ana bakes bread"))
    with caplog.at_level(logging.WARNING):
        result = run(small_run("finetune", tmp_path / "dealt", engine=RAY), dealt())
    here = run(small_run("finetune", tmp_path / "here"))
    assert result.records[0].failures == here.records[0].failures == {"client_1": "RuntimeError: Ana bakes bread"}
    assert "in broken" in caplog.text  # where it was, in the log


@pytest.mark.parametrize("error", [UnfedError("mend it"), MemoryError("4 bytes"), torch.OutOfMemoryError("8 bytes")])
def test_what_ends_a_run_in_one_process_ends_it(small_run, dealt, monkeypatch, tmp_path, error):
    breaking(monkeypatch, error)
    kinds = (UnfedError, MemoryError)
    found = []
    for name, engine, fleet in (("here", EngineConfig(), None), ("dealt", RAY, dealt())):
        with pytest.raises(kinds) as raised:
            run(small_run("finetune", tmp_path / name, engine=engine), fleet)
        found.append((type(raised.value), str(raised.value)))
    assert found[0] == found[1]


def test_progress_and_curves_are_those_of_one_process(small_run, dealt, monkeypatch, tmp_path):
    from unfed.app import runs

    seen = {}

    class Told(runs.Reporter):
        def stepped(self, task, client_id, event):
            seen.setdefault(name, []).append((task.round, client_id, event))

    monkeypatch.setattr(runs, "Reporter", Told)
    for name, engine, fleet in (("here", EngineConfig(), None), ("dealt", RAY, dealt())):
        run(small_run("finetune", tmp_path / name, engine=engine, args={"logging_steps": 1}), fleet)
    assert seen["dealt"] == seen["here"] and len(seen["here"]) > 6


def test_a_run_that_was_cut_short_goes_on_with_workers_or_without(
    small_run, dealt, resumed_after_a_round, monkeypatch, tmp_path
):
    from unfed.app import runs

    given = PATTERN["scaffold"]
    here = run(small_run("finetune", tmp_path / "here", **given))
    fleets = [dealt(), Fleet(), Fleet(), dealt()]
    monkeypatch.setattr(runs, "fleet_of", lambda config: fleets.pop(0))
    for number in range(2):
        same(resumed_after_a_round(small_run("finetune", tmp_path / str(number), **given)), here)
    assert not fleets
    one, two = (small_run("finetune", tmp_path / "x", engine=e) for e in (EngineConfig(), RAY))
    assert training_identity(one) == training_identity(two)


def test_a_worker_with_another_base_or_release_is_refused(small_run, dealt, make_base, monkeypatch, tmp_path):
    from unfed.app import ray_worker

    config = small_run("finetune", tmp_path / "ft", engine=RAY)
    found = ray_worker.versions()
    monkeypatch.setattr(ray_worker, "versions", lambda: {**found, "torch": "2.0.1"})
    with pytest.raises(UnfedError, match=r"worker \d has torch 2\.0\.1 and the server 2\."):
        run(config, dealt())
    monkeypatch.undo()
    other, opened = make_base(tmp_path / "other", seed=1), ray_worker.open_model

    def another(config, *, trainable):
        args = dataclasses.replace(config.model.model_args, pretrained_model_name_or_path=str(other))
        return opened(
            dataclasses.replace(config, model=dataclasses.replace(config.model, model_args=args)), trainable=trainable
        )

    monkeypatch.setattr(ray_worker, "open_model", another)
    with pytest.raises(UnfedError, match=r"worker \d has another base model than the server: its weights: \w+, the"):
        run(config, dealt())


def test_a_worker_without_the_base_model_says_so(small_run, dealt, monkeypatch, tmp_path):
    from unfed.app import ray_worker

    def gone(config, *, trainable):
        raise UnfedError("cannot open the model base: there is none")

    monkeypatch.setattr(ray_worker, "open_model", gone)
    with pytest.raises(UnfedError, match="cannot open the model base"):
        run(small_run("finetune", tmp_path / "ft", engine=RAY), dealt())


def test_rows_come_back_from_their_message(small_examples):
    one, two = small_examples[:2]
    odd = dataclasses.replace(two, labels=tuple(reversed(two.labels)), truncated=True)
    clients = {
        "a/b": ClientData("a/b", {"train": [one, two, one], "forget": []}),
        "c": ClientData("c", {"train": [two], "alternate": [odd]}),
        "empty": ClientData("empty", {}),
    }
    assert read_rows(Message.unpack(rows_message(clients).pack())) == clients


def test_the_model_is_not_opened_where_ray_is_missing(small_run, monkeypatch, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "ray" else found(name, *a))
    monkeypatch.setattr("unfed.app.runs.load_model", None)
    with pytest.raises(UnfedError, match=r'not installed: pip install "unfed\[ray\]"'):
        run(small_run("finetune", tmp_path / "ft", engine=RAY))
    assert not (tmp_path / "ft").exists()


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({"workers": 0}, "engine.workers=0: must be at least 1"),
        ({"threads": -1}, "engine.threads=-1: must be at least 1"),
        ({"gpus_per_worker": 1.5}, "engine.gpus_per_worker=1.5: must be 0, between 0.0001 and 1, or a whole number"),
        ({"address": "ray://head:10001"}, "Ray Client's ray:// is not supported"),
        ({"address": "head"}, "must be auto, or HOST:PORT"),
        ({"timeout": 0.0}, "engine.timeout=0"),
        ({"name": "inprocess", "workers": 2}, "engine.workers=2: is a setting of engine=ray"),
        ({"name": "nvflare", "address": "auto"}, "engine.address=auto: is a setting of engine=ray"),
        ({"gpus_per_worker": 1e-9}, "engine.gpus_per_worker=1e-09: must be 0, between 0.0001 and 1"),
        ({"workers": 10**23}, "must be at least 1, and at most 1024"),
        ({"threads": 999_999_999}, "engine.threads=999999999: must be at least 1, and at most 1024"),
        ({"address": "head:\u0663\u0663"}, "must be auto, or HOST:PORT"),
        ({"timeout": 1e300}, "engine.timeout=1e+300: must be above 0, and at most 1e+09"),
        ({"ping": 5.0}, "engine.ping=5: is a setting of engine=nvflare, and this run has engine=ray"),
        ({"misses": 5}, "engine.misses=5: is a setting of engine=nvflare, and this run has engine=ray"),
        ({"name": "inprocess", "rate": 5.0}, "engine.rate=5: is a setting of engine=nvflare"),
        ({"name": "inprocess", "timeout": 5.0}, "engine.timeout=5: is a setting of engine=ray and engine=nvflare"),
        ({"name": "inprocess", "same_versions": False}, "engine.same_versions=False: is a setting of engine=ray and"),
    ],
)
def test_settings_out_of_their_limits_are_refused(small_run, tmp_path, engine, words):
    config = small_run("finetune", tmp_path / "x", engine=EngineConfig(**{"name": "ray", **engine}))
    assert [words in p for p in engine_settings(config)] == [True]


def test_what_has_no_clients_is_refused(small_run, tmp_path):
    alone = small_run("finetune", tmp_path / "x", engine=RAY, handler="finetune")
    for config in (alone, dataclasses.replace(alone, mode="eval")):
        assert ["with engine=inprocess" in p for p in engine_settings(config)] == [True]
    assert (
        list(
            engine_settings(small_run("finetune", tmp_path / "x", engine=EngineConfig("ray", address="10.0.0.1:6379")))
        )
        == []
    )


def test_no_more_workers_are_made_room_for_than_have_something_to_do(monkeypatch):
    """Ray starts a process for each CPU that it is told of, before one is asked for."""
    pytest.importorskip("ray")
    from unfed.federated import ray

    told = {}
    monkeypatch.setattr(ray.ray, "init", lambda **given: told.update(given))
    monkeypatch.setattr(ray, "_gpus_here", lambda: 0)
    place = ray.Place(workers=1000, most=3)
    ray._begin(place, "nowhere")
    assert told["num_cpus"] == 3 and place.sized(0.0, told["num_cpus"]) == (3, 0.0)
    with pytest.raises(UnfedError, match=r"engine\.workers=1000: the cluster has 2 CPUs"):
        place.sized(0.0, 2.0)


def test_a_cluster_that_asks_for_a_token_is_named(monkeypatch):
    """Ray's error of it is neither a ConnectionError nor a RuntimeError."""
    pytest.importorskip("ray")
    from ray.exceptions import AuthenticationError

    from unfed.federated import ray

    def refuse(**_given):
        raise AuthenticationError("no authentication token was found")

    monkeypatch.setattr(ray.ray, "init", refuse)
    monkeypatch.setattr(ray, "_knock", lambda _address: None)
    with pytest.raises(UnfedError, match=r"engine.address=head:1: no Ray cluster .* no authentication token was found"):
        ray._begin(ray.Place(address="head:1"), "nowhere")
