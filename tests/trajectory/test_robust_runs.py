"""Runs with hostile clients and robust rules on the small model: what is recorded, and who owns the server's rows."""

from __future__ import annotations

import dataclasses
import json
from functools import partial

import pytest
import torch

from unfed.aggregation.lora import lora_pairs
from unfed.app.oracle import oracle_config
from unfed.app.runs import run
from unfed.app.server_rows import SERVER_FILE
from unfed.base.artifacts import read_json, read_tensors
from unfed.base.errors import ConfigError, DataError
from unfed.base.types import SERVER
from unfed.config.schema import AggregatorConfig, HostileConfig, RobustConfig
from unfed.federated.client import Client
from unfed.federated.rounds import RunKeeper

FIVE = {"num_clients": 5, "global_rounds": 2, "target_client_idx": 0}


def record(place) -> dict:
    return json.loads((place / "run.json").read_text())


def weights(place):
    return read_tensors(place / "adapter_model.safetensors")


@pytest.fixture
def five(small_run, tmp_path):
    """A fine-tuning with five clients of which the last is hostile."""
    return partial(of_five, small_run, tmp_path)


def of_five(small_run, place, robust=None, hostile="scale", name="run", factor=50.0):
    attack = HostileConfig(hostile, factor=None if hostile == "label_flip" else factor) if hostile else None
    return small_run("finetune", place / name, robust=robust, method_args=FIVE, hostile=attack)


@pytest.fixture(scope="module")
def plain_and_spoilt(small_run, tmp_path_factory):
    """The mean of honest clients, and the mean with a hostile one."""
    place = tmp_path_factory.mktemp("means")
    runs = (of_five(small_run, place, hostile=None, name="plain"), of_five(small_run, place, name="spoilt"))
    return [run(config).directory for config in runs]


def products(place) -> torch.Tensor:
    """All that the adapter does to the weights, as one vector."""
    state = weights(place)
    return torch.cat([(state[b] @ state[a]).flatten() for a, b in lora_pairs(state).values()])


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("median", {}), ("trimmed_mean", {}), ("krum", {}), ("multi_krum", {}), ("norm_clipping", {}),
        ("median", {"over": "factors"}),
    ],
)  # fmt: skip
def test_a_rule_against_a_client_that_goes_too_far(five, plain_and_spoilt, name, params):
    """The hostile step is 50 times as long: it is left out, cut, or outvoted, and the record says so."""
    result = run(five(RobustConfig(name, params)))
    assert len(result.records) == 2
    plain, spoilt = plain_and_spoilt
    honest = products(plain)
    assert (products(result.directory) - honest).norm() < 0.2 * (products(spoilt) - honest).norm()
    kept = record(result.directory)
    assert kept["hostile_clients"] == ["client_4"]
    assert any("FOR STUDY ONLY: hostile=scale, client_4" in w for w in kept["warnings"])
    assert "median" in kept["settings"] or name in kept["settings"]
    for round_ in kept["rounds"]:
        notes = round_["notes"][name]
        if name in ("krum", "multi_krum"):
            assert notes["client_4"] == 0.0
        elif name == "norm_clipping":
            assert notes["client_4"] < 0.1 <= max(notes[f"client_{i}"] for i in range(4))
        elif params:
            assert notes == {}
        else:
            assert 0.0 < notes["truncation_error"] < 1.0
    assert not any("STUDY" in w for w in record(plain)["warnings"])


def test_screening_drops_what_is_too_long_and_says_why(five):
    result = run(five(RobustConfig("screening", max_norm_ratio=5.0)))
    for round_ in record(result.directory)["rounds"]:
        assert round_["clients"] == [f"client_{i}" for i in range(4)]
        reason = round_["failures"]["client_4"]
        assert "times the round's median of" in reason and "robust.max_norm_ratio=5" in reason


def test_a_resumed_round_with_a_rule_gives_the_same_bytes(five, tmp_path, monkeypatch):
    whole = run(five(RobustConfig("median"), hostile="random", name="whole"))
    fit = Client.fit

    def stops(self, task, broadcast, client_id):
        if task.round == 1 and client_id == "client_2":
            raise KeyboardInterrupt
        return fit(self, task, broadcast, client_id)

    monkeypatch.setattr(Client, "fit", stops)
    config = five(RobustConfig("median"), hostile="random", name="cut")
    with pytest.raises(KeyboardInterrupt):
        run(config)
    monkeypatch.undo()
    again = run(dataclasses.replace(config, resume=True))
    assert weights(again.directory).digest() == weights(whole.directory).digest()


def test_exchanged_answers_reach_the_hostile_client_alone(five, monkeypatch):
    seen: dict[str, dict[str, tuple[int, ...]]] = {}
    fit = Client.fit

    def watching(self, task, broadcast, client_id):
        seen[client_id] = {e.example_id: tuple(e.input_ids) for e in self.data[client_id].splits["train"]}
        return fit(self, task, broadcast, client_id)

    monkeypatch.setattr(Client, "fit", watching)
    run(five(hostile=None, name="honest"))
    honest, seen = dict(seen), {}
    run(five(hostile="label_flip", name="flipped"))
    assert {c: set(rows) for c, rows in seen.items()} == {c: set(rows) for c, rows in honest.items()}
    assert all(seen[c] == honest[c] for c in seen if c != "client_4")
    assert len(seen["client_4"]) > 1
    assert all(seen["client_4"][i] != honest["client_4"][i] for i in seen["client_4"])


