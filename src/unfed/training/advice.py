"""Sentences for when a run hurts: out of memory, a loss that is not finite, a loss that does not move."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def out_of_memory(settings: Mapping[str, object], detail: str) -> str:
    """What to lower when CUDA memory runs out, in the order of least harm, with the run's own numbers."""
    batch, accumulation = settings.get("batch", "?"), settings.get("accumulation", "?")
    this_run = (
        f"This run: batch {batch} x accumulation {accumulation}, longest row {settings.get('max_length', '?')} tokens, "
        f"LoRA r {settings.get('r', '-')} on {settings.get('modules', '-')} modules, "
        f"gradient checkpointing {'on' if settings.get('checkpointing') else 'off'}, {settings.get('dtype', '?')}."
    )
    what = detail.strip().splitlines()[0] if detail.strip() else "no detail"
    lines = [f"The GPU ran out of memory ({what}).", this_run, "Try, one at a time:"]
    if not settings.get("checkpointing"):
        lines.append(
            "  trainer.args.gradient_checkpointing=true            (slower by about a third, much less memory)"
        )
    if isinstance(batch, int) and isinstance(accumulation, int) and batch > 1:
        lines.append(
            f"  trainer.args.per_device_train_batch_size={batch // 2} trainer.args.gradient_accumulation_steps="
            f"{accumulation * 2}   (the same steps)"
        )
    if settings.get("dtype") == "float32":
        lines.append("  model.model_args.torch_dtype=bfloat16")
    lines += [
        "  lora=quick                                           (r 8, two modules: a smaller adapter and optimizer)",
        "  data.*.max_length=256                                (shorter rows)",
    ]
    return "\n".join(lines)


def not_finite(phase: str, method: str) -> str:
    """What to try when the loss became NaN or infinite."""
    return (
        f"the loss of phase {phase} ({method}) is not finite: lower trainer.args.learning_rate (by 3 to 10), set "
        "trainer.args.max_grad_norm=1.0, use trainer.args.bf16=true instead of fp16, or choose a bounded method "
        "(method=NPO or method=SimNPO instead of GradAscent)"
    )


def did_not_move(phase: str, first: float, last: float) -> str:
    """What to try when the loss stayed where it was."""
    return (
        f"the loss of phase {phase} hardly moved ({first:.4f} -> {last:.4f}): raise trainer.args.learning_rate "
        "(adapters take 1e-4 to 1e-3, tiny models 1e-2), train longer (num_train_epochs, global_rounds, "
        "unlearn_epochs), or give the adapter more room (lora=balanced, lora=high); with an adaptive aggregator, raise "
        "aggregator.server_lr"
    )


def stuck(losses: Sequence[float], threshold: float = 0.01) -> bool:
    """Whether losses over the same rows (a value a round or an epoch, two at least) moved by less than a hundredth."""
    finite = [x for x in losses if math.isfinite(x)]
    if len(finite) < 2:
        return False
    quarter = max(1, len(finite) // 4)
    first, last = sum(finite[:quarter]) / quarter, sum(finite[-quarter:]) / quarter
    return abs(last - first) < threshold * max(abs(first), 1e-8)
