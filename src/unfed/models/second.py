"""A second LoRA adapter on a learned one that stays frozen, and the one adapter that the two make together.

The learned adapter is opened as :data:`LEARNED`, the second is the model's own (``unfed.models.adapter`` works on it),
and both are active. Their sum has an exact form of rank ``r1 + r2``: with ``s`` for alpha/r of each,

    s1 B1 A1 + s2 B2 A2 = s1 [B1, (s2/s1) B2] [A1; A2],

so the factors of the learned adapter stand in it unchanged, and cutting the stack gives them back bit for bit.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import nn

from unfed.aggregation.lora import lora_pairs
from unfed.base.artifacts import read_json
from unfed.base.errors import AdapterError, ArtifactError
from unfed.base.seeding import derive_seed
from unfed.base.types import AdapterState
from unfed.models.adapter import ADAPTER_NAME, live_tensors, lora_scaling, snapshot
from unfed.models.spec import ADAPTER_CONFIG
from unfed.models.stack import reshaped

LEARNED = "learned"
"""PEFT's name of the learned adapter while a second one lies on it."""

_PREFIX = "base_model.model."
_MORE_THAN_FACTORS = (
    "modules_to_save", "use_dora", "lora_bias", "trainable_token_indices", "target_parameters", "layer_replication",
    "arrow_config", "use_qalora", "use_bdlora", "alora_invocation_tokens", "corda_config", "eva_config",
)  # fmt: skip
"""Settings of PEFT by which an adapter is more, or other, than ``W + s B A``."""


@dataclass(frozen=True)
class SecondAdapter:
    """What a second adapter is made of: rank, alpha, and its modules by the module part of PEFT's tensor names."""

    r: int
    lora_alpha: float
    modules: tuple[str, ...]


def not_plain_lora(directory: Path | str) -> str | None:
    """Why the adapter in ``directory`` is no plain LoRA (``W + s B A`` in every module, no more), or ``None``."""
    file = Path(directory) / ADAPTER_CONFIG
    try:
        config = read_json(file)
    except ArtifactError as e:
        return str(e)
    if config.get("peft_type") != "LORA":
        return f"its peft_type is {config.get('peft_type')}"
    if more := [key for key in _MORE_THAN_FACTORS if config.get(key)]:
        return f"it sets {', '.join(more)}"
    if config.get("bias", "none") != "none":
        return f"it trains biases (bias={config['bias']})"
    start = config.get("init_lora_weights", True)
    if not isinstance(start, bool) and start not in ("gaussian", "orthogonal"):
        return f"it began with a change of the base's weights (init_lora_weights={start})"
    patterns = (config.get("alpha_pattern") or {}).values()
    if any(not alpha > 0 for alpha in (config.get("lora_alpha", 8), *patterns)):
        return "its lora_alpha is not above 0"
    return None


def add_second(model: PeftModel, shape: SecondAdapter, seed: int) -> None:
    """Put a fresh adapter on the learned one of ``model``; it alone trains.

    One factor is random by ``seed``, the other 0. The learned adapter stays frozen and acts without its
    dropout, as it does in use.
    """
    learned = model.peft_config[LEARNED]
    config = _own_config(learned, shape, all_modules=set(lora_pairs(snapshot(model, LEARNED))))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "second_adapter"))
        model.add_adapter(ADAPTER_NAME, config)
    config.base_model_name_or_path = learned.base_model_name_or_path
    model.set_adapter(ADAPTER_NAME)
    tuner: Any = model.base_model
    tuner.set_adapter([LEARNED, ADAPTER_NAME])
    for module in model.modules():
        dropout = getattr(module, "lora_dropout", None)
        if isinstance(dropout, nn.ModuleDict) and LEARNED in dropout:
            dropout[LEARNED] = nn.Identity()
    places = {t.data_ptr() for t in live_tensors(model).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.data_ptr() in places)