def test_the_servers_rows_belong_to_nobody(five, small_run, tmp_path):
    """Drawn from what is not to be forgotten, kept beside the manifest, left out by every run that follows."""
    tuned = run(five(RobustConfig("fltrust", root=4), hostile="sign_flip", factor=1.0))
    place = tuned.directory
    rows = set(read_json(place / SERVER_FILE)["rows"])
    owned = {i for ids in read_json(place / "partition.json")["clients"].values() for i in ids}
    assert len(rows) == 4 and len(owned) == 14 and not rows & owned
    kept = record(place)
    for round_ in kept["rounds"]:
        assert round_["clients"] == [f"client_{i}" for i in range(5)], "the server counts as no client"
        assert round_["metrics"][SERVER]["loss"] > 0
        assert round_["notes"]["fltrust"]["client_4"] == 0.0, "it points the other way"
        assert sum(x > 0 for x in round_["notes"]["fltrust"].values()) >= 2
        assert round_["bytes_up"] == round_["bytes_down"] == 5 * weights(place).nbytes
    args = {"pretrained_model_name_or_path": str(place)}
    given = {"model_args": args, "robust": RobustConfig("fltrust")}
    forgot = run(small_run("unlearn", tmp_path / "unlearn", **given)).directory
    assert set(read_json(forgot / SERVER_FILE)["rows"]) == rows
    phases = {r["phase"]: r for r in record(forgot)["rounds"]}
    assert phases["unlearn"]["notes"] == {}, "what the target does is adopted as it is"
    assert phases["recover"]["notes"]["fltrust"] and SERVER in phases["recover"]["metrics"]
    plain = run(small_run("unlearn", tmp_path / "plain", model_args=args)).directory
    assert not rows & set(read_json(plain / "train_rows.json")) - set(read_json(place / "train_rows.json"))
    oracle = run(oracle_config(small_run("unlearn", tmp_path / "asked", model_args=args)))
    assert set(read_json(oracle.directory / SERVER_FILE)["rows"]) == rows
    assert len(read_json(oracle.directory / "train_rows.json")) == 18 - 6 - 4, "without forget rows and the server's"
    assert oracle.records[-1].notes["fltrust"]


def test_an_unlearning_run_without_rows_of_the_server(small_run, finetuned, tmp_path, small_data):
    args = {"pretrained_model_name_or_path": str(finetuned)}
    with pytest.raises(ConfigError, match=r"all rows of the fine-tuning are its clients'; give a file"):
        run(small_run("unlearn", tmp_path / "run", model_args=args, robust=RobustConfig("fltrust")))
    forget = small_data / "tofu" / "forget01.json"
    with pytest.raises(DataError, match="6 of its rows are to be forgotten"):
        run(small_run("unlearn", tmp_path / "run", model_args=args, robust=RobustConfig("fltrust", root=str(forget))))
    rows = [{"question": "Who is Gus?", "answer": "A man of Oslo."}, {"question": "Is Bo tall?", "answer": "She is."}]
    file = tmp_path / "rows.json"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    given = RobustConfig("fltrust", root=str(file))
    done = run(small_run("unlearn", tmp_path / "run", model_args=args, robust=given))
    assert done.records[-1].metrics[SERVER]["steps"] >= 1 and not (done.directory / SERVER_FILE).exists()


def test_who_is_hostile_is_known_before_the_model_is_opened(five, tmp_path):
    base = five(name="refused")
    for hostile, said in (
        (HostileConfig("scale", clients=(7,)), "hostile.clients=7: no such client"),
        (HostileConfig("scale", clients=(0, 1, 2, 3, "client_4")), "5 of 5 clients; one at least is honest"),
    ):
        with pytest.raises(ConfigError, match=said):
            run(dataclasses.replace(base, hostile=hostile))
    with pytest.raises(
        ConfigError, match=r"robust.root=12: of 12 rows that are not to be forgotten none would be left"
    ):
        run(dataclasses.replace(base, robust=RobustConfig("fltrust", root=12)))
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(("adapter", "rule"), [("ffa", "median"), ("rolora", "norm_clipping"), ("rolora", "median")])
def test_with_one_factor_held_fixed(small_run, tmp_path, adapter, rule):
    """What did not train did not move, whatever the rule made of the rest."""
    rounds: list[dict[str, torch.Tensor]] = []

    class Watching(RunKeeper):
        def save(self, state):
            rounds.append(dict(state.adapter))
            super().save(state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unfed.app.saving.RunKeeper", Watching)
        given = AggregatorConfig("FedAvg", {"adapter": adapter})
        hostile = HostileConfig("scale", factor=50.0)
        config = small_run("finetune", tmp_path / "run", aggregator=given, robust=RobustConfig(rule), method_args=FIVE)
        run(dataclasses.replace(config, hostile=hostile))
    first, second = rounds
    fixed = ".lora_A." if adapter == "ffa" else ".lora_B."
    moved = {n for n in first if not torch.equal(first[n], second[n])}
    assert moved and not any(fixed in n for n in moved)
