"""``trainer.args``: transformers' TrainingArguments by name, and what the local loop does with each."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from unfed.base.errors import ConfigError, nearest

LORA_LEARNING_RATE = 1e-4
"""Default with adapters (Hu et al. 2021 use 2e-4 to 1e-3 on small, TOFU's LoRA recipe 1e-4 on 7B models)."""
FULL_LEARNING_RATE = 1e-5
"""Default with all parameters (the TOFU recipe)."""

EVAL_STRATEGIES = ("no", "round", "phase")

# Names that change nothing here, and why they may stand in a configuration all the same.
HARMLESS = {
    "output_dir": "paths.output_dir decides",
    "remove_unused_columns": "batches hold what the model needs and nothing else",
    "do_train": "the mode decides",
    "do_eval": "the mode decides",
    "save_strategy": "a checkpoint follows every round",
    "save_steps": "a checkpoint follows every round",
    "save_only_model": "adapters are saved, never optimizer states",
    "save_total_limit": "engine.keep_checkpoints decides",
    "per_device_eval_batch_size": "eval.batch_size decides",
    "logging_strategy": "logging_steps decides",
    "train_sampling_strategy": "batches are always grouped by length",
    "group_by_length": "batches are always grouped by length",
    "ddp_find_unused_parameters": "one device a process",
    "dataloader_pin_memory": "batches of token ids are too small for it to matter",
    "disable_tqdm": "progress is shown on terminals only",
    "log_level": "logging is Hydra's",
}


@dataclass(frozen=True)
class LoopArgs:
    """What the local loop uses. Names and defaults are those of ``TrainingArguments``, but where noted.

    ``learning_rate=None`` means 1e-4 with adapters and 1e-5 without. Of ``warmup_epochs`` (ours, in local epochs),
    ``warmup_ratio`` (of all steps) and ``warmup_steps`` (a number of steps, or a ratio below 1) one may be given.
    ``seed`` decides order and dropout; ``None`` takes the run's own. ``max_steps`` bounds each client's steps in each
    round and never adds epochs (in ``TrainingArguments`` it replaces them). ``logging_steps`` is 10 unless given.
    ``eval_strategy``: between rounds, ``no``, ``round`` or ``phase`` (``TrainingArguments`` has steps and epochs).
    """

    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    num_train_epochs: float = 1.0
    max_steps: int = -1
    learning_rate: float | None = None
    lr_scheduler_type: str = "linear"
    lr_scheduler_kwargs: Mapping[str, Any] = field(default_factory=dict)
    warmup_epochs: float = 0.0
    warmup_ratio: float = 0.0
    warmup_steps: float = 0
    optim: str = "adamw_torch"
    optim_args: str | None = None
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    bf16: bool = False
    fp16: bool = False
    tf32: bool | None = None
    gradient_checkpointing: bool = False
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None
    dataloader_num_workers: int = 0
    use_cpu: bool = False
    logging_steps: int = 10
    report_to: tuple[str, ...] = ("tensorboard",)
    run_name: str | None = None
    seed: int | None = None
    eval_strategy: str = "no"

    def __post_init__(self) -> None:
        problems = [
            f"trainer.args.{name}={getattr(self, name)}: must be {what}"
            for name, ok, what in (
                ("per_device_train_batch_size", self.per_device_train_batch_size >= 1, "at least 1"),
                ("gradient_accumulation_steps", self.gradient_accumulation_steps >= 1, "at least 1"),
                ("num_train_epochs", 0 < self.num_train_epochs < math.inf, "above 0, and finite"),
                ("weight_decay", self.weight_decay >= 0, "at least 0"),
                ("learning_rate", self.learning_rate is None or 0 < self.learning_rate < math.inf, "above 0"),
                ("warmup_ratio", 0 <= self.warmup_ratio <= 1, "between 0 and 1"),
                ("warmup_epochs", self.warmup_epochs >= 0, "at least 0"),
                ("warmup_steps", self.warmup_steps >= 0, "at least 0"),
                ("max_grad_norm", self.max_grad_norm >= 0, "at least 0 (0 does not clip)"),
                ("dataloader_num_workers", self.dataloader_num_workers >= 0, "at least 0"),
            )
            if not ok
        ]
        given = [n for n in ("warmup_epochs", "warmup_ratio", "warmup_steps") if getattr(self, n) > 0]
        if len(given) > 1:
            problems.append(f"trainer.args: give one of {', '.join(given)}, not {len(given)}")
        if self.eval_strategy not in EVAL_STRATEGIES:
            problems.append(
                f"trainer.args.eval_strategy={self.eval_strategy}: between rounds one may evaluate after each "
                f"(round) or after the last of each phase (phase){nearest(self.eval_strategy, EVAL_STRATEGIES)}"
            )
        if self.bf16 and self.fp16:
            problems.append("trainer.args: bf16 and fp16 exclude each other")
        if problems:
            raise ConfigError(problems)

    def step_size(self) -> int:
        """Examples of one optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def warmup(self, total_steps: int, steps_per_epoch: int) -> int:
        """Warm-up in optimizer steps."""
        if self.warmup_epochs > 0:
            return min(total_steps, math.ceil(self.warmup_epochs * steps_per_epoch))
        ratio = self.warmup_ratio or (self.warmup_steps if self.warmup_steps < 1 else 0)
        return math.ceil(ratio * total_steps) if ratio else min(total_steps, int(self.warmup_steps))

    def resolved_learning_rate(self, *, use_lora: bool) -> float:
        """The learning rate, or its default for this kind of training."""
        return self.learning_rate or (LORA_LEARNING_RATE if use_lora else FULL_LEARNING_RATE)


def arg_problems(args: Mapping[str, Any]) -> list[str]:
    """Problems of names and values in ``trainer.args``, each naming its key."""
    known = {f.name for f in dataclasses.fields(LoopArgs)}
    problems = [_unused(name) for name in args if name not in known and name not in HARMLESS]
    if problems:
        return problems
    try:
        loop_args(args)
    except ConfigError as e:
        return list(e.problems)
    return []


def _unused(name: str) -> str:
    from transformers import TrainingArguments

    known = {f.name for f in dataclasses.fields(LoopArgs)} | set(HARMLESS)
    if name in {f.name for f in dataclasses.fields(TrainingArguments)}:
        return f"trainer.args.{name}: a TrainingArguments name that Unfed's loop does not use; remove it"
    return f"trainer.args.{name}: no such name{nearest(name, known)}"


def _whole(value: Any) -> int:
    """``int`` for what is a whole number; ``8.5`` is refused, not cut."""
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError(value)
    return int(value)


_NUMBERS = {"int": _whole, "int | None": _whole, "float": float, "float | None": float}


def loop_args(args: Mapping[str, Any]) -> LoopArgs:
    """Build :class:`LoopArgs`; ``ConfigError`` for values of the wrong kind. Harmless names are left out."""
    problems, kept = [], {}
    for spec in dataclasses.fields(LoopArgs):
        if spec.name not in args:
            continue
        value = args[spec.name]
        number = _NUMBERS.get(str(spec.type))
        if number is not None and not (value is None and "None" in str(spec.type)):
            try:
                value = number(value)
            except (TypeError, ValueError):
                kind = "whole number" if number is _whole else "number"
                problems.append(f"trainer.args.{spec.name}={value!r}: not a {kind}")
                continue
        if str(spec.type) in {"bool", "bool | None"} and type(value) not in {bool, type(None)}:
            problems.append(f"trainer.args.{spec.name}={value!r}: not true or false")
            continue
        if spec.name == "report_to":
            value = (value,) if isinstance(value, str) else tuple(value or ())
        if value is None and spec.name == "lr_scheduler_kwargs":
            value = {}
        if spec.name == "eval_strategy" and not value:
            value = "no"  # which YAML reads as false
        kept[spec.name] = value
    problems += _name_problems(kept)
    if problems:
        raise ConfigError(problems)
    return LoopArgs(**kept)


def _name_problems(kept: Mapping[str, Any]) -> list[str]:
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    problems = []
    for key, enum in (("optim", OptimizerNames), ("lr_scheduler_type", SchedulerType)):
        names = [str(e.value) for e in enum]
        if key in kept and kept[key] not in names:
            problems.append(f"trainer.args.{key}={kept[key]}{nearest(kept[key], names)}")
    return problems


def usable_optimizer(name: str) -> tuple[str, str | None]:
    """The optimizer to use on this machine, and a note when it is not the one asked for."""
    needs_bnb = "8bit" in name or "paged" in name or name.endswith("_bnb") or "32bit" in name
    if not needs_bnb or (torch.cuda.is_available() and importlib.util.find_spec("bitsandbytes") is not None):
        return name, None
    lacking = "a CUDA device" if not torch.cuda.is_available() else "bitsandbytes"
    stand_in = "lion_32bit" if "lion" in name else "adamw_torch"
    if stand_in == "lion_32bit":
        raise ConfigError([f"trainer.args.optim={name}: needs {lacking}; use adamw_torch"])
    return "adamw_torch", f"optim: adamw_torch instead of {name} (needs {lacking})"
