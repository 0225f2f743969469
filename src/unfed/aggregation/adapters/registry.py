"""Adapter rules by name, and the check of what goes with what before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from unfed.aggregation.adapters.base import AdapterRule
from unfed.aggregation.adapters.exact import FedEx, FLoRA
from unfed.aggregation.adapters.fed_sb import FedSB
from unfed.aggregation.adapters.fedit import FedIT
from unfed.aggregation.adapters.fedsa import FedSALoRA
from unfed.aggregation.adapters.flexlora import FlexLoRA
from unfed.aggregation.adapters.hetlora import HetLoRA
from unfed.aggregation.adapters.lora_fair import LoRAFair
from unfed.aggregation.adapters.one_factor import FFALoRA, RoLoRA
from unfed.base import params as hyper
from unfed.base.errors import nearest

_RULES = (FedIT, FFALoRA, RoLoRA, FLoRA, FedEx, FlexLoRA, HetLoRA, LoRAFair, FedSALoRA, FedSB)
ADAPTER_RULES: Mapping[str, type[AdapterRule]] = MappingProxyType({cls.title: cls for cls in _RULES})


def adapter_rule_problems(name: object, params: object) -> list[str]:
    """Everything wrong with a rule's name and hyperparameters (empty: it can be built)."""
    if not isinstance(name, str) or name not in ADAPTER_RULES:
        return [f"aggregator.adapter={name}: no such rule{nearest(str(name), ADAPTER_RULES)}"]
    if not isinstance(params, Mapping):
        return [f"aggregator.adapter_args={params!r}: must be hyperparameters by name, as in {{key: value}}"]
    return hyper.problems(ADAPTER_RULES[name], params, "aggregator.adapter_args")


def build_adapter_rule(name: str, params: Mapping[str, Any], **given: Any) -> AdapterRule:
    """The rule ``name``; ``given``: scaling, probe_seed, ranks."""
    return ADAPTER_RULES[name](**params, **given)
