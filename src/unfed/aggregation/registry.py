"""Server rules by name, and the check of their hyperparameters before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from unfed.aggregation.base import Aggregator
from unfed.aggregation.fedavg import FedAvg, FedAvgM, FedProx
from unfed.aggregation.fedopt import FedAdagrad, FedAdam, FedYogi
from unfed.base import params as hyper
from unfed.base.errors import ConfigError, nearest

AggregatorClass = type[FedAvg] | type[FedAvgM] | type[FedAdagrad] | type[FedAdam] | type[FedYogi] | type[FedProx]

AGGREGATORS: Mapping[str, AggregatorClass] = MappingProxyType(
    {cls.__name__: cls for cls in (FedAvg, FedAvgM, FedAdagrad, FedAdam, FedYogi, FedProx)}
)


def aggregator_problems(name: str, params: Mapping[str, Any]) -> list[str]:
    """Everything wrong with a rule's name and hyperparameters (empty: it can be built)."""
    if name not in AGGREGATORS:
        return [f"unknown aggregation strategy {name!r}{nearest(name, AGGREGATORS)}"]
    return hyper.problems(AGGREGATORS[name], params, "aggregator")


def build_aggregator(
    name: str, params: Mapping[str, Any], *, lora_scaling: Mapping[str, float] | float = 1.0, probe_seed: int = 0
) -> Aggregator:
    """The rule ``name`` with ``params`` over its defaults; ``ConfigError`` lists every problem.

    ``lora_scaling`` (by module, or one number) and ``probe_seed`` serve the aggregation error alone.
    """
    if found := aggregator_problems(name, params):
        raise ConfigError(found)
    return AGGREGATORS[name](**params, lora_scaling=lora_scaling, probe_seed=probe_seed)
