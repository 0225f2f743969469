"""Schedules of the built-in recipes. One function a recipe; what differs between them is the order of work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from unfed.federated.schedule import Phase, Schedule, Work
from unfed.objectives.base import Objective


@dataclass(frozen=True)
class Ingredients:
    """What a recipe works with.

    ``targets``: clients that own forget rows; ``retainers``: clients that own retain rows (targets too, where they
    do). ``forget`` and ``retain`` are the objectives of unlearning and of plain training.
    """

    targets: Sequence[str]
    retainers: Sequence[str]
    forget: Objective
    retain: Objective
    unlearn_epochs: float
    local_epochs: float
    global_rounds: int


def finetune(clients: Sequence[str], objective: Objective, epochs: float, rounds: int) -> Schedule:
    """Federated training: every client trains on its own rows in every round."""
    return Schedule((Phase("finetune", rounds, {c: Work("train", objective, epochs) for c in clients}),))


def local_then_recover(given: Ingredients) -> Schedule:
    """The targets unlearn locally from the global adapter; then all clients recover on their retain rows.

    The order of Oblivionis (arXiv 2508.08875). Departures: the result of local unlearning is adopted as it is
    (several targets: their mean) instead of passing through the server's optimizer, so that an adaptive rule
    cannot damp it; and with ``global_rounds=0`` the recovery is left out.
    """
    work = {c: Work("forget", given.forget, given.unlearn_epochs) for c in given.targets}
    unlearn = Phase("unlearn", 1, work, rule="adopt", always=tuple(given.targets))
    if given.global_rounds == 0 or not given.retainers:
        return Schedule((unlearn,))
    recover = Phase("recover", given.global_rounds, _retain_work(given, given.retainers))
    return Schedule((unlearn, recover))


def interleaved(given: Ingredients) -> Schedule:
    """In every round the targets unlearn beside the others' retain training, and the server averages both.

    ``unlearn_epochs`` are spread over the rounds: the steps that they would take in one piece are dealt out in order,
    so no forget row comes again before all came once.
    """
    rounds = max(1, given.global_rounds)
    work: dict[str, Work] = {
        c: Work("forget", given.forget, given.unlearn_epochs / rounds, spread=True) for c in given.targets
    }
    others = [c for c in given.retainers if c not in work]
    merged: Mapping[str, Work] = {**work, **_retain_work(given, others)}
    ordered = {c: merged[c] for c in sorted(merged, key=lambda c: (len(c), c))}
    return Schedule((Phase("interleaved", rounds, ordered, always=tuple(given.targets)),))


def _retain_work(given: Ingredients, clients: Sequence[str]) -> dict[str, Work]:
    return {c: Work("train", given.retain, given.local_epochs, shown="retain") for c in clients}


RECIPES = {"local_then_recover": local_then_recover, "interleaved": interleaved}
