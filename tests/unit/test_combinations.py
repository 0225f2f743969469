"""Settings that each stand alone and not together are refused, with the way out."""

from __future__ import annotations

import dataclasses
import re

import pytest

from unfed.app.build import refuse_few
from unfed.app.recipes import refuse_unmet
from unfed.base.errors import ConfigError
from unfed.config.checks import consistency
from unfed.config.schema import AggregatorConfig, PartitionConfig, PrivacyConfig, RecipeConfig, RobustConfig
from unfed.config.schema_clients import ClientsConfig
from unfed.unlearning.base import Situation


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"robust": "krum", "adapter": "fedsa"}, "robust=krum with aggregator.adapter=fedsa: .*use adapter=fedit"),
        ({"robust": "median", "adapter": "fed_sb"}, "robust=median with aggregator.adapter=fed_sb"),
        ({"robust": "median", "ranks": (2, 4, 4)}, "robust=median with partition.ranks: .*robust=screening"),
        ({"robust": "median", "aggregator": "Scaffold"}, "robust=median with aggregator=Scaffold: .*aggregator=FedAvg"),
        ({"robust": "median", "aggregator": "FedNova"}, "robust=median with aggregator=FedNova"),
        ({"privacy": "local", "adapter": "fed_sb"}, "privacy=local with aggregator.adapter=fed_sb: .*fedit or ffa$"),
        ({"privacy": "example", "adapter": "fed_sb"}, "privacy=example with aggregator.adapter=fed_sb"),
        ({"privacy": "local", "adapter": "fedsa"}, "privacy=local with aggregator.adapter=fedsa: .*privacy=example"),
        ({"privacy": "central", "adapter": "flora"}, "adapter=flora: .*use adapter=fedit, ffa, rolora$"),
        ({"privacy": "central", "adapter": "lora_fair"}, "privacy=central with aggregator.adapter=lora_fair"),
        ({"privacy": "central", "ranks": (2, 4, 4)}, "partition.ranks with privacy=central: .*privacy=local"),
        ({"privacy": "example", "ranks": (2, 4, 4)}, "partition.ranks with privacy=example"),
        ({"aggregator": "Scaffold", "ranks": (2, 4, 4)}, "partition.ranks with aggregator=Scaffold"),
        ({"aggregator": "FedNova", "ranks": (2, 4, 4)}, "partition.ranks with aggregator=FedNova"),
        ({"privacy": "central", "adapter": "fedsa"}, "privacy=central with aggregator.adapter=fedsa"),
    ],
)
def test_what_is_not_defined_together_is_refused(small_run, tmp_path, changes, said):
    params = {"weighting": "uniform"} | ({"adapter": changes["adapter"]} if "adapter" in changes else {})
    config = small_run(
        "finetune", tmp_path / "x", aggregator=AggregatorConfig(changes.get("aggregator", "FedAvg"), params)
    )
    config = dataclasses.replace(
        config,
        robust=RobustConfig(changes["robust"]) if "robust" in changes else None,
        privacy=PrivacyConfig(changes["privacy"]) if "privacy" in changes else None,
        partition=PartitionConfig(ranks=changes.get("ranks")),
    )
    problems = consistency(config)
    assert any(re.search(said, p) for p in problems), problems


@pytest.mark.parametrize("adapter", ["flora", "fedex"])
def test_a_shard_has_nothing_beneath_it(small_run, tmp_path, adapter):
    """Else what is served is the fresh adapters of the last rounds, with B = 0: nothing of what was learnt."""
    config = small_run("finetune", tmp_path / "x", aggregator=AggregatorConfig("FedAvg", {"adapter": adapter}))
    config = dataclasses.replace(config, recipe=RecipeConfig("isolated"))
    assert any(f"recipe=isolated with aggregator.adapter={adapter}" in p for p in consistency(config))


def test_a_rollback_does_not_go_on_from_half_of_scaffolds_variates(small_run, tmp_path):
    """The server's c comes with the kept round, and the clients' c_k do not: c - c_k would be no correction."""
    config = small_run("unlearn", tmp_path / "x", aggregator=AggregatorConfig("Scaffold"))
    config = dataclasses.replace(config, recipe=RecipeConfig("rollback"))
    with pytest.raises(
        ConfigError, match=r"recipe=rollback of a fine-tuning with aggregator=Scaffold: .*recipe=retrain"
    ):
        refuse_unmet(config, Situation(("b",), ("a", "c")))


@pytest.mark.parametrize(("number", "clients", "few"), [(None, 4, True), (None, 5, False), (3, 9, True), (9, 5, False)])
def test_no_round_of_a_partition_is_large_enough_for_krum(small_run, tmp_path, number, clients, few):
    """2 * 1 + 3 = 5 updates: not of 4 clients, and not of 9 of which a round wants 3."""
    config = dataclasses.replace(small_run("unlearn", tmp_path / "x"), robust=RobustConfig("krum"))
    config = dataclasses.replace(config, clients=ClientsConfig(number=number))
    if not few:
        refuse_few(config, clients)
        return
    with pytest.raises(ConfigError, match=rf"robust=krum: .*needs 2 \* 1 \+ 3 = 5 updates.*has {clients} clients"):
        refuse_few(config, clients)


def test_screening_and_example_level_privacy_go_with_them(small_run, tmp_path):
    rule = AggregatorConfig("FedAvg", {"adapter": "fedsa"})
    config = small_run("finetune", tmp_path / "x", aggregator=rule)
    config = dataclasses.replace(config, robust=RobustConfig("screening"), privacy=PrivacyConfig("example"))
    assert consistency(config) == []
