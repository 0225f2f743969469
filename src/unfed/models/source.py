"""Where a model's weights, adapter and tokenizer come from, decided before anything heavy is imported or opened."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from unfed.base.errors import AdapterError, UnfedError, nearest
from unfed.models.spec import ADAPTER_CONFIG, ADAPTER_WEIGHTS, ModelArgs, TokenizerArgs


@dataclass(frozen=True)
class ModelSource:
    """Where base weights, adapter and tokenizer come from, decided before anything is opened."""

    base: str
    gguf_file: str | None
    adapter: str | None
    tokenizer: str


def is_adapter_dir(path: str | Path) -> bool:
    """Whether ``path`` is a directory with a PEFT adapter in it."""
    return (Path(path) / ADAPTER_CONFIG).is_file()


def resolve_source(args: ModelArgs, tokenizer: TokenizerArgs) -> ModelSource:
    """Find out what ``pretrained_model_name_or_path`` is. Reads at most one small JSON file.

    Raises ``UnfedError`` for two adapters at once, an adapter without weights, or a base that is not there.
    """
    path = args.pretrained_model_name_or_path
    key = "model.model_args.pretrained_model_name_or_path"
    adapter = args.lora_model_path
    if adapter is not None and not is_adapter_dir(adapter):
        raise AdapterError(f"model.model_args.lora_model_path={adapter}: no {ADAPTER_CONFIG} there")
    base, gguf = path, args.gguf_file
    if is_adapter_dir(path):
        if adapter is not None:
            raise AdapterError(
                f"{key}={path} is itself an adapter and lora_model_path={adapter} is another: name the base model in "
                "pretrained_model_name_or_path, or leave lora_model_path out"
            )
        adapter = path
        base = args.base_model_name_or_path or base_of(path)
    elif args.base_model_name_or_path is not None:
        raise UnfedError(
            f"model.model_args.base_model_name_or_path is for an adapter directory; {key}={path} is not one"
        )
    if adapter is not None and not (Path(adapter) / ADAPTER_WEIGHTS).is_file():
        raise AdapterError(f"{adapter} has {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS} (pickled adapters are not read)")
    if gguf is None and base.endswith(".gguf"):
        gguf, base = Path(base).name, str(Path(base).parent)
    if (problem := path_problem(base)) is not None:
        raise UnfedError(f"{key}={path}: {problem}")
    return ModelSource(base, gguf, adapter, _tokenizer_source(tokenizer, adapter, base))


def path_problem(path: str) -> str | None:
    """What is wrong with a name that looks like a local path, or ``None`` (hub names are not looked up)."""
    p = Path(path)
    looks_local = p.is_absolute() or path.startswith((".", "~", "saves/")) or path.count("/") > 1
    if p.exists() or not looks_local:
        return None
    parent = p.parent
    names = [c.name for c in parent.iterdir()] if parent.is_dir() else []
    return f"there is no {path}{nearest(p.name, names) if names else ''}"


def base_of(adapter: str) -> str:
    """The base model that an adapter directory names."""
    file = Path(adapter) / ADAPTER_CONFIG
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except ValueError as e:
        raise AdapterError(f"{file} is not valid JSON: {e}") from e
    if not base:
        raise AdapterError(f"{file} names no base model: set model.model_args.base_model_name_or_path")
    if (problem := path_problem(base)) is not None:
        raise AdapterError(
            f"the base model of {adapter} has moved: {problem}. Set "
            "model.model_args.base_model_name_or_path to where it is"
        )
    return str(base)


def _tokenizer_source(tokenizer: TokenizerArgs, adapter: str | None, base: str) -> str:
    if tokenizer.pretrained_model_name_or_path is not None:
        return tokenizer.pretrained_model_name_or_path
    if adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file():
        return adapter
    return base
