"""Progress: what a line of a round says."""

import pytest

from unfed.app import progress
from unfed.base.types import AdapterState, ServerState
from unfed.federated.checkpoint import RoundRecord
from unfed.federated.schedule import Phase, Schedule, Work
from unfed.objectives.nll import NLL
from unfed.objectives.npo import NPO


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(progress, "say", lines.append)
    return lines


def round_of(losses: dict[str, float]) -> RoundRecord:
    metrics = {client: {"loss": loss} for client, loss in losses.items()}
    return RoundRecord(0, "mixed", tuple(losses), {}, 3, "a", "b", 10, 20, 0.5, None, False, metrics)


def reporter() -> progress.Reporter:
    work = {"a": Work("forget", NPO(), 1), "b": Work("train", NLL(), 1, shown="retain")}
    return progress.Reporter(Schedule((Phase("mixed", 1, work | {"c": work["b"]}),)), 0)


def test_a_round_of_several_kinds_of_work_tells_their_losses_apart(said):
    reporter().round_ended(round_of({"a": 6.0, "b": 1.0, "c": 2.0}), ServerState(1, AdapterState({})))
    assert "3 clients, loss 3.0000 (NPO on forget 6.0000, NLL on retain 1.5000), 0.00 MB up" in said[0]


def test_one_kind_of_work_has_one_loss(said):
    reporter().round_ended(round_of({"b": 1.0}), ServerState(1, AdapterState({})))
    assert "1 client, loss 1.0000, 0.00 MB up" in said[0]
