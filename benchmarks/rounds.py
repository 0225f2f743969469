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
from unfed.objectives.npo import NPO
from unfed.training.loop import Local
from unfed.unlearning.recipes import Ingredients, finetune, local_then_recover

Recipe = Literal["finetune", "npo"]


def make_clients(shape: Shape, count: int, rows: int) -> dict[str, ClientData]:
    """``count`` clients with ``rows`` rows to train on and to retain, and as many to forget.

    All have the same rows: were they drawn anew, the longest row, and with it the peak of a step, would grow with the
    number of clients.
    """
    train, forget = make_rows(shape, rows, "train"), make_rows(shape, rows, "forget")
    names = [f"client_{number}" for number in range(count)]
    return {n: ClientData(n, {"train": train, "retain": train, "forget": forget}) for n in names}


def make_schedule(recipe: Recipe, clients: list[str], rounds: int) -> Schedule:
    """Plain training, or NPO on every client followed by recovery: the recipe that holds most references."""
    if recipe == "finetune":
        return finetune(clients, NLL(), 1.0, rounds)
    return local_then_recover(Ingredients(clients, clients, NPO(), NLL(), 1.0, 1.0, rounds))


def federated_run(local: Local, clients: dict[str, ClientData], schedule: Schedule, directory: Path) -> RunKeeper:
    """Run the schedule from the model's present adapter, with a checkpoint after every round."""
    assert isinstance(local.model, PeftModel)
    start = snapshot(local.model)
    keeper = RunKeeper(checkpoints=Checkpoints(directory, {}))
    client = Client(local, clients, reference=start)
    rule = build_aggregator("FedAvg", {}, lora_scaling=lora_scaling(local.model))
    run_rounds(schedule, InProcess(client.fit), rule, ServerState(0, start), RoundsConfig(), keeper)
    return keeper
