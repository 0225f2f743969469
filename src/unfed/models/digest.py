"""Digests of a whole model: every weight, and the settings that decide what it computes with them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from unfed.base.artifacts import digest_json
from unfed.models.adapter import live_tensors

# Settings that say where files lie, who wrote them or whether weights train, not what is computed.
_UNIMPORTANT = {
    "_name_or_path", "transformers_version", "base_model_name_or_path", "revision", "peft_version", "inference_mode",
}  # fmt: skip


@dataclass(frozen=True)
class ModelDigest:
    """``model`` covers base, adapter and tokenizer; ``base`` the weights beneath the adapter, ``None`` without one."""

    model: str
    base: str | None


def model_digest(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> ModelDigest:
    """Digest every tensor, bit for bit, and the settings. Reads all weights once: about a second a gigabyte."""
    text = digest_json([tokenizer.get_vocab(), list(map(str, _stops(tokenizer))), str(tokenizer.chat_template)])
    how = [text, _settings(model), str(next(model.parameters()).device.type)]
    adapted = isinstance(model, PeftModel)
    own = live_tensors(model) if adapted else {}
    # Biases that train with an adapter (bias=all) are the base's own: they stay when the adapter is switched off.
    places = {t.data_ptr() for n, t in own.items() if not n.endswith("bias")}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    base = digest_json([*how, _tensors((n, t) for n, t in tensors if t.data_ptr() not in places)])
    if not adapted:
        return ModelDigest(base, None)
    config = {n: _plain(c.to_dict()) for n, c in model.peft_config.items()}
    return ModelDigest(digest_json([base, _tensors(own.items()), config]), base)


def base_facts(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Digests of what must be the same on every machine of a run, whatever device it is on: the weights beneath the
    adapter (bit for bit, names included), the settings of the model, the tokenizer. Reads all weights once."""
    own = {t.data_ptr() for t in live_tensors(model).values()} if isinstance(model, PeftModel) else set()
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    found = getattr(inner, "config", None)
    text = [tokenizer.get_vocab(), list(map(str, _stops(tokenizer))), str(tokenizer.chat_template)]
    return {
        "weights": _tensors((n, t) for n, t in model.named_parameters() if t.data_ptr() not in own),
        "config": digest_json(_plain(found.to_dict()) if found is not None else None),
        "tokenizer": digest_json(text),
    }


def _stops(tokenizer: PreTrainedTokenizerBase) -> Iterable[Any]:
    """What decides, beside the vocabulary, how tokens become text and where text ends."""
    marks = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.padding_side)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    clean = getattr(tokenizer, "clean_up_tokenization_spaces", None)
    decoder = backend.to_str() if backend is not None else type(tokenizer).__name__
    return (*marks, sorted(tokenizer.all_special_ids), clean, decoder)


def _settings(model: nn.Module) -> str:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    found = getattr(inner, "config", None)
    attention = getattr(found, "_attn_implementation", None)
    generation = getattr(inner, "generation_config", None)
    stops = getattr(generation, "eos_token_id", None)
    return digest_json([_plain(found.to_dict()) if found is not None else None, str(attention), str(stops)])


def _plain(settings: dict[str, Any]) -> str:
    return str(sorted((k, _ordered(v)) for k, v in settings.items() if k not in _UNIMPORTANT))


def _ordered(value: Any) -> str:
    """``value`` as text. A set's own order changes from one process to the next (PEFT has target_modules in one)."""
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(str, value)))}}}"
    return str(value)


def _tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    h = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        h.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        flat = tensor.detach().reshape(-1)
        # In pieces: a copy of a large embedding from a GPU would need as much memory again.
        for part in flat.split(1 << 24):
            h.update(part.cpu().contiguous().view(torch.uint8).numpy().data)
    return h.hexdigest()
