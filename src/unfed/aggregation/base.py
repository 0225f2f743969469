"""What a server rule is: filters, an adapter rule and noise make one of a round's updates; an optimizer steps to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Protocol

from unfed.aggregation.adapters.base import AdapterRule, Pace
from unfed.aggregation.adapters.fedit import FedIT
from unfed.base.errors import AdapterError
from unfed.base.params import Hyperparameters, choice
from unfed.base.types import SERVER, AdapterState, Broadcast, ClientUpdate, Combined, OptState, ServerState

Weighting = Literal["examples", "uniform"]


@dataclass(frozen=True)
class Weighted:
    """An update on its way into the mean, and its weight (not yet divided by the sum of all)."""

    update: ClientUpdate
    weight: float


class Filtering(Protocol):
    """A filter at work on one round."""

    def apply(self, updates: Iterator[Weighted]) -> Iterator[Weighted]:
        """Pass updates on: rescaled, weighted anew, fewer, or one made of all. No tensor is changed in place.

        Whole adapters come in (what was held fixed is filled in) and go out. Raises ``AdapterError`` where too few
        came for the rule.
        """
        ...

    def slots(self) -> OptState:
        """After the last update: what the filter will want to know next round, under names with a dot."""
        ...

    def notes(self) -> Mapping[str, float]:
        """After the last update: what it did, by client or by quantity, for the round's record."""
        ...


class UpdateFilter(Protocol):
    """What stands between screening and the mean: a robust rule, or clipping.

    ``compares``: it judges clients by each other, and is left out of a round in which what they did is adopted as it
    is.
    """

    compares: ClassVar[bool]

    @property
    def name(self) -> str:
        """For records."""
        ...

    def init(self, adapter: AdapterState) -> OptState:
        """The memory before the first round, under names with a dot (``clip.bound``); empty for none."""
        ...

    def begin(self, state: ServerState) -> Filtering:
        """For the round that begins with ``state``."""
        ...


class Noise(Protocol):
    """What is added to the mean before the optimizer sees it."""

    def __call__(self, combined: Combined, state: ServerState, trained: frozenset[str]) -> Combined:
        """``combined`` with noise on the tensors of ``trained``; ``state``: what the round began with."""
        ...


class Aggregator(Protocol):
    """A server rule without state of its own: what it remembers goes in and comes out in ``ServerState``."""

    @property
    def name(self) -> str:
        """The rule's published name."""
        ...

    @property
    def adapters(self) -> AdapterRule:
        """How the clients' factors become one adapter."""
        ...

    @property
    def client_proximal_mu(self) -> float:
        """Strength of the proximal term that the clients add to their loss; 0 for none."""
        ...

    @property
    def mean_step(self) -> float | None:
        """The multiple of the clients' mean update that a round adds to the adapter, where it does no more than that
        in every round; ``None`` for a rule that remembers earlier rounds or scales entry by entry."""
        ...

    def weight(self, num_examples: int) -> float:
        """A client's weight in the mean, before the weights are divided by their sum."""
        ...

    def init(self, adapter: AdapterState) -> OptState:
        """The optimizer state before the first round."""
        ...

    def broadcast(self, state: ServerState, client_ids: Sequence[str]) -> Broadcast:
        """What the clients get in round ``state.round``."""
        ...

    def combine(self, updates: Iterable[ClientUpdate], num_clients: int, state: ServerState | None = None) -> Combined:
        """Make one of the updates, in the order in which they come; at most ``num_clients`` are expected.

        ``state``: what the round began with. Filters, noise and most adapter rules need it; the plain mean does not.
        Raises ``AdapterError`` for an update that does not fit, and when there is none.
        """
        ...

    def step(self, state: OptState, adapter: AdapterState, combined: Combined) -> tuple[OptState, AdapterState]:
        """The next optimizer state and global adapter, from the present ones and the round's average."""
        ...

    def adopting(self) -> Aggregator:
        """The rule for a round in which what clients did is adopted: nothing compares them with each other."""
        ...

    def advance(self, state: ServerState, combined: Combined, *, adopt: bool = False) -> ServerState:
        """The state after the round; ``adopt``: what was combined is taken as it is, past the optimizer."""
        ...