def _own_config(learned: Any, shape: SecondAdapter, *, all_modules: set[str]) -> LoraConfig:
    config: LoraConfig = copy.deepcopy(learned)
    config.r, config.lora_alpha = shape.r, _tidy(shape.lora_alpha)
    config.rank_pattern, config.alpha_pattern = {}, {}
    config.use_rslora, config.init_lora_weights, config.inference_mode = False, True, False
    if set(shape.modules) != all_modules:
        config.target_modules = sorted(m.removeprefix(_PREFIX) for m in shape.modules)
        config.layers_to_transform, config.layers_pattern, config.exclude_modules = None, None, None
    return config


def stack(
    learned: AdapterState, second: AdapterState, s1: Mapping[str, float], s2: Mapping[str, float]
) -> AdapterState:
    """One adapter with the scaling ``s1`` of the learned one whose update is the sum of both updates.

    Of each module that both have: ``A`` ``(r1 + r2, n)`` and ``B`` ``(m, r1 + r2)``, the learned factors first and
    unchanged. ``AdapterError`` for a module of the second adapter that the learned one lacks.
    """
    tensors = dict(learned)
    for module, (a, b) in lora_pairs(second).items():
        if a not in learned:
            raise AdapterError(f"the second adapter has {module}, which the learned one beneath it lacks")
        tensors[a] = torch.cat([learned[a], second[a]])
        tensors[b] = torch.cat([learned[b], second[b] * (s2[module] / s1[module])], dim=1)
    return AdapterState(tensors)


def unstack(stacked: AdapterState, ranks: Mapping[str, int]) -> AdapterState:
    """The learned adapter in a stack, bit for bit; ``ranks``: its rank in each module."""
    tensors = dict(stacked)
    for module, (a, b) in lora_pairs(stacked).items():
        tensors[a] = stacked[a][: ranks[module]].clone()
        tensors[b] = stacked[b][:, : ranks[module]].clone()
    return AdapterState(tensors)


def ranks_of(adapter: AdapterState) -> dict[str, int]:
    """The rank of each module."""
    return {module: int(adapter[a].shape[0]) for module, (a, _) in lora_pairs(adapter).items()}


def stacked_config(learned: LoraConfig, ranks: Mapping[str, int], scaling: Mapping[str, float]) -> LoraConfig:
    """PEFT's configuration of a stack: what most modules have is the rule, the others stand in the patterns.

    alpha is ``scaling * r`` with plain scaling (alpha/r), also where the learned adapter has alpha/sqrt(r): then it is
    no whole number.
    """
    config = copy.deepcopy(learned)
    alphas = {module: _tidy(scaling[module] * r) for module, r in ranks.items()}
    shapes = Counter((ranks[m], alphas[m]) for m in sorted(ranks))
    config.r, config.lora_alpha = shapes.most_common(1)[0][0]
    short = {m: m.removeprefix(_PREFIX) for m in ranks}
    config.rank_pattern = {short[m]: r for m, r in sorted(ranks.items()) if r != config.r}
    config.alpha_pattern = {short[m]: x for m, x in sorted(alphas.items()) if x != config.lora_alpha}
    config.use_rslora = False
    config.inference_mode = False
    return config


def as_one(model: PeftModel, second: AdapterState) -> tuple[PeftModel, AdapterState]:
    """The model with learned and second adapter as an ordinary one with their stack, and the stack.

    The base's weights are the same tensors; ``model`` is taken apart and of no further use.
    """
    learned, s1, s2 = snapshot(model, LEARNED), lora_scaling(model, LEARNED), lora_scaling(model)
    both = stack(learned, second, s1, s2)
    own: Any = model.peft_config[LEARNED]
    return reshaped(model, stacked_config(own, ranks_of(both), s1), both), both


def _tidy(value: float) -> Any:
    """A whole number as ``int`` (PEFT's type of alpha), up to what a product in float64 loses."""
    nearest = round(value)
    return nearest if abs(value - nearest) <= 1e-9 * max(1.0, abs(value)) else value
