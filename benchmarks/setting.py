"""What the benchmarks share: models with random weights, rows of TOFU's lengths, clients, and the record of a run.

Time and memory depend on shapes, not on values, so nothing is downloaded. Rows are random tokens whose numbers are
drawn to match TOFU under SmolLM2's chat template and tokenizer: prompts of 48 tokens (standard deviation 6, measured
over every fourth row of ``full``), answers of 37 (12), 85 together.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from unfed.base.artifacts import write_json
from unfed.base.seeding import torch_generator
from unfed.base.types import IGNORE_INDEX
from unfed.data.chat import EncodedExample
from unfed.models.adapter import trainable_parameters
from unfed.training.args import LoopArgs
from unfed.training.batches import Collation
from unfed.training.loop import Local

PAD = 0
OUTPUT = Path("saves") / "benchmarks"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Shape:
    """A Llama by its sizes, the batch it trains with, and the rows of one client in one round."""

    name: str
    sizes: Mapping[str, Any]
    batch_size: int
    rows_per_client: int
    dtype: torch.dtype = torch.bfloat16


SHAPES = {
    s.name: s
    for s in (
        Shape("tiny", {
            "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2,
        }, 4, 8, torch.float32),
        Shape("smollm2-135m", {
            "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
        }, 8, 32),
        Shape("llama-3.2-3b", {
            "vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
            "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
        }, 32, 512),
    )
}  # fmt: skip


def make_model(shape: Shape, device: str | None = None, rank: int = 16) -> PeftModel:
    """The shape with random weights and a LoRA adapter on every linear layer, on the GPU if there is one."""
    torch.manual_seed(0)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    before = torch.get_default_dtype()
    torch.set_default_dtype(shape.dtype)
    try:
        with torch.device(device):
            base = LlamaForCausalLM(LlamaConfig(**shape.sizes, pad_token_id=PAD))
    finally:
        torch.set_default_dtype(before)
    base.config.use_cache = False
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.1, target_modules=TARGETS, task_type="CAUSAL_LM")
    with torch.device(device):
        model = get_peft_model(base, lora)
    assert isinstance(model, PeftModel)
    return model.train()


def make_rows(shape: Shape, count: int, purpose: str) -> list[EncodedExample]:
    """``count`` rows of random tokens with TOFU's lengths, the same in every run."""
    g = torch_generator(0, "benchmark", purpose)
    prompts = (torch.randn(count, generator=g) * 5.8 + 47.9).round().int().clamp(min=35).tolist()
    answers = (torch.randn(count, generator=g) * 12.0 + 36.7).round().int().clamp(min=9).tolist()
    rows = []
    for number, (p, a) in enumerate(zip(prompts, answers, strict=True)):
        ids = torch.randint(1, int(shape.sizes["vocab_size"]), (p + a,), generator=g).tolist()
        rows.append(
            EncodedExample(tuple(ids), (IGNORE_INDEX,) * p + tuple(ids[p:]), p, example_id=f"{purpose}-{number}")
        )
    return rows


def make_local(model: nn.Module, shape: Shape, **args: Any) -> Local:
    """The training loop as ``trainer.args`` would set it up."""
    given: dict[str, Any] = {"per_device_train_batch_size": shape.batch_size, "learning_rate": 1e-4, **args}
    return Local(model, LoopArgs(**given), Collation(PAD), seed=0)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that ``optim: adamw_torch`` gives the loop, for a loop written by hand."""
    return torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-4, weight_decay=0.0)


def timed(work: Callable[[], Any]) -> float:
    """Seconds that ``work`` takes, until the device has finished."""
    _wait()
    began = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - began


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def alternate(a: Callable[[], Any], b: Callable[[], Any], repeats: int) -> tuple[list[float], list[float]]:
    """Time ``a`` and ``b`` in turn (a b, b a, a b, ...), so that a drifting machine favours neither."""
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats):
        for which in (0, 1) if repeat % 2 == 0 else (1, 0):
            times[which].append(timed((a, b)[which]))
    return times


def median_ratio(a: list[float], b: list[float]) -> float:
    """The median of ``a / b`` over the pairs."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def arguments(description: str, shape: str = "smollm2-135m", repeats: int = 3) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--shape", choices=sorted(SHAPES), default=shape)
    parser.add_argument("--repeats", type=int, default=repeats)
    return parser


def machine() -> dict[str, Any]:
    """Where the figures were measured."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def record(name: str, shape: str, result: Mapping[str, Any]) -> None:
    """Print the result and keep it in ``saves/benchmarks/<name>_<shape>.json``."""
    path = OUTPUT / f"{name}_{shape}.json"
    write_json(path, {"benchmark": name, "shape": shape, "machine": machine(), **result})
    for key, value in result.items():
        print(f"{key:32} {value:.4g}" if isinstance(value, float) else f"{key:32} {value}")
    print(f"kept in {path}")
