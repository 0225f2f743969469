"""What a recipe of federated unlearning is: what it asks for, what it promises, and the order of work that it gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

from unfed.aggregation.base import Weighting
from unfed.base.params import Hyperparameters
from unfed.base.types import AdapterState, Example, ServerState
from unfed.federated.history import History, HistoryKind, HistorySettings
from unfed.federated.schedule import Schedule, Work
from unfed.federated.shards import Shard
from unfed.models.second import SecondAdapter
from unfed.objectives.base import Objective
from unfed.objectives.proximal import Proximal


@dataclass(frozen=True)
class Source:
    """The fine-tuning whose result is to forget, as its ``run.json`` tells it.

    ``participants`` are the clients of each round whose updates counted; ``client_steps`` and ``nbytes`` are what it
    cost (optimizer steps over all clients; bytes sent both ways). ``mean_step``: see
    :attr:`unfed.aggregation.base.Aggregator.mean_step`. ``weighting``: of the clients in the server's mean. ``opened``
    is the directory of the adapter that is to forget, where an unlearning lies between that and the fine-tuning.
    ``result`` is the digest of the adapter that it gave. ``start_saw`` are the ids of the rows that the model which it
    began with had been trained on.
    """

    directory: Path
    participants: tuple[tuple[str, ...], ...]
    client_steps: int
    nbytes: int
    aggregator: str
    mean_step: float | None
    kept: HistorySettings
    weighting: Weighting = "examples"
    opened: Path | None = None
    result: str | None = None
    start_saw: frozenset[str] = frozenset()

    def weight(self, num_examples: int) -> float:
        """A client's weight in the server's mean, before the weights are divided by their sum."""
        return float(num_examples) if self.weighting == "examples" else 1.0

    @property
    def direct(self) -> bool:
        """Whether the adapter that is to forget is the fine-tuning's result."""
        return self.opened is None

    @property
    def adapter(self) -> Path:
        """The directory of the adapter that is to forget."""
        return self.opened or self.directory

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
    recipe that trains again (``Demands.replay``) they are among the targets. ``no_lora``: why the run does not start
    from a learned, plain LoRA adapter and what to do about it (``None``: it does). ``known_at_start``: how many of the
    rows to be forgotten, now or before, the model that the fine-tuning began with had been trained on. ``since``:
    recipes of the earlier requests, the first one first."""

    targets: tuple[str, ...]
    retainers: tuple[str, ...]
    source: Source | None = None
    before: tuple[str, ...] = ()
    no_lora: str | None = None
    known_at_start: int = 0
    since: tuple[str, ...] = ()

    @property
    def keeping(self) -> tuple[str, ...]:
        """Targets that go on owning some rows: they are asked to forget rows, not to leave."""
        return tuple(c for c in self.targets if c in self.retainers)


@dataclass(frozen=True)
class Ingredients:
    """What a recipe works with: the situation, and what the opened model and the settings add to it.

    ``forget`` and ``retain`` are the objectives of unlearning and of plain training. ``start`` is the adapter that the
    run opened, ``scaling`` alpha/r (or alpha/sqrt r) of each LoRA module. ``proxied`` own rows of split ``proxy``.
    ``rows``: the ids of every client's rows that are to be trained on.
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
    proxied: tuple[str, ...] = ()
    rows: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

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

    def as_retain(self, objective: Objective) -> Objective:
        """``objective`` with what the server's rule adds to every client's loss (FedProx)."""
        return replace(self.retain, inner=objective) if isinstance(self.retain, Proximal) else objective

    def retain_work(self, clients: Sequence[str] | None = None) -> dict[str, Work]:
        """Plain training of ``clients`` (of all retainers) on their retain rows."""
        chosen = self.retainers if clients is None else clients
        return {c: Work("train", self.retain, self.local_epochs, shown="retain") for c in chosen}


@dataclass(frozen=True)
class Isolation:
    """Shards to be served together: those to be trained, one a phase of the schedule, and those that are kept."""

    again: tuple[Shard, ...]
    kept: tuple[Shard, ...]


