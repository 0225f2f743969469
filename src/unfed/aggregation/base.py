"""What a server rule is, and the streaming weighted mean that all of them begin with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from unfed.aggregation.lora import AggregationError
from unfed.aggregation.tree import RunningMean
from unfed.base.errors import AdapterError
from unfed.base.params import Hyperparameters, choice
from unfed.base.types import AdapterState, ClientUpdate, Combined, OptState

Weighting = Literal["examples", "uniform"]


class Aggregator(Protocol):
    """A server rule without state of its own: what it remembers goes in and comes out as ``OptState``."""

    @property
    def name(self) -> str:
        """The rule's published name."""
        ...

    @property
    def client_proximal_mu(self) -> float:
        """Strength of the proximal term that the clients add to their loss; 0 for none."""
        ...

    @property
    def mean_step(self) -> float | None:
        """The multiple of the clients' mean update that ``step`` adds to the adapter, where it does no more than that
        in every round; ``None`` for a rule that remembers earlier rounds or scales entry by entry."""
        ...

    def weight(self, num_examples: int) -> float:
        """A client's weight in the mean, before the weights are divided by their sum."""
        ...

    def init(self, adapter: AdapterState) -> OptState:
        """The optimizer state before the first round."""
        ...

    def combine(self, updates: Iterable[ClientUpdate], num_clients: int) -> Combined:
        """Average the updates in the order in which they come; at most ``num_clients`` are expected.

        Raises ``AdapterError`` for an update that does not fit, and when there is none.
        """
        ...

    def step(self, state: OptState, adapter: AdapterState, combined: Combined) -> tuple[OptState, AdapterState]:
        """The next optimizer state and global adapter, from the present ones and the round's average."""
        ...


@dataclass(frozen=True)
class WeightedMean(Hyperparameters):
    """The first half of every rule here: a mean weighted by ``num_examples`` (or ``uniform``).

    ``lora_scaling`` is alpha/r (or alpha/sqrt(r)) by module, or one number for all; it and ``probe_seed``
    matter to the aggregation error alone and are not the user's to set.
    """

    weighting: Weighting = choice("examples", ("examples", "uniform"))
    lora_scaling: Mapping[str, float] | float = 1.0
    probe_seed: int = 0

    @property
    def client_proximal_mu(self) -> float:
        """No proximal term."""
        return 0.0

    @property
    def mean_step(self) -> float | None:
        """Not linear, unless a rule says otherwise."""
        return None

    def weight(self, num_examples: int) -> float:
        """See :meth:`Aggregator.weight`."""
        return float(num_examples) if self.weighting == "examples" else 1.0

    def combine(self, updates: Iterable[ClientUpdate], num_clients: int) -> Combined:
        """See :meth:`Aggregator.combine`. Memory: one adapter in float32, and what the error meter holds."""
        mean = RunningMean()
        error = AggregationError(self.lora_scaling, num_clients, seed=self.probe_seed)
        client_ids: list[str] = []
        num_examples = 0
        for update in updates:
            if update.num_examples <= 0:
                raise AdapterError(f"{update.client_id}: an update over {update.num_examples} examples has no weight")
            weight = self.weight(update.num_examples)
            try:
                mean.add(update.adapter, weight)
            except AdapterError as e:
                raise AdapterError(f"{update.client_id}: {e}") from e
            error.add(update.adapter, weight)
            client_ids.append(update.client_id)
            num_examples += update.num_examples
        adapter = mean.result()
        return Combined(adapter, num_examples, tuple(client_ids), error.result(adapter), error.is_estimate)
