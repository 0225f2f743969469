"""Checks that change the weights: quantisation, merging the adapter, adding another one."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from unfed.evaluation.robustness import CannotBeDoneError, Outcome, Subject, compared, left_as_it_was
from unfed.models.adapter import ADAPTER_NAME
from unfed.models.spec import ADAPTER_WEIGHTS

Quantizer = Literal["auto", "round_to_nearest", "bitsandbytes"]

ADDED = "added"
"""The other adapter's name while it is in the model."""


def round_to_nearest(weight: Tensor, bits: int, group_size: int | None = None) -> Tensor:
    """``weight`` ``(out, in)`` as symmetric ``bits``-bit integers would give it back, in its own dtype.

    One scale for each output channel, or for each ``group_size`` inputs of one: the largest absolute value divided by
    ``2^(bits-1) - 1``. Rounded in float32, halves to even; the result differs by half a scale at most (and by the
    rounding of a 16-bit dtype). The last group may be shorter.
    """
    most = 2 ** (bits - 1) - 1
    parts = []
    for part in weight.float().split(group_size or weight.shape[1], dim=1):
        scale = part.abs().amax(dim=1, keepdim=True) / most
        steps = (part / scale.masked_fill(scale == 0, 1)).round().clamp(-most, most)
        parts.append(steps * scale)
    return torch.cat(parts, dim=1).to(weight.dtype)


def by_bitsandbytes(weight: Tensor, bits: int, group_size: int | None = None) -> Tensor:
    """``weight`` ``(out, in)`` as bitsandbytes gives it back: NF4 (Dettmers et al. 2023) in blocks of ``group_size``
    (64 unless given) at 4 bits, LLM.int8()'s row-wise absolute maximum (Dettmers et al. 2022) at 8.

    The values that its 4-bit layers compute with; its 8-bit layers also round what flows in, which is left out here.
    """
    functional: Any = importlib.import_module("bitsandbytes.functional")  # an extra
    values = weight.contiguous()
    if bits == 4:
        packed, state = functional.quantize_4bit(values, blocksize=group_size or 64, quant_type="nf4")
        return functional.dequantize_4bit(packed, state).to(weight.dtype)
    steps, scale, _ = functional.int8_vectorwise_quant(values.half())
    return (steps.float() * scale.float().unsqueeze(1) / 127).to(weight.dtype)


def library_for(quantizer: Quantizer, device: torch.device) -> Quantizer:
    """What ``auto`` stands for: bitsandbytes on a GPU where it is installed, else our own rounding."""
    if quantizer != "auto":
        return quantizer
    there = device.type == "cuda" and importlib.util.find_spec("bitsandbytes") is not None
    return "bitsandbytes" if there else "round_to_nearest"


def linear_weights(model: nn.Module) -> list[tuple[nn.Parameter, bool]]:
    """Weights of the linear layers, and whether they lie as ``(in, out)``; not the adapter's nor the output layer's.

    The output layer stays as it is, as in bitsandbytes: it is often the embedding as well.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    head = getattr(inner, "get_output_embeddings", lambda: None)()
    left = {id(m) for m in head.modules()} if isinstance(head, nn.Module) else set()
    found: dict[int, tuple[nn.Parameter, bool]] = {}
    for name, module in model.named_modules():
        if id(module) in left or ".lora_" in name or ".original_module" in name:
            continue
        if isinstance(module, nn.Linear | Conv1D) and isinstance(module.weight, nn.Parameter):
            found.setdefault(id(module.weight), (module.weight, isinstance(module, Conv1D)))
    return list(found.values())


@contextmanager
def merged(model: nn.Module, more: Sequence[nn.Parameter] = ()) -> Iterator[None]:
    """Inside, the adapter (if any) is merged into the base's weights, in their dtype; afterwards all is as before.

    ``more``: parameters that the caller will change inside. PEFT's own unmerging subtracts what merging added, which
    leaves rounding behind; here the weights come back from a copy.
    """
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    own = [p for layer in layers for p in layer.get_base_layer().parameters()]
    with left_as_it_was(model, [*own, *more]):
        try:
            with torch.no_grad():
                for layer in layers:
                    layer.merge()
            yield
        finally:
            for layer in layers:
                layer.merged_adapters.clear()


def quantization(subject: Subject, bits: int, group_size: int | None = None, quantizer: Quantizer = "auto") -> Outcome:
    """Round every linear weight to ``bits`` bits, the adapter merged first, and measure.

    The rounded values, ours or bitsandbytes', are computed with in the weights' own dtype. Raises ``CannotBeDoneError``
    for a model without linear layers.
    """
    weights = linear_weights(subject.model)
    if not weights:
        raise CannotBeDoneError("the model has no linear layer whose weights could be rounded")
    library = library_for(quantizer, weights[0][0].device)
    rounding = by_bitsandbytes if library == "bitsandbytes" else round_to_nearest
    with merged(subject.model, [p for p, _ in weights]):
        for parameter, turned in weights:
            values = parameter.data.T if turned else parameter.data
            rounded = rounding(values, bits, group_size)
            parameter.data.copy_(rounded.T if turned else rounded)
        after = subject.measure()
    adapter = "the adapter was merged into the base, then " if isinstance(subject.model, PeftModel) else ""
    if library == "bitsandbytes":
        how = "bitsandbytes' NF4" if bits == 4 else "bitsandbytes' 8-bit rows"
    else:
        scales = f"group of {group_size} inputs" if group_size else "output channel"
        how = f"simulated: symmetric, to nearest, one scale for each {scales}"
    did = (
        f"{adapter}every linear weight but the output layer's was rounded to {bits} bits ({how}); computed in the "
        "weights' own dtype, not with integer kernels"
    )
    settings = {"bits": bits, "group_size": group_size, "quantizer": library}
    counts = {
        "rounded_parameters": sum(p.numel() for p, _ in weights),
        "parameters": sum(p.numel() for p in subject.model.parameters()),
    }
    name = f"quantize_{bits}bit"
    return compared(subject, name, after, did=_sentence(did), settings=settings, extra=counts)


def merging(subject: Subject) -> Outcome:
    """Merge the adapter into the base, in the base's dtype, and measure. ``CannotBeDoneError`` without an adapter."""
    _adapter_of(subject, "there is nothing to merge")
    with merged(subject.model):
        after = subject.measure()
    dtype = next(p.dtype for p in subject.model.parameters())
    did = f"The adapter was merged into the base's weights ({str(dtype).removeprefix('torch.')})."
    return compared(subject, "merge", after, did=did)


