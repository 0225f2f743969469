"""An r x r core between the factors of every LoRA layer of a model: ``W + s B R A`` (Fed-SB).

PEFT knows no such layer, so R is a linear layer of its own beside A and B, and a hook passes what A gives through it.
It is among the adapter's tensors as ``<module>.lora_R.weight``. What is saved is an ordinary adapter, with ``R A`` for
A.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from unfed.aggregation.lora import lora_pairs
from unfed.base.errors import AdapterError
from unfed.models.adapter import ADAPTER_NAME, snapshot

_KEY = "unfed_cores"
_ATTRIBUTE = "lora_R"


def has_cores(model: nn.Module) -> bool:
    """Whether the model's LoRA layers have a core at present."""
    return _KEY in vars(model)


def lora_layers(model: PeftModel) -> dict[str, nn.Module]:
    """The LoRA layers by the module part of their tensors' names, all of them around linear layers.

    ``AdapterError`` for layers around anything else, and for DoRA, whose norm is not linear in the factors.
    """
    config: Any = model.peft_config[ADAPTER_NAME]
    if getattr(config, "use_dora", False):
        raise AdapterError("aggregator.adapter=fed_sb works on plain LoRA, and this adapter is DoRA")
    found: dict[str, nn.Module] = {}
    for module in lora_pairs(snapshot(model)):
        layer: Any = model.get_submodule(module)
        if ADAPTER_NAME not in layer.lora_A or not isinstance(layer.lora_A[ADAPTER_NAME], nn.Linear):
            raise AdapterError(
                f"aggregator.adapter=fed_sb works on LoRA layers around linear ones, and {module} is none; leave it "
                "out of model.model_args.lora_config.target_modules"
            )
        found[module] = layer
    return found


def put_cores(model: PeftModel) -> None:
    """Give every LoRA layer a core, the identity: what the model computes stays the same."""
    handles: list[RemovableHandle] = []
    for layer in lora_layers(model).values():
        one: Any = layer
        first: nn.Linear = one.lora_A[ADAPTER_NAME]
        rank, weight = first.out_features, first.weight
        core = nn.Linear(rank, rank, bias=False, device="meta")  # so that nothing is drawn at random
        core.weight = nn.Parameter(torch.eye(rank, device=weight.device, dtype=weight.dtype))
        setattr(layer, _ATTRIBUTE, nn.ModuleDict({ADAPTER_NAME: core}))
        handles.append(first.register_forward_hook(_through(core)))
    vars(model)[_KEY] = handles


def take_cores(model: PeftModel) -> None:
    """Take the cores off again; A and B are as they are then, without R."""
    handles: list[RemovableHandle] = vars(model).pop(_KEY, [])
    for handle in handles:
        handle.remove()
    for layer in lora_layers(model).values():
        if hasattr(layer, _ATTRIBUTE):
            delattr(layer, _ATTRIBUTE)


def _through(core: nn.Linear) -> Any:
    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        return core(output)

    return hook
