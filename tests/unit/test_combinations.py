"""Settings that each stand alone and not together are refused, with the way out."""

from __future__ import annotations

import dataclasses
import re

import pytest

from unfed.config.checks import consistency
from unfed.config.schema import AggregatorConfig, PartitionConfig, PrivacyConfig, RecipeConfig, RobustConfig


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


def test_screening_and_example_level_privacy_go_with_them(small_run, tmp_path):
    rule = AggregatorConfig("FedAvg", {"adapter": "fedsa"})
    config = small_run("finetune", tmp_path / "x", aggregator=rule)
    config = dataclasses.replace(config, robust=RobustConfig("screening"), privacy=PrivacyConfig("example"))
    assert consistency(config) == []
