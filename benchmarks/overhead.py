"""What federation costs: a federated run against a plain loop over the same batches.

The plain loop is what one would write by hand: the same forward pass, clipping and AdamW, and nothing else. The
federated run adds what ``unfed`` does around it: adapters in and out, an optimizer for each client and round,
screening, the average and its error, and a checkpoint on disk. Clients have few rows here, so real runs pay less.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from rounds import federated_run, make_clients, make_schedule
from setting import SHAPES, Shape, adamw, alternate, arguments, make_local, make_model, median_ratio, record

from unfed.data.chat import EncodedExample
from unfed.federated.client import ClientData
from unfed.models.adapter import trainable_parameters
from unfed.models.forward import token_logps
from unfed.training.batches import BatchPlan, TrainRows
from unfed.training.loop import Local


def plain_run(local: Local, clients: dict[str, ClientData], rounds: int) -> int:
    """The batches of a federated run, one after the other in one loop. Returns the number of steps."""
    optimizer, steps = adamw(local.model), 0
    for number in range(rounds):
        for name, data in clients.items():
            for batch in _batches(local, data, ("fit", number, name)):
                logps, _ = token_logps(local.model, batch.to(local.device))
                (-logps.mean()).backward()
                torch.nn.utils.clip_grad_norm_(trainable_parameters(local.model).values(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                steps += 1
    return steps


def _batches(local: Local, data: ClientData, seed_path: tuple[str | int, ...]) -> Any:
    rows: list[EncodedExample] = list(data.splits["train"])
    plan = BatchPlan(
        TrainRows({"train": rows}), "train", frozenset({"train"}), local.args.per_device_train_batch_size, 1, seed_path
    )
    for step in plan.epoch(local.seed, 0, local.collation):
        yield step.micro[0]["train"]


def measure(shape: Shape, repeats: int = 3, clients: int = 3, rounds: int = 1) -> dict[str, Any]:
    """Seconds of both, and their ratio (the median over the pairs)."""
    local = make_local(make_model(shape), shape, lr_scheduler_type="constant")
    data = make_clients(shape, clients, shape.rows_per_client)
    schedule = make_schedule("finetune", list(data), rounds)
    counts: dict[str, float] = {}

    def plain() -> None:
        counts["plain"] = plain_run(local, data, rounds)

    def federated() -> None:
        with tempfile.TemporaryDirectory() as directory:
            keeper = federated_run(local, data, schedule, Path(directory))
        counts["federated"] = sum(m["steps"] for r in keeper.records for m in r.metrics.values())

    plain_run(local, dict(list(data.items())[:1]), 1)  # warm up
    theirs, ours = alternate(plain, federated, repeats)
    if counts["plain"] != counts["federated"]:
        raise RuntimeError(f"not the same work: {counts}")
    return {
        "clients": clients,
        "steps": int(counts["plain"]),
        "plain_seconds": theirs,
        "federated_seconds": ours,
        "federated_over_plain": median_ratio(ours, theirs),
    }


if __name__ == "__main__":
    given = arguments(__doc__ or "", repeats=5).parse_args()
    record("overhead", given.shape, measure(SHAPES[given.shape], given.repeats))
