"""What a recipe of federated unlearning is: what it asks for, what it promises, and the order of work that it gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from unfed.base.params import Hyperparameters
from unfed.base.types import AdapterState, ServerState
from unfed.federated.history import History, HistoryKind, HistorySettings
from unfed.federated.schedule import Schedule, Work
from unfed.objectives.base import Objective


@dataclass(frozen=True)
class Source:
    """The fine-tuning whose result is to forget, as its ``run.json`` tells it.

    ``participants`` are the clients of each round whose updates counted; ``client_steps`` and ``nbytes`` are what it
    cost (optimizer steps over all clients; bytes sent both ways). ``mean_step``: see
    :attr:`unfed.aggregation.base.Aggregator.mean_step`.
    """

    directory: Path
    participants: tuple[tuple[str, ...], ...]
    client_steps: int
    nbytes: int
    aggregator: str
    mean_step: float | None
    kept: HistorySettings

    @property
    def history(self) -> History:
        """What it kept."""
        return History(self.directory)

    def first_round(self, clients: Sequence[str]) -> int | None:
        """The first round (from 0) in which one of ``clients`` took part; ``None`` when none ever did."""
        chosen = set(clients)
        return next((n for n, there in enumerate(self.participants) if chosen & set(there)), None)


@dataclass(frozen=True)
class Situation:
    """What is known before a model is opened. ``targets`` own what is to be forgotten, ``retainers`` own rows that are
    to be kept (targets too, where they do). ``before`` own what earlier requests on this model have forgotten; for a
    recipe that trains again (``Demands.replay``) they are among the targets."""

    targets: tuple[str, ...]
    retainers: tuple[str, ...]
    source: Source | None = None
    before: tuple[str, ...] = ()

    @property
    def keeping(self) -> tuple[str, ...]:
        """Targets that go on owning some rows: they are asked to forget rows, not to leave."""
        return tuple(c for c in self.targets if c in self.retainers)


@dataclass(frozen=True)
class Ingredients:
    """What a recipe works with: the situation, and what the opened model and the settings add to it.

    ``forget`` and ``retain`` are the objectives of unlearning and of plain training. ``start`` is the adapter that the
    run opened, ``scaling`` alpha/r (or alpha/sqrt r) of each LoRA module.
    """

    situation: Situation
    forget: Objective
    retain: Objective
    unlearn_epochs: float
    local_epochs: float
    global_rounds: int
    start: AdapterState = field(default_factory=lambda: AdapterState({}))
    scaling: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0

    @property
    def targets(self) -> tuple[str, ...]:
        """See :class:`Situation`."""
        return self.situation.targets

    @property
    def retainers(self) -> tuple[str, ...]:
        """See :class:`Situation`."""
        return self.situation.retainers

    @property
    def history(self) -> History:
        """What the fine-tuning kept; a recipe that uses it names it in its :class:`Demands`."""
        assert self.situation.source is not None
        return self.situation.source.history

    def retain_work(self, clients: Sequence[str] | None = None) -> dict[str, Work]:
        """Plain training of ``clients`` (of all retainers) on their retain rows."""
        chosen = self.retainers if clients is None else clients
        return {c: Work("train", self.retain, self.local_epochs, shown="retain") for c in chosen}


@dataclass(frozen=True)
class Plan:
    """The order of work, and the server's state that it starts from (``None``: the adapter that the run opened, before
    the first round)."""

    schedule: Schedule
    start: ServerState | None = None


@dataclass(frozen=True)
class Demands:
    """What a recipe cannot do without.

    ``history``: what the fine-tuning must have kept. ``source``: the fine-tuning's run directory. ``whole_clients``:
    it removes clients, not single rows. ``method``: it trains with ``method=``. ``replay``: it trains as the
    fine-tuning did, with that run's settings, from its base model. ``linear``: the fine-tuning's server must have added
    up mean updates (FedAvg, FedProx). ``chained``: though it uses the history, it starts from the adapter that it is
    given, so that what earlier requests have forgotten stays so.
    """

    history: frozenset[HistoryKind] = frozenset()
    source: bool = False
    whole_clients: bool = False
    method: bool = False
    replay: bool = False
    linear: bool = False
    chained: bool = False


@dataclass(frozen=True)
class Promise:
    """What may be said of the result, in one sentence. ``exact``: the model is one that training without the target
    gives, or could have given, and nothing in it was computed from the target's rows."""

    kind: Literal["exact", "approximate"]
    text: str


@dataclass(frozen=True)
class Recipe(Hyperparameters):
    """A way of forgetting across clients: a frozen dataclass of its hyperparameters."""

    title: ClassVar[str]
    demands: ClassVar[Demands] = Demands()
    promise: ClassVar[Promise]

    @property
    def name(self) -> str:
        """As in ``recipe=``."""
        return self.title

    def problems(self, situation: Situation) -> list[str]:
        """What keeps this recipe from working here, beside its demands; each with the way out."""
        del situation
        return []

    def plan(self, given: Ingredients) -> Plan:
        """The order of work. Pure: the same ingredients give the same plan, so a resumed run may ask again."""
        raise NotImplementedError


def unmet(recipe: Recipe, situation: Situation) -> list[str]:
    """Every reason why ``recipe`` cannot be followed, in words that name the key and the way out."""
    wants, source, key = recipe.demands, situation.source, f"recipe={recipe.name}"
    needs_source = wants.source or wants.replay or wants.linear or bool(wants.history)
    if needs_source and source is None:
        what = "needs the run directory of the fine-tuning (its run.json and what it kept)"
        way = "name a directory that unfed train made, or use recipe=local_then_recover"
        return [f"{key}: {what}, and the adapter that is to forget comes without one; {way}"]
    found = []
    if source is not None and (missing := sorted(wants.history - set(source.kept.keep))):
        kept = ", ".join(source.kept.keep) or "nothing"
        found.append(
            f"{key}: needs history={'+'.join(missing)} of the fine-tuning, and {source.directory} kept {kept}; "
            f"fine-tune with history={missing[0] if len(missing) == 1 else 'all'}, or use recipe=retrain (exact, needs "
            "no history) or recipe=local_then_recover"
        )
    if source is not None and wants.linear and source.mean_step is None:
        found.append(
            f"{key}: the fine-tuning's aggregator={source.aggregator} does not add up the clients' mean updates, so "
            "there is no share of a client to take out; use recipe=retrain or recipe=local_then_recover"
        )
    if situation.before and wants.history and not wants.replay and not wants.chained:
        found.append(
            f"{key}: goes back to what the fine-tuning kept, which still has what was forgotten since (rows of "
            f"{', '.join(situation.before)}); use recipe=retrain, or recipe=local_then_recover"
        )
    if wants.whole_clients and situation.keeping:
        found.append(
            f"{key}: removes whole clients, and {', '.join(situation.keeping)} would keep other rows; forget all of "
            "that client's rows, or use recipe=retrain or recipe=local_then_recover, which forget single rows"
        )
    if wants.whole_clients and not situation.retainers:
        found.append(f"{key}: no client is left to train without {', '.join(situation.targets)}")
    return found + recipe.problems(situation)