@dataclass(frozen=True)
class Plan:
    """The order of work, and the server's state that it starts from (``None``: the adapter that the run opened, before
    the first round). With ``isolation`` every phase starts from it anew."""

    schedule: Schedule
    start: ServerState | None = None
    isolation: Isolation | None = None


@dataclass(frozen=True)
class Demands:
    """What a recipe cannot do without.

    ``history``: what the fine-tuning must have kept. ``source``: the fine-tuning's run directory. ``whole_clients``:
    it removes clients, not single rows. ``method``: it trains with ``method=``. ``replay``: it trains as the
    fine-tuning did, with that run's settings, from its base model. ``linear``: the fine-tuning's server must have added
    up mean updates (FedAvg, FedProx). ``chained``: though it uses the history, it starts from the adapter that it is
    given, so that what earlier requests have forgotten stays so. ``lora``: it works on the factors of a learned, plain
    LoRA adapter. ``second_adapter``: that adapter stays frozen and a second one on top of it trains
    (:meth:`Recipe.second_adapter`); what is saved is their stack (:mod:`unfed.models.second`). ``factors``: it works on
    factors that are averaged apart (``aggregator.adapter=fedit``), all of which train and travel in every round.
    """

    history: frozenset[HistoryKind] = frozenset()
    source: bool = False
    whole_clients: bool = False
    method: bool = False
    replay: bool = False
    linear: bool = False
    chained: bool = False
    lora: bool = False
    second_adapter: bool = False
    factors: bool = False


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

    @property
    def rounds_before(self) -> int:
        """Rounds before the ``global_rounds``, for those who ask before there is a plan."""
        return 0

    def problems(self, situation: Situation) -> list[str]:
        """What keeps this recipe from working here, beside its demands; each with the way out."""
        del situation
        return []

    def proxy_rows(self, forget: Sequence[Example], retain: Sequence[Example]) -> frozenset[str] | None:
        """Ids of the retain rows that make up split ``proxy``; ``None`` where the recipe has no use for one."""
        del forget, retain
        return None

    def promise_for(self, situation: Situation) -> Promise:
        """What may be said of the result here; ``promise`` is what may be said anywhere."""
        del situation
        return self.promise

    def second_adapter(self, learned: AdapterState, scaling: Mapping[str, float]) -> SecondAdapter:
        """The shape of the adapter that trains on top of the ``learned`` one, for a recipe that demands one;
        ``scaling``: alpha/r of each module of the learned one. Raises ``AdapterError`` for modules that it lacks."""
        raise NotImplementedError

    def plan(self, given: Ingredients) -> Plan:
        """The order of work. Pure: the same ingredients give the same plan, so a resumed run may ask again."""
        raise NotImplementedError


def unmet(recipe: Recipe, situation: Situation) -> list[str]:
    """Every reason why ``recipe`` cannot be followed, in words that name the key and the way out."""
    wants, source, key = recipe.demands, situation.source, f"recipe={recipe.name}"
    if (wants.lora or wants.second_adapter) and situation.no_lora is not None:
        return [f"{key}: {situation.no_lora}"]
    needs_source = wants.source or wants.replay or wants.linear or bool(wants.history)
    if needs_source and source is None:
        what = "needs the run directory of the fine-tuning (its run.json and what it kept)"
        way = "name a directory that unfed train made, or use recipe=local_then_recover"
        return [f"{key}: {what}, and the adapter that is to forget comes without one; {way}"]
    found = []
    if source is not None and wants.replay and situation.known_at_start:
        found.append(
            f"{key}: {source.directory} went on from a model that had been trained on {situation.known_at_start} of "
            "the rows to be forgotten, so training it again would not be without them; have that model forget them "
            "and fine-tune again from there, or use recipe=local_then_recover"
        )
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
            "that client's rows (fine-tuned with partition.target_shares=false it has no others), or use "
            "recipe=retrain or recipe=local_then_recover, which forget single rows"
        )
    if wants.whole_clients and not situation.retainers:
        found.append(f"{key}: no client is left to train without {', '.join(situation.targets)}")
    return found + recipe.problems(situation)
