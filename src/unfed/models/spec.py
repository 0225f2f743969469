"""What there is to say about a model before it is opened. Plain data: nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from unfed.base.params import STRICT

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


@dataclass(frozen=True)
class LoraArgs:
    """PEFT's ``LoraConfig``, by PEFT's names. ``target_modules``: a list, one name, or ``all-linear``."""

    __pydantic_config__: ClassVar[Any] = STRICT
    r: int = 16
    lora_alpha: int = 32
    target_modules: tuple[str, ...] | str = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    lora_dropout: float = 0.1
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    modules_to_save: tuple[str, ...] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, int] = field(default_factory=dict)
    layers_to_transform: tuple[int, ...] | None = None

    def targets(self) -> list[str] | str:
        """``target_modules`` for PEFT, which takes a bare string for a regular expression over whole names."""
        if isinstance(self.target_modules, str):
            return [self.target_modules] if self.target_modules.isidentifier() else self.target_modules
        return list(self.target_modules)


@dataclass(frozen=True)
class ModelArgs:
    """How the model is opened.

    ``pretrained_model_name_or_path`` is a full model's directory, a hub name, a ``.gguf`` file, or an adapter
    directory (then the base is the one its ``adapter_config.json`` names, or ``base_model_name_or_path``).
    ``lora_model_path`` is an adapter to go on from, on top of a full model.
    """

    __pydantic_config__: ClassVar[Any] = STRICT
    pretrained_model_name_or_path: str
    attn_implementation: str | None = None
    torch_dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    use_lora: bool = False
    lora_config: LoraArgs | None = None
    lora_model_path: str | None = None
    base_model_name_or_path: str | None = None
    gguf_file: str | None = None
    revision: str | None = None
    device_map: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class TokenizerArgs:
    """``None`` takes the tokenizer that lies with the model, or with its adapter."""

    __pydantic_config__: ClassVar[Any] = STRICT
    pretrained_model_name_or_path: str | None = None
    revision: str | None = None
