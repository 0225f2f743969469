"""Several LoRA adapters of one shape as one: their factors side by side, which adds their updates exactly.

With one scaling s for all, s sum_k p_k B_k A_k = s [p_1 B_1, ..., p_K B_K] [A_1; ...; A_K] (FLoRA, Wang et al. 2024,
arXiv 2409.05976, which weights A; the product is the same).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from unfed.aggregation.lora import lora_pairs
from unfed.base.errors import AdapterError
from unfed.base.types import AdapterState
from unfed.models.adapter import ADAPTER_NAME, lora_scaling, restore
from unfed.models.residual import put_residual

_OF_PEFT = "base_model.model."


def concatenate(parts: Sequence[tuple[float, AdapterState]]) -> AdapterState:
    """One adapter whose update is the weighted sum of those of ``parts`` (weight, adapter), in their order.

    Of each module: ``A`` ``(K r, n)`` and ``B`` ``(m, K r)`` with the weights in ``B``, in the adapters' dtypes; the
    scaling stays that of one part. ``AdapterError`` where a tensor is no LoRA factor (a bias, a whole module) or the
    parts do not match.
    """
    first = parts[0][1]
    pairs = lora_pairs(first)
    if others := set(first) - {name for pair in pairs.values() for name in pair}:
        raise AdapterError(f"{min(others)} is no LoRA factor: only plain LoRA adapters can be put side by side")
    for _, part in parts[1:]:
        if found := part.problems_against(first):
            raise AdapterError("; ".join(found[:3]))
    tensors = {}
    for a, b in pairs.values():
        tensors[a] = torch.cat([part[a] for _, part in parts])
        tensors[b] = torch.cat([part[b] * weight for weight, part in parts], dim=1)
    return AdapterState(tensors)


def stacked_config(own: LoraConfig, count: int) -> LoraConfig:
    """The configuration of ``count`` such adapters side by side: that many times the rank, at the same scaling.

    alpha grows as the rank does; where the scaling is alpha/sqrt(r), as its root (then it is no whole number).
    """
    config: Any = copy.deepcopy(own)
    growth = math.sqrt(count) if config.use_rslora else count
    config.r, config.lora_alpha = config.r * count, config.lora_alpha * growth
    config.rank_pattern = {name: r * count for name, r in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {name: alpha * growth for name, alpha in (config.alpha_pattern or {}).items()}
    return config


def stacked_model(model: PeftModel, stack: AdapterState, count: int) -> PeftModel:
    """The model with ``stack``, made of ``count`` adapters of the shape of its own, in place of that.

    The base's weights are the same tensors; ``model`` is taken apart and of no further use.
    """
    return reshaped(model, stacked_config(_lora_config(model), count), stack)


def reshaped(model: PeftModel, config: LoraConfig, adapter: AdapterState) -> PeftModel:
    """The model with one adapter of another shape in place of all that it has; it is taken apart, as above."""
    base = config.base_model_name_or_path
    whole: Any = model
    one = get_peft_model(whole.unload(), config, adapter_name=ADAPTER_NAME)
    assert isinstance(one, PeftModel)
    config.base_model_name_or_path = base  # PEFT writes the path it was opened from
    restore(one, adapter)
    return one


def on_residual(adapter: AdapterState, residual: AdapterState, scaling: Mapping[str, float]) -> AdapterState:
    """One adapter for what acts together: ``adapter`` at its ``scaling`` by module and, beneath it, ``residual`` at 1.

    Of each module: ``A`` ``(r + q, n)`` and ``B`` ``(m, r + q)``, at the adapter's scaling; the factors of an adapter
    whose B is zero are left out. Other tensors (biases, whole modules) are the adapter's.
    """
    found = dict(adapter)
    for module, (a, b) in lora_pairs(adapter).items():
        beneath_b = (residual[b].double() / scaling[module]).to(adapter[b].dtype)
        beneath_a = residual[a].to(adapter[a].dtype)
        if not bool(adapter[b].any()):
            found[a], found[b] = beneath_a, beneath_b
            continue
        found[a], found[b] = torch.cat([adapter[a], beneath_a]), torch.cat([adapter[b], beneath_b], dim=1)
    return AdapterState(found)


def config_like(own: LoraConfig, adapter: AdapterState, scaling: Mapping[str, float]) -> LoraConfig:
    """``own`` with the ranks of ``adapter``, at ``scaling`` by module (which are those of ``own``)."""
    config: Any = copy.deepcopy(own)
    ranks = {m: int(adapter[a].shape[0]) for m, (a, _) in lora_pairs(adapter).items()}
    growth = math.sqrt if config.use_rslora else float
    alphas = {m: scaling[m] * growth(r) for m, r in ranks.items()}
    config.r, config.lora_alpha = max(ranks.values()), max(alphas.values())
    config.rank_pattern = {m.removeprefix(_OF_PEFT): r for m, r in ranks.items() if r != config.r}
    config.alpha_pattern = {m.removeprefix(_OF_PEFT): a for m, a in alphas.items() if a != config.lora_alpha}
    return config


def residual_model(model: PeftModel, adapter: AdapterState, residual: AdapterState) -> tuple[PeftModel, AdapterState]:
    """The model with one adapter in place of its own and what lies beneath, and that; ``model`` is taken apart."""
    put_residual(model, None)
    scaling = lora_scaling(model)
    one = on_residual(adapter, residual, scaling)
    return reshaped(model, config_like(_lora_config(model), one, scaling), one), one


def _lora_config(model: PeftModel) -> LoraConfig:
    config = model.peft_config[ADAPTER_NAME]
    if not isinstance(config, LoraConfig) or config.use_dora:
        raise AdapterError("only plain LoRA adapters can be put side by side, and this one is of another kind")
    return config
