"""Server rules by name, and the check of their hyperparameters before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from unfed.aggregation.adapters.base import Scaling
from unfed.aggregation.adapters.fedit import FedIT
from unfed.aggregation.adapters.registry import ADAPTER_RULES, adapter_rule_problems, build_adapter_rule
from unfed.aggregation.base import WeightedMean
from unfed.aggregation.fedavg import FedAvg, FedAvgM, FedProx
from unfed.aggregation.fedopt import FedAdagrad, FedAdam, FedYogi
from unfed.aggregation.unequal_work import FedNova, Scaffold
from unfed.base import params as hyper
from unfed.base.errors import ConfigError, nearest

AggregatorClass = (
    type[FedAvg]
    | type[FedAvgM]
    | type[FedAdagrad]
    | type[FedAdam]
    | type[FedYogi]
    | type[FedProx]
    | type[FedNova]
    | type[Scaffold]
)

AGGREGATORS: Mapping[str, AggregatorClass] = MappingProxyType(
    {cls.__name__: cls for cls in (FedAvg, FedAvgM, FedAdagrad, FedAdam, FedYogi, FedProx, FedNova, Scaffold)}
)
OWN_FACTORS: Mapping[str, tuple[tuple[str, ...], str]] = MappingProxyType(
    {
        "FedNova": (
            ("fedit", "ffa", "rolora"),
            "the rule divides each client's update of the factors by its steps and lengthens their mean again",
        ),
        "Scaffold": (
            ("fedit", "ffa"),
            "a control variate is a mean gradient of the same factors, at every client and in every round",
        ),
    }
)
"""The adapter rules that a server rule goes with, and why no others, where not all do that move factors."""


ADAPTER, ADAPTER_ARGS = "adapter", "adapter_args"
"""Keys beside an aggregator's own hyperparameters: the adapter rule and its hyperparameters."""


def aggregator_problems(name: str, params: Mapping[str, Any]) -> list[str]:
    """Everything wrong with a rule's name, adapter rule and hyperparameters (empty: it can be built)."""
    if name not in AGGREGATORS:
        return [f"unknown aggregation strategy {name!r}{nearest(name, AGGREGATORS)}"]
    own = {k: v for k, v in params.items() if k not in (ADAPTER, ADAPTER_ARGS)}
    found = hyper.problems(AGGREGATORS[name], own, "aggregator")
    adapter, adapter_args = params.get(ADAPTER, FedIT.title), params.get(ADAPTER_ARGS) or {}
    return found + (adapter_rule_problems(adapter, adapter_args) or _undefined(name, own, adapter))


def _undefined(name: str, own: Mapping[str, Any], adapter: str) -> list[str]:
    """Why a server optimizer makes no sense on an adapter rule's result."""
    rule, plain = ADAPTER_RULES[adapter], own.get("server_lr", 1.0) == 1.0
    key = f"aggregator={name} with aggregator.adapter={adapter}"
    if name in OWN_FACTORS:
        defined, why = OWN_FACTORS[name]
        return [] if adapter in defined else [f"{key}: is not defined: {why}; use adapter={' or '.join(defined)}"]
    if rule.steps == "factors" or (name in ("FedAvg", "FedProx") and plain):
        return []
    if rule.steps == "mean":
        what = "is not defined: the rule makes up for what the plain average misses, and this one takes another step"
        return [f"{key}: {what}; use aggregator=FedAvg or FedProx with server_lr 1, or adapter=fedit"]
    if name in ("FedAvg", "FedProx", "FedAvgM"):
        return []
    what = "is not defined: the rule moves effective weights, whose entries are never formed, and this one scales entry"
    return [f"{key}: {what} by entry; use aggregator=FedAvg, FedProx or FedAvgM, or adapter=fedit, ffa or rolora"]


def build_aggregator(
    name: str,
    params: Mapping[str, Any],
    *,
    lora_scaling: Scaling = 1.0,
    probe_seed: int = 0,
    ranks: Mapping[str, int] | None = None,
) -> WeightedMean:
    """The rule ``name`` with ``params`` over its defaults; ``ConfigError`` lists every problem.

    ``lora_scaling``: alpha/r by module, or one number; ``probe_seed``: of the aggregation error's estimate; ``ranks``:
    clients that train another rank than the adapter's.
    """
    if found := aggregator_problems(name, params):
        raise ConfigError(found)
    given = {"scaling": lora_scaling, "probe_seed": probe_seed, "ranks": ranks or {}}
    rule = build_adapter_rule(params.get(ADAPTER, FedIT.title), params.get(ADAPTER_ARGS) or {}, **given)
    own = {k: v for k, v in params.items() if k not in (ADAPTER, ADAPTER_ARGS)}
    return AGGREGATORS[name](**own, adapters=rule)
