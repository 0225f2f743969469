"""Several LoRA adapters of one shape as one: their factors side by side, which adds their updates exactly.

With one scaling s for all, s sum_k p_k B_k A_k = s [p_1 B_1, ..., p_K B_K] [A_1; ...; A_K] (FLoRA, Wang et al. 2024,
arXiv 2409.05976, which weights A; the product is the same).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from unfed.aggregation.lora import lora_pairs
from unfed.base.errors import AdapterError
from unfed.base.types import AdapterState
from unfed.models.adapter import ADAPTER_NAME, restore


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


def _lora_config(model: PeftModel) -> LoraConfig:
    config = model.peft_config[ADAPTER_NAME]
    if not isinstance(config, LoraConfig) or config.use_dora:
        raise AdapterError("only plain LoRA adapters can be put side by side, and this one is of another kind")
    return config
