"""What a page on several runs is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unfed.data.ownership import Ownership

KNOWN = ("base", "finetuned", "oracle")
"""Roles that a page compares with; there is one model of each at most."""


@dataclass(frozen=True)
class Answer:
    """What each model says to one question."""

    split: str
    question: str
    truth: str
    said: Mapping[str, str]


@dataclass(frozen=True)
class Cost:
    """What the rounds of a run took. ``aggregation_error``: the largest of them, relative; ``None``: not measured."""

    seconds: float
    rounds: int
    bytes_up: int
    bytes_down: int
    aggregation_error: float | None

    @property
    def megabytes(self) -> float:
        """Sent between clients and server, both ways, in 10^6 bytes."""
        return (self.bytes_up + self.bytes_down) / 1e6


@dataclass(frozen=True)
class Point:
    """Scores of the global adapter after a round; ``clients``: mean, worst and gap of the clients' probabilities."""

    round: int
    phase: str
    scores: Mapping[str, float]
    clients: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """One model on the page. ``role``: base, finetuned, oracle, unlearned or other.

    ``summary``: metric -> number; ``entries``: the evaluation file's metric -> entry (empty without one);
    ``losses``: (phase, mean training loss) of each round; ``facts``: method, aggregator, seed and the like;
    ``privacy``: what run.json says of it (empty: nothing). ``suite``: of the evaluation. ``ownership``: whose rows it
    was trained on, where clients trained it.
    """

    name: str
    role: str
    place: Path
    summary: Mapping[str, float]
    entries: Mapping[str, Any] = field(default_factory=dict)
    cost: Cost | None = None
    losses: Sequence[tuple[str, float]] = ()
    points: Sequence[Point] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    privacy: Mapping[str, Any] = field(default_factory=dict)
    suite: str | None = None
    ownership: Ownership | None = None


@dataclass(frozen=True)
class Report:
    """All that the page shows, in the order of the models: base, finetuned, oracle, then the others."""

    title: str
    command: str
    models: Sequence[Model]
    answers: Sequence[Answer] = ()
    notes: Sequence[str] = ()
    machine: str = ""

    def of_role(self, role: str) -> Model | None:
        """The model of a role that there is one of."""
        return next((m for m in self.models if m.role == role), None)

    @property
    def unlearned(self) -> list[Model]:
        """The models that were to forget."""
        return [m for m in self.models if m.role == "unlearned"]

    @property
    def metrics(self) -> set[str]:
        """Every metric that some model has a value of."""
        return {metric for m in self.models for metric in m.summary}
