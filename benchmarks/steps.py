"""Training steps against the same PEFT model trained in the usual way.

The usual way: batches of random rows padded to their longest, logits at every position, transformers' own loss. Ours:
batches of like length, the head on labelled positions only. Both see the same rows once with the same batch size,
AdamW and clipping, in one optimizer run.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from setting import (
    PAD,
    SHAPES,
    Shape,
    adamw,
    alternate,
    arguments,
    make_local,
    make_model,
    make_rows,
    median_ratio,
    record,
)

from unfed.base.seeding import torch_generator
from unfed.data.chat import EncodedExample
from unfed.data.collate import collate
from unfed.models.adapter import trainable_parameters
from unfed.objectives.nll import NLL
from unfed.training.batches import BatchPlan, TrainRows
from unfed.training.context import Companions
from unfed.training.loop import Local, LocalTask


def usual_epoch(model: PeftModel, rows: list[EncodedExample], batch_size: int) -> None:
    """One epoch as a plain PEFT script trains it."""
    device = next(model.parameters()).device
    optimizer = adamw(model)
    order = torch.randperm(len(rows), generator=torch_generator(0, "usual")).tolist()
    for start in range(0, len(order), batch_size):
        batch = collate([rows[i] for i in order[start : start + batch_size]], PAD).to(device)
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable_parameters(model).values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def our_epoch(local: Local, rows: list[EncodedExample]) -> None:
    """One epoch as Unfed's loop trains it, its set-up included."""
    size = local.args.per_device_train_batch_size
    plan = BatchPlan(TrainRows({"train": rows}), "train", frozenset(("train",)), size, 1, ("ours",))
    local.train(LocalTask(plan, NLL(), 1.0), Companions())


def measure(shape: Shape, repeats: int = 3, batches: int = 10) -> dict[str, Any]:
    """Seconds of both over ``batches`` batches, the speed-up (median over the pairs) and our tokens a second."""
    model = make_model(shape)
    local = make_local(model, shape, lr_scheduler_type="constant")
    rows = make_rows(shape, batches * shape.batch_size, "steps")
    warm = rows[: 2 * shape.batch_size]
    usual_epoch(model, warm, shape.batch_size)
    our_epoch(local, warm)
    usual, ours = alternate(lambda: usual_epoch(model, rows, shape.batch_size), lambda: our_epoch(local, rows), repeats)
    tokens = sum(len(r) for r in rows)
    return {
        "rows": len(rows),
        "tokens": tokens,
        "label_tokens": sum(r.num_label_tokens for r in rows),
        "usual_seconds": usual,
        "our_seconds": ours,
        "usual_tokens_per_second": tokens / min(usual),
        "our_tokens_per_second": tokens / min(ours),
        "speedup": median_ratio(usual, ours),
    }


if __name__ == "__main__":
    given = arguments(__doc__ or "").parse_args()
    record("steps", given.shape, measure(SHAPES[given.shape], given.repeats))