@dataclass(frozen=True)
class WeightedMean(Hyperparameters):
    """What every rule here begins with: filters, a mean weighted by ``num_examples`` (or ``uniform``), noise.

    ``adapters``, ``filters`` and ``noise`` are built apart (:func:`unfed.aggregation.registry.build_aggregator`).
    """

    weighting: Weighting = choice("examples", ("examples", "uniform"))
    adapters: AdapterRule = field(default_factory=FedIT)
    filters: tuple[UpdateFilter, ...] = ()
    noise: Noise | None = None

    @property
    def client_proximal_mu(self) -> float:
        """No proximal term."""
        return 0.0

    @property
    def mean_step(self) -> float | None:
        """Not linear, unless a rule says otherwise."""
        return None

    @property
    def pace(self) -> Pace | None:
        """Its step on effective weights, for adapter rules that take one; ``None``: it is not defined on them."""
        return None

    def weight(self, num_examples: int) -> float:
        """See :meth:`Aggregator.weight`."""
        return float(num_examples) if self.weighting == "examples" else 1.0

    def weight_of(self, update: ClientUpdate) -> float:
        """An update's weight, where more than its examples decides."""
        return self.weight(update.num_examples)

    def init(self, adapter: AdapterState) -> OptState:
        """See :meth:`Aggregator.init`."""
        raise NotImplementedError

    def step(self, state: OptState, adapter: AdapterState, combined: Combined) -> tuple[OptState, AdapterState]:
        """See :meth:`Aggregator.step`."""
        raise NotImplementedError

    def broadcast(self, state: ServerState, client_ids: Sequence[str]) -> Broadcast:
        """See :meth:`Aggregator.broadcast`."""
        return self.adapters.broadcast(state, client_ids)

    def combine(self, updates: Iterable[ClientUpdate], num_clients: int, state: ServerState | None = None) -> Combined:
        """See :meth:`Aggregator.combine`. Memory: what filters and the adapter rule's collector hold."""
        counted: list[ClientUpdate] = []
        stream = self._weighted(updates, counted)
        start = state or ServerState(0, AdapterState({}))
        filterings = [f.begin(start) for f in self.filters]
        for filtering in filterings:
            stream = filtering.apply(stream)
        collector = self.adapters.collector(start, num_clients)
        for item in stream:
            try:
                collector.add(item.update.adapter, item.weight)
            except AdapterError as e:
                raise AdapterError(f"{item.update.client_id}: {e}") from e
            del item  # an update is gone before the next one is asked for
        merged = collector.result()
        combined = Combined(
            merged.adapter,
            sum(u.num_examples for u in counted),
            tuple(u.client_id for u in counted),
            merged.error,
            merged.error_is_estimate,
            merged.residual,
            {n: slot for filtering in filterings for n, slot in filtering.slots().items()}
            | dict(self.adapters.remembered(start, counted)),
            {f.name: dict(x.notes()) for f, x in zip(self.filters, filterings, strict=True)},
        )
        if self.noise is None:
            return combined
        stay = self.broadcast(start, combined.client_ids).stay
        return self.noise(combined, start, frozenset(merged.adapter) - stay)

    def _weighted(self, updates: Iterable[ClientUpdate], counted: list[ClientUpdate]) -> Iterator[Weighted]:
        for update in updates:
            if update.num_examples <= 0:
                raise AdapterError(f"{update.client_id}: an update over {update.num_examples} examples has no weight")
            if update.client_id != SERVER:
                counted.append(replace(update, adapter=AdapterState({})))  # who and how many: not the tensors
            item = Weighted(update, self.weight_of(update))
            del update
            yield item
            del item

    def adopting(self) -> WeightedMean:
        """See :meth:`Aggregator.adopting`."""
        return replace(self, filters=tuple(f for f in self.filters if not f.compares))

    def advance(self, state: ServerState, combined: Combined, *, adopt: bool = False) -> ServerState:
        """See :meth:`Aggregator.advance`. Tensors that do not come back this round keep their optimizer slots, too."""
        memory = {name: slot for f in self.filters for name, slot in f.init(state.adapter).items()}
        memory |= {n: s for n, s in state.opt_state.items() if "." in n} | dict(combined.slots)
        own = {n: s for n, s in state.opt_state.items() if "." not in n}
        residual = combined.base_residual if combined.base_residual is not None else state.base_residual
        adapter = combined.adapter
        if not adopt:
            own, adapter = self._stepped(own, state, combined)
        return ServerState(state.round + 1, adapter, {**own, **memory}, residual)

    def _stepped(self, own: OptState, state: ServerState, combined: Combined) -> tuple[OptState, AdapterState]:
        own = own or self.init(state.adapter)
        if self.adapters.steps == "weights" and (pace := self.pace) is not None:
            return self.adapters.step(own, state, combined, pace)
        stay = self.broadcast(state, combined.client_ids).stay
        if not stay:
            return self.step(own, state.adapter, combined)
        part = replace(combined, adapter=combined.adapter.without(stay))
        slots, adapter = self.step({n: s.without(stay) for n, s in own.items()}, state.adapter.without(stay), part)
        return {n: s.filled(own[n]) for n, s in slots.items()}, adapter.filled(state.adapter)
