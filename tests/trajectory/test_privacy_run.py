"""Whole runs with differential privacy: what is recorded, resumption to the same bytes, what changes nothing."""

from __future__ import annotations

import dataclasses

import pytest

from unfed.app import runs
from unfed.app.runs import run
from unfed.base.artifacts import digest_file, read_json
from unfed.base.errors import ConfigError
from unfed.config.schema import AggregatorConfig, MethodConfig, PrivacyConfig, RecipeConfig
from unfed.federated.accounting import Release, spent
from unfed.federated.checkpoint import Checkpoints
from unfed.models.spec import ADAPTER_WEIGHTS

UNIFORM = AggregatorConfig("FedAvg", {"weighting": "uniform"})


def private(small_run, directory, kind, *, rounds=3, aggregator=UNIFORM, **params):
    made = small_run("finetune", directory, aggregator=aggregator, method_args={"global_rounds": rounds})
    return dataclasses.replace(made, privacy=PrivacyConfig(kind, params))


def recorded(directory):
    return read_json(directory / "run.json")["privacy"]


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("central", {"clip": 0.05, "noise_multiplier": 2.0, "adaptive": True}),
        ("local", {"clip": 0.1, "noise_multiplier": 0.01}),
        ("example", {"clip": 0.5, "noise_multiplier": 4.0}),
    ],
)
def test_a_resumed_run_ends_in_the_same_bytes(small_run, tmp_path, monkeypatch, kind, params):
    run(private(small_run, tmp_path / "whole", kind, **params))
    kept = Checkpoints.save

    def killed(self, state, records):
        kept(self, state, records)
        if state.round == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", killed)
    config = private(small_run, tmp_path / "cut", kind, **params)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    monkeypatch.setattr(Checkpoints, "save", kept)
    run(dataclasses.replace(config, resume=True))
    one, two = (tmp_path / name for name in ("whole", "cut"))
    assert digest_file(one / ADAPTER_WEIGHTS) == digest_file(two / ADAPTER_WEIGHTS)
    assert recorded(one) == recorded(two)


def test_zero_noise_and_a_wide_bound_are_plain_fedavg(small_run, tmp_path):
    run(small_run("finetune", tmp_path / "plain", aggregator=UNIFORM, method_args={"global_rounds": 2}))
    run(private(small_run, tmp_path / "central", "central", rounds=2, clip=1e6, noise_multiplier=0.0))
    run(private(small_run, tmp_path / "local", "local", rounds=2, clip=1e6, noise_multiplier=0.0))
    assert len({digest_file(tmp_path / name / ADAPTER_WEIGHTS) for name in ("plain", "central", "local")}) == 1
    said = recorded(tmp_path / "central")
    assert said["epsilon"] is None and "no bound on epsilon" in said["says"][0]


def test_what_a_run_records_of_central_privacy(small_run, tmp_path, capsys):
    run(private(small_run, tmp_path / "run", "central", clip=0.2, noise_multiplier=2.0, delta=1e-3))
    said, cost = recorded(tmp_path / "run"), spent([Release(2.0, 3)], 1e-3)
    assert (said["epsilon_rdp"], said["epsilon_pld"]) == (pytest.approx(cost.rdp), pytest.approx(cost.pld))
    assert said["epsilon"] == said["epsilon_pld"] and said["delta"] == 1e-3
    assert (said["kind"], said["unit"], said["units"], said["clip"]) == ("central", "client", 3, 0.2)
    assert said["noise_std"] == pytest.approx(2.0 * 0.2 / 3)
    assert f"epsilon {cost.epsilon:.3g} at delta 0.001" in capsys.readouterr().err