def adding(subject: Subject, path: str) -> Outcome:
    """Add another adapter's update to the present one's, and measure.

    Raises ``CannotBeDoneError`` when the model has no adapter, or the other one is no plain LoRA or does not fit.
    """
    model = _adapter_of(subject, "another one cannot be added to it")
    with added(model, path):
        after = subject.measure()
    did = "The update of another adapter was added: each layer gives the base's output and both adapters' B A x."
    return compared(subject, "add_adapter", after, did=did, settings={"add_adapter": path})


@contextmanager
def added(model: PeftModel, path: str) -> Iterator[None]:
    """Inside, the adapter in ``path`` is active beside the model's own."""
    _plain_lora(path)
    known = {name for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    with left_as_it_was(model, ()):
        try:
            _load(model, path)
            tuner: Any = model.base_model
            tuner.set_adapter([ADAPTER_NAME, ADDED])
            yield
        finally:
            if ADDED in model.peft_config:
                model.delete_adapter(ADDED)
            _unwrap(model, known)
            model.set_adapter(ADAPTER_NAME)


def _load(model: PeftModel, path: str) -> None:
    try:
        with safetensors.safe_open(Path(path) / ADAPTER_WEIGHTS, framework="pt") as file:
            stored = set(file.keys())
        model.load_adapter(path, adapter_name=ADDED, is_trainable=False)
    except (OSError, RuntimeError, ValueError, KeyError, safetensors.SafetensorError) as e:
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise CannotBeDoneError(f"the adapter {path} does not fit the model: {reason}") from e
    wanted = {n.replace(f".{ADDED}", "") for n, _ in model.named_parameters() if f".{ADDED}" in n}
    if wanted != stored:
        first = min(wanted ^ stored)
        raise CannotBeDoneError(
            f"the adapter {path} does not fit the model: {len(wanted ^ stored)} tensors have no place or are missing "
            f"(the first: {first})"
        )


def _unwrap(model: nn.Module, known: set[str]) -> None:
    """Take off the layers that were made for the other adapter alone, so that the parameters have their old names."""
    fresh = [(n, m) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer) and n not in known]
    for name, layer in fresh:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())


def _plain_lora(path: str) -> None:
    try:
        config = LoraConfig.from_pretrained(path)
    except (OSError, ValueError, TypeError) as e:
        raise CannotBeDoneError(f"the adapter {path} cannot be read: {e}") from e
    if not isinstance(config, LoraConfig) or config.modules_to_save or config.bias != "none" or config.use_dora:
        raise CannotBeDoneError(
            f"the adapter {path} is no plain LoRA (modules_to_save, bias or DoRA): its update cannot be added"
        )


def _adapter_of(subject: Subject, otherwise: str) -> PeftModel:
    if not isinstance(subject.model, PeftModel):
        raise CannotBeDoneError(f"the model has no adapter: {otherwise}")
    return subject.model


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."
