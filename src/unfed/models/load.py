"""One loader for full models, adapter directories, base + adapter, GGUF files and hub names."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from unfed.base.errors import AdapterError, UnfedError, nearest
from unfed.base.seeding import derive_seed
from unfed.models.adapter import ADAPTER_NAME, live_tensors, trainable_parameters
from unfed.models.source import ModelSource, resolve_source
from unfed.models.spec import ADAPTER_WEIGHTS, ATTENTION, LoraArgs, ModelArgs, TokenizerArgs

SHAPE_KEYS = ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to train or evaluate, with what was decided on the way.

    ``base`` names the base model that a stock ``PeftModel.from_pretrained`` would open; ``fingerprint`` tells
    two bases apart (:func:`fingerprint`); ``notes`` are said once to the user.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    base: str
    fingerprint: str
    adapter_path: str | None
    notes: tuple[str, ...]


def attention(name: str | None) -> tuple[str, str | None]:
    """The attention implementation to use here, and a note when it is not the one asked for."""
    if name is None:
        return "sdpa", None
    if name not in ATTENTION:
        raise UnfedError(f"model.model_args.attn_implementation={name}{nearest(name, ATTENTION)}")
    if not name.startswith("flash_attention"):
        return name, None
    missing = []
    if importlib.util.find_spec("flash_attn") is None and name == "flash_attention_2":
        missing.append("flash-attn is not installed")
    if not torch.cuda.is_available():
        missing.append("there is no CUDA device")
    if missing:
        return "sdpa", f"attn_implementation: sdpa instead of {name} ({' and '.join(missing)})"
    return name, None


def load_model(
    args: ModelArgs,
    tokenizer_args: TokenizerArgs,
    *,
    trainable: bool,
    seed: int = 0,
    adapter_name: str = ADAPTER_NAME,
) -> LoadedModel:
    """Open the model and its tokenizer; make, or open, the adapter.

    An adapter directory is opened with ``PeftModel.from_pretrained(..., is_trainable=trainable)`` and never
    wrapped again. With ``use_lora`` and no adapter a new one is made (``B = 0``), seeded by ``seed``.
    ``adapter_name``: PEFT's name of an adapter that is opened. Raises ``UnfedError`` / ``AdapterError`` with what to
    mend.
    """
    source = resolve_source(args, tokenizer_args)
    if source.gguf_file is not None and trainable and not args.use_lora:
        raise UnfedError(
            f"{source.gguf_file} is quantised: a model opened from GGUF cannot be saved again, so only adapters can be "
            "trained on it (model.model_args.use_lora=true)"
        )
    attn, note = attention(args.attn_implementation)
    notes = [note] if note else []
    model = _open_base(args, source, attn)
    tokenizer = _open_tokenizer(source, tokenizer_args, args)
    mark = fingerprint(model)
    base = _public_base(source)
    if source.adapter is not None:
        if trainable and not args.use_lora:
            raise AdapterError(
                f"{source.adapter} is a LoRA adapter, but model.model_args.use_lora is false, which trains all "
                "parameters: choose the -lora model file, or merge the adapter into its base first"
            )
        model = _open_adapter(model, source.adapter, adapter_name, trainable=trainable)
        # Where it was opened now, not where it was trained: the adapter that this run saves names its base.
        own = model.peft_config[adapter_name]
        own.base_model_name_or_path = base
        notes += _adapter_notes(own, args.lora_config, source.adapter)
    elif args.use_lora:
        model = new_adapter(model, args.lora_config or LoraArgs(), base, seed)
    if not trainable:
        model.requires_grad_(False)
    elif not trainable_parameters(model):
        raise AdapterError("no parameter of the model requires a gradient: there is nothing to train")
    if args.device_map is None and torch.cuda.is_available():
        model.to("cuda")  # pyright: ignore[reportArgumentType]
    return LoadedModel(model, tokenizer, base, mark, source.adapter, tuple(notes))


def _public_base(source: ModelSource) -> str:
    base = source.base if source.gguf_file is None else str(Path(source.base) / source.gguf_file)
    return str(Path(base).resolve()) if Path(base).exists() else base


def _open_base(args: ModelArgs, source: ModelSource, attn: str) -> PreTrainedModel:
    dtype = "auto" if args.torch_dtype == "auto" else DTYPES[args.torch_dtype]
    options: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": attn,
        "trust_remote_code": args.trust_remote_code,
        "revision": args.revision or "main",
    }
    if args.device_map is not None:
        options["device_map"] = args.device_map
    if source.gguf_file is not None:
        options["gguf_file"] = source.gguf_file
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(source.base, use_safetensors=source.gguf_file is None, **options)
    except (OSError, ValueError, ImportError, safetensors.SafetensorError) as e:
        raise UnfedError(f"cannot open the model {source.base}: {first_line(e)}") from e
    except (AssertionError, RuntimeError) as e:  # torch's words for a device that is not there
        if args.device_map is None or isinstance(e, torch.OutOfMemoryError):
            raise
        raise UnfedError(f"model.model_args.device_map={args.device_map}: {first_line(e)}") from e
    if any(".lora_" in n for n, _ in model.named_parameters()):
        raise AdapterError(f"{source.base} already carries LoRA layers; name it as an adapter directory instead")
    return model


def _open_tokenizer(source: ModelSource, tokenizer: TokenizerArgs, args: ModelArgs) -> PreTrainedTokenizerBase:
    options: dict[str, Any] = {"trust_remote_code": args.trust_remote_code, "revision": tokenizer.revision or "main"}
    if source.gguf_file is not None and source.tokenizer == source.base:
        options["gguf_file"] = source.gguf_file
    try:
        found = AutoTokenizer.from_pretrained(source.tokenizer, **options)
    except (OSError, ValueError) as e:
        raise UnfedError(f"cannot open the tokenizer {source.tokenizer}: {first_line(e)}") from e
    if found.pad_token_id is None:
        # Padding is masked by length, so sharing an id with eos does no harm.
        found.pad_token = found.eos_token
    return found


def _open_adapter(model: PreTrainedModel, path: str, name: str, *, trainable: bool) -> PeftModel:
    try:
        with safetensors.safe_open(Path(path) / ADAPTER_WEIGHTS, framework="pt") as file:
            stored = set(file.keys())
        opened = PeftModel.from_pretrained(model, path, adapter_name=name, is_trainable=trainable)
    except RuntimeError as e:
        raise AdapterError(f"the adapter {path} does not fit its base model: {_mismatch(e)}") from e
    except (OSError, ValueError, TypeError, KeyError, safetensors.SafetensorError) as e:
        raise AdapterError(f"cannot open the adapter {path}: {first_line(e)}") from e
    _refuse_partial(set(live_tensors(opened, name)), stored, path)
    return opened


def _refuse_partial(wanted: set[str], stored: set[str], path: str) -> None:
    """PEFT passes over tensors that only the file or only the model has; half an adapter is another adapter."""
    lacking, left = sorted(wanted - stored), sorted(stored - wanted)
    if lacking or left:
        if not lacking and not any(".lora_" in n for n in left):
            raise AdapterError(
                f"the adapter {path} holds {left[0]}, which its adapter_config.json does not name as its own: weights "
                "of the base that were trained and saved with it. Train it again with these in modules_to_save"
            )
        what = f"it has no {lacking[0]}" if lacking else f"the base has no place for {left[0]}"
        raise AdapterError(
            f"the adapter {path} does not fit its base model: {what} ({len(lacking)} tensors are missing, {len(left)} "
            "have no place). It was trained on another model: set model.model_args.base_model_name_or_path"
        )


def _mismatch(e: Exception) -> str:
    lines = [line.strip() for line in str(e).splitlines() if "size mismatch" in line]
    return lines[0] if lines else first_line(e)


def first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0]


def new_adapter(model: PreTrainedModel, lora: LoraArgs, base: str, seed: int) -> PeftModel:
    """A fresh adapter around ``model``; ``AdapterError`` for target modules that it does not have."""
    missing = missing_targets(model, lora.targets())
    if missing:
        linear = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        raise AdapterError(
            f"model.model_args.lora_config.target_modules: {type(model).__name__} has no "
            f"{', '.join(missing)}{nearest(missing[0], linear)}"
        )
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        target_modules=lora.targets(),
        lora_dropout=lora.lora_dropout,
        bias=lora.bias,
        use_rslora=lora.use_rslora,
        modules_to_save=list(lora.modules_to_save) if lora.modules_to_save else None,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        layers_to_transform=list(lora.layers_to_transform) if lora.layers_to_transform else None,
        task_type="CAUSAL_LM",
    )
    config.base_model_name_or_path = base
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "lora_init"))
        try:
            peft_model = get_peft_model(model, config, adapter_name=ADAPTER_NAME)
        except (ValueError, re.error) as e:  # a pattern that matches nothing, or is none
            key = "model.model_args.lora_config"
            raise AdapterError(f"{key}: target_modules={lora.target_modules}: {first_line(e)}") from e
    config.base_model_name_or_path = base  # PEFT writes the path it was opened from
    assert isinstance(peft_model, PeftModel)
    return peft_model


def missing_targets(model: nn.Module, targets: Sequence[str] | str) -> list[str]:
    """Target modules that the model does not have (``all-linear`` and regular expressions are PEFT's to check)."""
    if isinstance(targets, str):
        return []
    names = [n for n, _ in model.named_modules()]
    return [t for t in targets if not any(n == t or n.endswith("." + t) for n in names)]


def _adapter_notes(own: PeftConfig, asked: LoraArgs | None, path: str) -> list[str]:
    """An existing adapter keeps its own shape; say so where the configuration asks for another."""
    if asked is None:
        return []
    differ = [k for k in SHAPE_KEYS if getattr(own, k, None) != getattr(asked, k)]
    differ += [k for k in ("rank_pattern", "alpha_pattern") if dict(getattr(own, k) or {}) != dict(getattr(asked, k))]
    if set(getattr(own, "modules_to_save", None) or ()) != set(asked.modules_to_save or ()):
        differ.append("modules_to_save")
    if not isinstance(asked.target_modules, str) and set(asked.target_modules) != set(
        getattr(own, "target_modules", ())
    ):
        differ.append("target_modules")
    if not differ:
        return []
    kept = ", ".join(f"{k}={getattr(own, k)}" for k in differ if k != "target_modules")
    return [f"the adapter {path} keeps its own shape ({kept or 'its own target_modules'}); lora_config is not used"]


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """Tell base models apart: a digest of each tensor's name, shape and 16 of its values (in bfloat16).

    Cheap (no pass over the weights) and the same for a float32 and a bfloat16 copy of one model. A float16 copy
    rounds twice, so its digest has a kind of its own (:func:`same_base`). It is a guard against mistakes, not
    against forgery.
    """
    h = hashlib.sha256()
    kind = "float16-sha256:" if any(p.dtype == torch.float16 for p in model.parameters()) else "sampled-sha256:"
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        count = min(16, flat.numel())
        # Whole numbers: linspace in float32 can round beyond the end of a large tensor.
        index = (torch.arange(count) * (flat.numel() - 1) // max(1, count - 1)).to(flat.device)
        values = flat[index].to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes()
        h.update(f"{name}|{tuple(parameter.shape)}|".encode() + values)
    return kind + h.hexdigest()


def same_base(one: str, other: str) -> bool:
    """Whether two fingerprints may be of one base model; those of different kinds cannot be compared."""
    return one == other or one.partition(":")[0] != other.partition(":")[0]
