"""Reading, writing and saving what a client trains: the adapter's tensors, or all parameters without LoRA.

PEFT's ``get_peft_model_state_dict`` returns tensors that go on changing with the model. Only this module
calls it; what leaves is detached, cloned and on the CPU (:class:`AdapterState`).
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from unfed.base.artifacts import atomic_dir, atomic_path
from unfed.base.errors import AdapterError, WriteError
from unfed.base.types import AdapterState
from unfed.models.residual import with_residual
from unfed.models.spec import ADAPTER_CONFIG, ADAPTER_WEIGHTS

ADAPTER_NAME = "default"

# Keys of adapter_config.json that peft 0.13.2's LoraConfig knows. Newer keys are left out while they hold a
# value that means "off", so that older releases open what we save.
PEFT_0_13_KEYS = frozenset(
    "alpha_pattern auto_mapping base_model_name_or_path bias fan_in_fan_out inference_mode init_lora_weights "
    "layer_replication layers_pattern layers_to_transform loftq_config lora_alpha lora_dropout megatron_config "
    "megatron_core modules_to_save peft_type r rank_pattern revision target_modules task_type use_dora "
    "use_rslora".split()
)


def live_tensors(model: nn.Module, adapter_name: str = ADAPTER_NAME) -> dict[str, Tensor]:
    """The model's own trainable tensors by name, sharing storage with it; tied ones once.

    With LoRA: the tensors of the adapter of that name, by PEFT name. Without: every parameter and persistent buffer.
    """
    if isinstance(model, PeftModel):
        found = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
        return {name: t.detach() for name, t in found.items()}
    kept = set(model.state_dict().keys())
    tensors = {n: p.detach() for n, p in model.named_parameters()}
    tensors |= {n: b.detach() for n, b in model.named_buffers() if n in kept}
    return tensors


def snapshot(model: nn.Module, adapter_name: str = ADAPTER_NAME) -> AdapterState:
    """Copy the trainable tensors (with LoRA: those of the adapter of that name) to the CPU."""
    live = live_tensors(model, adapter_name)
    # One block of memory for all: thousands of small ones leave the heap in pieces that are not given back.
    ends = list(itertools.accumulate(-(-t.numel() * t.element_size() // 64) * 64 for t in live.values()))
    block = torch.empty(ends[-1] if ends else 0, dtype=torch.uint8)
    copies = {}
    for (name, tensor), start in zip(live.items(), [0, *ends], strict=False):
        size = tensor.numel() * tensor.element_size()
        copies[name] = block[start : start + size].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    return AdapterState(copies)


@torch.no_grad()
def restore(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Write a state into the model. ``AdapterError`` when names or shapes differ; nothing is written then."""
    live = live_tensors(model)
    wrong = [f"missing {n}" for n in live if n not in state] + [f"unknown {n}" for n in state if n not in live]
    wrong += [
        f"{n} has shape {tuple(state[n].shape)}, not {tuple(live[n].shape)}"
        for n in live
        if n in state and state[n].shape != live[n].shape
    ]
    if wrong:
        raise AdapterError("the adapter does not fit the model: " + "; ".join(wrong[:5]))
    for name, tensor in live.items():
        tensor.copy_(state[name])


@contextlib.contextmanager
def held(model: nn.Module, names: AbstractSet[str]) -> Iterator[None]:
    """Inside, the trainable tensors of ``names`` require no gradient; afterwards all is as before."""
    storages = {t.data_ptr() for n, t in live_tensors(model).items() if n in names} if names else set()
    fixed = [p for p in model.parameters() if p.requires_grad and p.data_ptr() in storages]
    for parameter in fixed:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in fixed:
            parameter.requires_grad = True


