"""What is to be said of a training after it: losses that did not move or broke, clients that were left out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from unfed.app.progress import say
from unfed.base.errors import UnfedError
from unfed.config.schema import RunConfig
from unfed.federated.checkpoint import RoundRecord
from unfed.federated.client import Client
from unfed.federated.schedule import Phase, Schedule
from unfed.training import advice
from unfed.training.args import LoopArgs, loop_args


def memory_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that decide how much memory a step takes, for the advice after one did not fit."""
    args = loop_args(config.trainer.args) if config.trainer else LoopArgs()
    lora = config.model.model_args.lora_config
    lengths = [d.max_length for d in (config.data.train, config.data.forget, config.data.retain) if d is not None]
    return {
        "batch": args.per_device_train_batch_size,
        "accumulation": args.gradient_accumulation_steps,
        "checkpointing": args.gradient_checkpointing,
        "max_length": max(lengths, default="?"),
        "r": lora.r if lora else "-",
        "modules": len(lora.target_modules) if lora and not isinstance(lora.target_modules, str) else "-",
        "dtype": config.model.model_args.torch_dtype,
    }


def advise(error: UnfedError, schedule: Schedule, done: int) -> None:
    """Raise ``error`` again with what to try, where a round was lost to values that are not finite."""
    task = next(schedule.tasks(done), None)
    if task is not None and "not finite" in str(error):
        method = next(iter(task.phase.work.values())).objective.name
        raise UnfedError(f"{error}. Probably {advice.not_finite(task.phase.name, method)}") from error


def _loss_path(phase: Phase, client: Client, records: list[RoundRecord]) -> list[float]:
    """A phase's mean loss by round, or by epoch where it has one round: means over the same rows, so they compare."""
    rounds = [r.loss for r in records if r.phase == phase.name and r.loss is not None]
    if len(rounds) > 1:
        return rounds
    epochs = int(next(iter(phase.work.values())).epochs)
    curves = [c for c in client.curves.get(phase.name, []) if epochs > 0 and len(c) >= epochs]
    cut = [[c[k * len(c) // epochs : (k + 1) * len(c) // epochs] for k in range(epochs)] for c in curves]
    return [sum(sum(part) / len(part) for part in parts) / len(parts) for parts in zip(*cut, strict=True)]


def warnings_of(schedule: Schedule, client: Client, records: list[RoundRecord]) -> list[str]:
    """Phases whose loss broke, and a first phase whose loss did not move; said and returned."""
    found = []
    for phase in schedule.phases:
        steps = [x for curve in client.curves.get(phase.name, []) for x in curve]
        path = _loss_path(phase, client, records)
        name = next(iter(phase.work.values())).objective.name
        broken = [r for r in records if r.phase == phase.name and r.failures]
        if any(not math.isfinite(x) for x in steps) or any(
            "not finite" in f for r in broken for f in r.failures.values()
        ):
            found.append(advice.not_finite(phase.name, name))
        elif phase is schedule.phases[0] and isinstance(phase.rule, str) and advice.stuck(path):
            # Under a recipe's own rule the clients may send gradients, or train for a part of an epoch.
            found.append(advice.did_not_move(phase.name, path[0], path[-1]))
    for sentence in found:
        say(f"WARNING: {sentence}")
    return found


def left_out(schedule: Schedule, records: list[RoundRecord], targets: Sequence[str]) -> list[str]:
    """Clients that should have unlearned (``targets``) or taken part, and of whom no round of a phase has a usable
    update. ``UnfedError`` where that is every target of a phase: nothing was unlearned there."""
    found = []
    for phase in schedule.phases:
        heard = {c for r in records if r.phase == phase.name for c in r.clients}
        reasons = {c: why for r in records if r.phase == phase.name for c, why in r.failures.items()}
        silent = [c for c in phase.always if c not in heard]
        asked = [c for c in phase.always if c in targets]
        if asked and set(asked) <= set(silent):
            why = "; ".join(f"{c}: {reasons.get(c, 'it returned no update')}" for c in asked)
            raise UnfedError(f"nothing was unlearned in phase {phase.name}, no target returned a usable update: {why}")
        for name in silent:
            what = "did not unlearn" if name in targets else "took no part"
            found.append(f"{name} {what} in phase {phase.name}: {reasons.get(name, 'it returned no update')}")
            say(f"WARNING: {found[-1]}")
    return found
