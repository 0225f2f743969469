"""How well clients do on their own rows: the mean probability of the answers that they train on and are to keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from unfed.config.schema import RunConfig
from unfed.data.chat import EncodedExample
from unfed.evaluation.scoring import Pass, score
from unfed.federated.client import ClientData
from unfed.metrics.probability import avg_loss, prob
from unfed.models.generate import Budget, inference
from unfed.models.load import LoadedModel

OwnRows = Mapping[str, Sequence[EncodedExample]]


def own_rows(clients: Mapping[str, ClientData], limit: int | None) -> dict[str, list[EncodedExample]]:
    """The first ``limit`` rows of split ``train`` in the order of their ids, of each client that has some."""
    trained = {c: sorted(d.splits.get("train", ()), key=lambda e: e.example_id) for c, d in clients.items()}
    return {c: rows[:limit] for c, rows in trained.items() if rows}


def own_probabilities(config: RunConfig, loaded: LoadedModel, budget: Budget, rows: OwnRows) -> dict[str, float]:
    """By client the mean probability of its answers (each the geometric mean of its tokens'), of the model as it is."""
    given = Pass(loaded.model, loaded.tokenizer, config.model.template_args, budget)
    flat = [e for own in rows.values() for e in own]
    if not flat:
        return {}
    with inference(loaded.model):
        values = prob(avg_loss(score(given, flat, [False] * len(flat))))
    found, start = {}, 0
    for client, own in rows.items():
        found[client] = float(values[start : start + len(own)].mean())
        start += len(own)
    return found
