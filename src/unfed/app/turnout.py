"""``clients.*`` in a run: who takes part, for how many steps, and what the mean of a round is then a mean of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unfed.aggregation.base import Aggregator, WeightedMean
from unfed.app.build import is_federated
from unfed.app.progress import say
from unfed.base.artifacts import digest_json
from unfed.base.errors import ConfigError, nearest
from unfed.config.schema import RunConfig
from unfed.federated.client import ClientData
from unfed.federated.sampling import Sampling, Trace, inclusion, read_trace
from unfed.federated.schedule import FitTask, Participation, Phase, Schedule
from unfed.federated.turnout import Conditions
from unfed.training.args import LoopArgs
from unfed.unlearning.cost import steps_of


def trace_of(config: RunConfig, clients: Sequence[str]) -> Trace:
    """Who is there in which round, where a file says so. ``UnfedError``: a file or a client's name does not serve."""
    given = config.clients
    if isinstance(given.speed, Mapping) and (unknown := [c for c in given.speed if c not in clients]):
        raise ConfigError([f"clients.speed.{unknown[0]}: no such client{nearest(unknown[0], clients)}"])
    return read_trace(Path(given.availability), clients) if given.availability is not None else {}


def inputs(config: RunConfig, clients: Sequence[str]) -> dict[str, str]:
    """What a resumed run must find as it was: the trace."""
    trace = trace_of(config, clients)
    return {"availability": digest_json(trace)} if trace else {}


def participation(config: RunConfig, clients: Mapping[str, ClientData], args: LoopArgs) -> Participation:
    """Who takes part in each round; everyone where there is one client."""
    assert config.trainer is not None
    if not is_federated(config):
        return Participation()
    shape, given = config.trainer.method_args, config.clients

    def steps(task: FitTask, client: str) -> float:
        work = task.phase.work[client]
        own = replace(args, **work.args) if work.args else args
        rows = len(clients[client].splits.get(work.rows, ()))
        count = steps_of(work, rows, own.step_size(), spread=task.phase.rounds)
        return min(count, own.max_steps) if own.max_steps > 0 else count

    return Participation(
        shape.fraction_fit,
        shape.min_clients,
        given.number,
        given.oversample,
        Sampling(given.sampling, sizes(clients), trace_of(config, list(clients))),
        Conditions(given.speed, given.speed_spread, given.speed_jitter, given.dropout, given.deadline),
        steps,
    )


def sizes(clients: Mapping[str, ClientData]) -> dict[str, int]:
    """Rows of plain training by client; of one that has none, those that it forgets."""
    return {c: max(1, len(d.splits.get("train", ())) or len(d.splits.get("forget", ()))) for c, d in clients.items()}


def with_local_steps(schedule: Schedule, steps: int | None) -> Schedule:
    """The schedule with ``steps`` optimizer steps in every round of plain training that the server's rule averages.

    Unlearning keeps its epochs, and so does work that a recipe counts in its own way.
    """
    if steps is None:
        return schedule
    return Schedule(tuple(_with_steps(phase, steps) for phase in schedule.phases))


def _with_steps(phase: Phase, steps: int) -> Phase:
    if phase.rule != "aggregate":
        return phase
    work = {c: replace(w, steps=steps) if w.rows == "train" and not w.spread else w for c, w in phase.work.items()}
    return replace(phase, work=work)


@dataclass(frozen=True)
class Estimate:
    """What the mean of a round estimates of the mean over all clients; ``leans``: with a bias worth a warning."""

    sentence: str
    leans: bool = False


def announce(config: RunConfig, rule: Aggregator, clients: Mapping[str, ClientData]) -> dict[str, Any]:
    """What a round's mean estimates, for ``run.json``; said where it leans to one side, or the sampling is set."""
    if not is_federated(config) or len(clients) < 2:
        return {}
    assert config.trainer is not None
    wanted = participation(config, clients, LoopArgs()).wanted(len(clients))
    weighting = rule.weighting if isinstance(rule, WeightedMean) else "examples"
    found = estimate(config, weighting, list(sizes(clients).values()), wanted)
    if found is None:
        return {}
    if found.leans or config.clients.sampling != "uniform":
        say(("WARNING: " if found.leans else "") + found.sentence)
    return {"round_mean": found}


def estimate(config: RunConfig, weighting: str, rows: Sequence[int], wanted: int) -> Estimate | None:
    """See :class:`Estimate`. ``rows``: of each client; ``wanted``: updates a round; ``None`` where all take part."""
    given = config.clients
    if given.oversample > 1 or given.deadline is not None:
        who = "clients.oversample" if given.oversample > 1 else "clients.deadline"
        small = "" if given.local_steps is not None else " and to those with few rows (not with clients.local_steps)"
        return Estimate(f"{who}: a round's mean leans to fast clients{small}; no weights make up for that", True)
    if given.sampling == "trace":
        return Estimate("clients.sampling=trace: a round's mean leans to clients that are there more often", True)
    if wanted >= len(rows):
        return None
    return _by_size(weighting, rows, wanted) if given.sampling == "by_size" else _evenly(weighting, rows)


def _by_size(weighting: str, rows: Sequence[int], wanted: int) -> Estimate:
    key = "clients.sampling=by_size"
    if weighting == "examples":
        what = "large clients are drawn more often and weighted more, so that their size counts twice"
        return Estimate(f"{key}: {what}; set aggregator.weighting=uniform, which is unbiased", True)
    if max(wanted * n for n in rows) > sum(rows):
        sure = sum(p == 1.0 for p in inclusion(rows, wanted))
        what = f"{sure} of {len(rows)} clients own more than one {wanted}th of what there is to draw from"
        return Estimate(f"{key}: {what}: they count for less than they own; ask fewer clients", True)
    return Estimate(f"{key}, weighted equally: an unbiased estimate of the mean over all examples")


def _evenly(weighting: str, rows: Sequence[int]) -> Estimate:
    key = "clients drawn evenly"
    if weighting == "uniform" or len(set(rows)) == 1:
        over = "clients, not over examples" if len(set(rows)) > 1 else "all examples"
        return Estimate(f"{key}, weighted equally: an unbiased estimate of the mean over {over}")
    what = "a ratio estimate of the mean over all examples, with a bias that falls with the clients of a round"
    return Estimate(f"{key}, weighted by examples: {what} (clients.sampling=by_size has none)")