class WeightSwap:
    """Another set of trainable weights for the same model, exchanged for the present ones in place.

    Holds one copy of the trainable tensors on the model's device (an adapter; all parameters without LoRA), so a
    reference policy costs an adapter and never a second model. ``residual``: what acts beneath those weights.
    """

    def __init__(self, model: nn.Module, state: AdapterState, residual: AdapterState | None = None) -> None:
        by_storage = {p.data_ptr(): p for p in model.parameters()}
        self._pairs: list[tuple[Tensor, Tensor]] = []
        for name, tensor in live_tensors(model).items():
            parameter = by_storage.get(tensor.data_ptr())
            if parameter is not None:
                other = state[name].to(device=parameter.device, dtype=parameter.dtype, copy=True)
                self._pairs.append((parameter, other))
        self._model, self._residual = model, residual

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the model has the other weights and is in evaluation mode; afterwards all is as before.

        The parameters stay the same objects, so an autograd graph made before is valid again afterwards.
        """
        was_training = self._model.training
        mine = [p.data for p, _ in self._pairs]
        self._put([other for _, other in self._pairs])
        self._model.eval()
        try:
            with with_residual(self._model, self._residual):
                yield
        finally:
            self._put(mine)
            self._model.train(was_training)

    def _put(self, values: Sequence[Tensor]) -> None:
        for (parameter, _), value in zip(self._pairs, values, strict=True):
            parameter.data = value
        # Autocast keeps its 16-bit copy of a float32 parameter by the parameter, whose data has just changed.
        torch.clear_autocast_cache()


@contextlib.contextmanager
def base_alone(model: PeftModel) -> Iterator[None]:
    """Inside, every adapter is switched off; afterwards all is as before.

    PEFT's own way back makes every active adapter trainable, a frozen one beneath another as well.
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with model.disable_adapter(), with_residual(model, None):
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def lora_scaling(model: nn.Module, adapter_name: str = ADAPTER_NAME) -> dict[str, float]:
    """Scaling (alpha / r, or alpha / sqrt r) of each LoRA layer, by the module part of its tensor names."""
    if not isinstance(model, PeftModel):
        return {}
    found: dict[str, float] = {}
    for name, module in model.named_modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict) and adapter_name in scaling:
            found[name] = float(scaling[adapter_name])
    return found


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that receive a gradient, by the model's own names; tied ones once."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def save_adapter(model: nn.Module, state: AdapterState, directory: Path) -> None:
    """Save with ``save_pretrained``: an adapter (or a full model) that stock PEFT and transformers open.

    Files are written beside their final names and renamed. ``adapter_config.json`` goes last, so a directory
    that has one is whole.
    """
    restore(model, state)
    with atomic_dir(directory / ".export") as part:
        saving: Any = model
        saving.save_pretrained(part, safe_serialization=True, **_adapter_options(model))
        if isinstance(model, PeftModel):
            # Our own bytes: the same tensors in the same order whatever the release of PEFT.
            save_file({n: t.contiguous() for n, t in state.items()}, part / ADAPTER_WEIGHTS, {"format": "pt"})
            _for_older_peft(part / ADAPTER_CONFIG)
            (part / "README.md").unlink(missing_ok=True)
    export = directory / ".export"
    try:
        for file in sorted(export.iterdir(), key=lambda f: (f.name in {ADAPTER_CONFIG, "config.json"}, f.name)):
            file.chmod(0o644)  # safetensors makes files for their owner alone; a model is for reading, like the rest
            file.replace(directory / file.name)
        export.rmdir()
    except OSError as e:
        raise WriteError(f"cannot write the model to {directory}: {e.strerror or e}") from e


def _adapter_options(model: nn.Module) -> dict[str, Any]:
    if isinstance(model, PeftModel):
        return {"selected_adapters": [ADAPTER_NAME], "save_embedding_layers": False}
    return {}


def _for_older_peft(path: Path) -> None:
    """Drop keys that peft 0.13.2 does not know and that say nothing; sort lists that PEFT keeps as sets."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["inference_mode"] = True
    off: tuple[Any, ...] = (None, False, [], {}, "")
    slim = {k: v for k, v in config.items() if k in PEFT_0_13_KEYS or (v not in off and not _is_default(k, v))}
    for key in ("target_modules", "modules_to_save"):
        if isinstance(slim.get(key), list):
            slim[key] = sorted(slim[key])
    with atomic_path(path) as part:
        part.write_text(json.dumps(slim, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _is_default(key: str, value: Any) -> bool:
    from peft import LoraConfig

    return key == "peft_version" or getattr(LoraConfig(), key, object()) == value
