"""Models without weights, on the ``meta`` device: for planning, and for mistakes that names and shapes tell."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from unfed.base.errors import UnfedError
from unfed.models.load import first_line, new_adapter
from unfed.models.source import ModelSource
from unfed.models.spec import LoraArgs, ModelArgs


def parameter_shapes(args: ModelArgs, source: ModelSource) -> nn.Module:
    """The base model; ``UnfedError`` when its configuration cannot be read."""
    try:
        options: dict[str, Any] = {"gguf_file": source.gguf_file} if source.gguf_file else {}
        config = AutoConfig.from_pretrained(source.base, trust_remote_code=args.trust_remote_code, **options)
    except (OSError, ValueError) as e:
        raise UnfedError(f"cannot open the model {source.base}: {first_line(e)}") from e
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=args.trust_remote_code)


def adapted_shapes(args: ModelArgs, source: ModelSource) -> nn.Module:
    """The base model with the adapter that would be opened or made (``use_lora``)."""
    base = parameter_shapes(args, source)
    if not args.use_lora:
        return base
    assert isinstance(base, PreTrainedModel)
    with torch.device("meta"):
        if source.adapter is None:
            return new_adapter(base, args.lora_config or LoraArgs(), source.base, seed=0)
        shape = LoraConfig.from_pretrained(source.adapter)
        shape.inference_mode = False
        return get_peft_model(base, shape)