def test_an_examples_cost_is_that_of_the_client_with_the_fewest_rows(small_run, tmp_path):
    """18 rows: the target owns its 6 and a third of the 12 others (10), the others 4 each; steps of 4 of them."""
    run(private(small_run, tmp_path / "run", "example", noise_multiplier=4.0, rounds=2))
    said = recorded(tmp_path / "run")
    ledgers = {who: [Release.read(r) for r in releases] for who, releases in said["releases"].items()}
    rows = sorted(r.population for releases in ledgers.values() for r in releases)
    assert rows == [4, 4, 10] and said["delta"] == pytest.approx(1 / 18) and said["unit"] == "example"
    assert {(r.sample, r.count) for releases in ledgers.values() for r in releases} == {(4, 2), (4, 6)}
    assert said["epsilon_rdp"] == pytest.approx(max(spent(x, 1 / 18).rdp for x in ledgers.values()))


def test_unlearning_composes_with_the_fine_tuning(small_run, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    run(private(small_run, first, "example", noise_multiplier=4.0, rounds=1, delta=1e-2))
    begin = {"pretrained_model_name_or_path": str(first)}
    once = {"global_rounds": 1, "unlearn_epochs": 1}
    made = small_run("unlearn", second, model_args=begin, method=MethodConfig("NPO", {"alpha": 0.0}), method_args=once)
    run(dataclasses.replace(made, privacy=PrivacyConfig("example", {"noise_multiplier": 4.0, "delta": 1e-2})))
    one, two = recorded(first), recorded(second)
    assert two["with_earlier"]["epsilon_rdp"] > max(one["epsilon_rdp"], two["epsilon_rdp"])
    assert two["earlier"]["epsilon"] == one["epsilon"]
    assert any("With the runs before it on the same adapter: epsilon" in s for s in two["says"])
    third = tmp_path / "third"
    made = small_run("unlearn", third, model_args=begin, method_args=once)
    run(made)
    assert recorded(third)["kind"] is None and "this run was not" in recorded(third)["says"][0]


def test_training_again_is_as_private_as_the_first_time_and_both_count(small_run, tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    run(private(small_run, first, "central", clip=0.1, noise_multiplier=4.0, rounds=2, delta=1e-3))
    begin = {"pretrained_model_name_or_path": str(first)}
    made = small_run("unlearn", again, model_args=begin, recipe=RecipeConfig("retrain"))
    run(made)
    assert recorded(again)["epsilon_rdp"] == pytest.approx(spent([Release(4.0, 2)], 1e-3).rdp)
    assert recorded(again)["with_earlier"]["epsilon_rdp"] == pytest.approx(spent([Release(4.0, 4)], 1e-3).rdp)
    with pytest.raises(ConfigError, match="with privacy=central and its settings; leave privacy out"):
        run(dataclasses.replace(made, privacy=PrivacyConfig("example", {})))


CENTRAL, LOCAL, EXAMPLE = (PrivacyConfig(k, {}) for k in ("central", "local", "example"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"privacy": CENTRAL, "aggregator": AggregatorConfig("FedAvg")}, "set aggregator.weighting=uniform"),
        (
            {"privacy": CENTRAL, "recipe": RecipeConfig("local_then_recover")},
            "use recipe=interleaved, retrain, rollback",
        ),
        ({"privacy": EXAMPLE, "method": MethodConfig("NPO")}, "set method.alpha=0"),
        ({"privacy": EXAMPLE, "method": MethodConfig("RMU")}, "method=RMU: its loss is no sum over examples"),
        ({"privacy": EXAMPLE, "aggregator": AggregatorConfig("FedProx")}, "aggregator=FedProx: adds a penalty"),
        ({"privacy": EXAMPLE, "model_args": {"use_lora": False}}, "set model.model_args.use_lora=true"),
        ({"privacy": EXAMPLE, "args": {"fp16": True}}, "use trainer.args.bf16=true"),
        ({"privacy": PrivacyConfig("central", {"clipp": 1.0})}, "did you mean 'clip'"),
    ],
)
def test_what_cannot_hold_is_refused_before_a_model_is_loaded(small_run, tmp_path, monkeypatch, changes, said):
    monkeypatch.setattr(runs, "load_model", None)
    how = changes.pop("privacy")
    made = small_run("unlearn", tmp_path / "run", **{"aggregator": UNIFORM, **changes})
    with pytest.raises(ConfigError, match=said):
        run(dataclasses.replace(made, privacy=how))
