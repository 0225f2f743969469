"""Federated runs over synthetic clients, as ``unfed`` runs them: in process, checkpointed, FedAvg."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from peft import PeftModel
from setting import Shape, make_rows

from unfed.aggregation.registry import build_aggregator
from unfed.base.types import ServerState
from unfed.federated.checkpoint import Checkpoints
from unfed.federated.client import Client, ClientData
from unfed.federated.rounds import RoundsConfig, RunKeeper, run_rounds
from unfed.federated.schedule import Schedule
from unfed.federated.transport import InProcess
from unfed.models.adapter import lora_scaling, snapshot
from unfed.objectives.nll import NLL
from unfed.objectives.registry import build_objective
from unfed.training.loop import Local
from unfed.unlearning.base import Ingredients, Situation
from unfed.unlearning.finetune import finetune
from unfed.unlearning.local_then_recover import LocalThenRecover

Recipe = Literal["finetune", "NPO", "GradDiff"]


def make_clients(shape: Shape, count: int, rows: int) -> dict[str, ClientData]:
    """``count`` clients with ``rows`` rows to train on and to retain, and as many to forget.

    All have the same rows: were they drawn anew, the longest row, and with it the peak of a step, would grow with the
    number of clients.
    """
    train, forget = make_rows(shape, rows, "train"), make_rows(shape, rows, "forget")
    names = [f"client_{number}" for number in range(count)]
    return {n: ClientData(n, {"train": train, "retain": train, "forget": forget}) for n in names}


def make_schedule(recipe: Recipe, clients: list[str], rounds: int) -> Schedule:
    """Plain training, or a method on every client followed by recovery; NPO needs a reference policy."""
    if recipe == "finetune":
        return finetune(clients, NLL(), 1.0, rounds)
    everyone = Situation(tuple(clients), tuple(clients))
    given = Ingredients(everyone, build_objective(recipe, {}), NLL(), 1.0, 1.0, rounds)
    return LocalThenRecover().plan(given).schedule


def federated_run(local: Local, clients: dict[str, ClientData], schedule: Schedule, directory: Path) -> RunKeeper:
    """Run the schedule from the model's present adapter, with a checkpoint after every round."""
    assert isinstance(local.model, PeftModel)
    start = snapshot(local.model)
    keeper = RunKeeper(checkpoints=Checkpoints(directory, {}))
    client = Client(local, clients, reference=start)
    rule = build_aggregator("FedAvg", {}, lora_scaling=lora_scaling(local.model))
    run_rounds(schedule, InProcess(client.fit), rule, ServerState(0, start), RoundsConfig(), keeper)
    return keeper
