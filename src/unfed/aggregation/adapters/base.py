"""What an adapter rule is: which factors train and travel in a round, and how those that come back become one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

from unfed.aggregation.adapters.ranks import truncated
from unfed.base.params import Hyperparameters
from unfed.base.types import AdapterState, Broadcast, ClientUpdate, Combined, OptState, ServerState

Scaling = Mapping[str, float] | float
"""alpha/r (or alpha/sqrt(r)) by module name, or one number for all modules."""


@dataclass(frozen=True)
class Merged:
    """The adapter that a round's updates make, its aggregation error (see
    :class:`unfed.aggregation.lora.AggregationError`), and the residual beneath it, where the rule has one."""

    adapter: AdapterState
    error: float | None = None
    error_is_estimate: bool = False
    residual: AdapterState | None = None


class Collector(Protocol):
    """Takes in a round's updates one by one."""

    def add(self, adapter: AdapterState, weight: float) -> None:
        """One client's adapter with its weight (not yet divided by the sum). ``AdapterError``: it does not fit."""
        ...

    def result(self) -> Merged:
        """What they make, once only. ``AdapterError`` when nothing was added."""
        ...


Steps = Literal["factors", "weights", "mean"]


@dataclass(frozen=True)
class Pace:
    """What a server optimizer does with the mean update of effective weights: a step of ``lr``, with ``momentum``."""

    lr: float = 1.0
    momentum: float = 0.0


@dataclass(frozen=True)
class AdapterRule(Hyperparameters):
    """A rule by name (``aggregator.adapter=``): a frozen dataclass of its hyperparameters, without state of its own.

    ``scaling``: alpha/r of each module. ``probe_seed``: of the error's estimate and of what a rule draws. ``ranks``:
    clients that train another rank than the adapter's. None of the three is the user's to set here.
    ``steps`` says what a server optimizer may do with the result: ``factors``: it moves the factors towards the merged
    ones, entry by entry; ``weights``: the rule itself takes a multiple of the mean update of the effective weights, or
    momentum on it; ``mean``: the merged adapter is taken as it is, and only plain averaging is defined.
    ``linear``: the merged tensors are the weighted means of the clients'. ``unequal_ranks``: clients may have ranks of
    their own (their updates come to the collector with zeros for what they have not); else ``equal_because`` says why.
    ``whole_at_server``: what it holds between rounds is one ordinary adapter, the one that all clients train; where it
    is not, recipes that reckon with whole adapters at the server, history and full-parameter training are refused, with
    ``why_not_whole``.
    """

    title: ClassVar[str]
    exact: ClassVar[bool] = False
    unequal_ranks: ClassVar[bool] = False
    equal_because: ClassVar[str] = "it averages the factors component by component"
    linear: ClassVar[bool] = False
    steps: ClassVar[Steps] = "factors"
    whole_at_server: ClassVar[bool] = True
    why_not_whole: ClassVar[str] = ""
    scaling: Scaling = 1.0
    probe_seed: int = 0
    ranks: Mapping[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As in ``aggregator.adapter=``."""
        return self.title

    @property
    def pruning(self) -> tuple[float, float] | None:
        """HetLoRA's gamma and lambda, with which clients give ranks up in plain training; ``None``: they do not."""
        return None

    def remembered(self, state: ServerState, answers: Sequence[ClientUpdate]) -> OptState:
        """What the rule will want to know next round, under names with a dot. ``answers``: the updates that counted,
        without their tensors."""
        del state, answers
        return {}

    def broadcast(self, state: ServerState, client_ids: Sequence[str]) -> Broadcast:
        """What the server sends in round ``state.round``: clients of a smaller rank get the first components."""
        own = {c: truncated(state.adapter, self.ranks[c]) for c in client_ids if c in self.ranks}
        return Broadcast(state.adapter, state.base_residual, own=own)

    def step(
        self, memory: OptState, state: ServerState, combined: Combined, pace: Pace
    ) -> tuple[OptState, AdapterState]:
        """Of a rule whose ``steps`` are on ``weights``: the optimizer's memory and the adapter after the round."""
        raise NotImplementedError

    def collector(self, state: ServerState, num_clients: int) -> Collector:
        """For the updates of round ``state.round``, of which at most ``num_clients`` are expected."""
        raise NotImplementedError
