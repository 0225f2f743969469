"""Mixed precision and gradient checkpointing, settled once for a model."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import PeftModel
from torch import nn

from unfed.base.errors import ConfigError
from unfed.models.adapter import trainable_parameters
from unfed.training.args import LoopArgs


def make_accelerator(args: LoopArgs) -> Accelerator:
    """Accelerate with the precision that ``args`` ask for."""
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    if AcceleratorState._shared_state and AcceleratorState._shared_state.get("_mixed_precision") != precision:  # noqa: SLF001
        # Accelerate allows one precision a process; a process of ours may run several jobs one after the other.
        AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001
    return Accelerator(mixed_precision=precision, cpu=args.use_cpu or not torch.cuda.is_available())


def check_fp16(model: nn.Module, device: torch.device) -> None:
    """Raise ``ConfigError`` where fp16 cannot be had."""
    if device.type != "cuda":
        raise ConfigError([f"trainer.args.fp16: needs a CUDA device, this model is on {device.type}; use bf16=true"])
    if any(p.dtype == torch.float16 for p in trainable_parameters(model).values()):
        raise ConfigError(
            ["trainer.args.fp16: scaled gradients need float32 parameters; set model.model_args.torch_dtype=float32"]
        )


def enable_checkpointing(model: nn.Module, args: LoopArgs) -> None:
    """Switch gradient checkpointing on, in a way in which adapters receive their gradients."""
    options = dict(args.gradient_checkpointing_kwargs or {"use_reentrant": False})
    inner: Any = model
    inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    if isinstance(model, PeftModel):
        # The base is frozen: without this no input of a checkpointed block requires a gradient, and with
        # use_reentrant=true the adapters would silently receive none.
        inner.enable_input_require_grads()
