"""Rules for clients that do unequal work, or pull in other directions: FedNova and SCAFFOLD.

Both papers have plain SGD at the clients. What changes with AdamW is said at each rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from unfed.aggregation.base import Weighting
from unfed.aggregation.fedavg import FedAvg
from unfed.aggregation.tree import RunningMean, delta, full_like, moved
from unfed.base.errors import AdapterError, ConfigError
from unfed.base.params import choice
from unfed.base.types import AdapterState, Broadcast, ClientUpdate, Combined, OptState, ServerState


@dataclass(frozen=True)
class FedNova(FedAvg):
    """Normalised averaging (Wang et al. 2020, "Tackling the Objective Inconsistency Problem in Heterogeneous Federated
    Optimization", arXiv 2007.07481, with ``a_k`` of plain SGD).

    With ``d_k`` the client's update, ``tau_k`` its optimizer steps and ``p_k`` its weight divided by the sum of all:
    ``w = w + tau_eff * sum_k p_k d_k / tau_k``, ``tau_eff = sum_k p_k tau_k``. So a client's part does not grow with
    its steps, and all together go as far as their mean number of steps. ``server_lr`` (ours) takes a multiple of that.
    Where all take equally many steps this is FedAvg.

    ``||a_k||_1`` is ``tau_k`` for SGD without momentum. With AdamW a step's length hardly depends on the gradient's, so
    dividing by the steps puts clients on a level in the same way, but the theory, whose updates are linear in the
    gradients, does not cover it. A learning rate that decays over a client's own steps decays alike for all of them
    and cancels.
    """

    def __post_init__(self) -> None:
        """``ConfigError`` beside filters and noise, which know one weight for every update's whole way."""
        super().__post_init__()
        _alone(self, "divides updates by their steps and lengthens the mean, after filters and noise were at work")

    @property
    def mean_step(self) -> float | None:
        """None: the multiple depends on the round's steps."""
        return None

    def weight_of(self, update: ClientUpdate) -> float:
        """``p_k / tau_k``, before the division by the sum. ``AdapterError``: the client does not say its steps."""
        return self.weight(update.num_examples) / _steps(update)

    def combine(self, updates: Iterable[ClientUpdate], num_clients: int, state: ServerState | None = None) -> Combined:
        """The normalised mean; ``state`` is needed. The aggregation error is of the mean weighted ``p_k / tau_k``."""
        work: list[tuple[float, float]] = []

        def counted() -> Iterator[ClientUpdate]:
            for update in updates:
                work.append((self.weight(update.num_examples), _steps(update)))
                yield update

        combined = super().combine(counted(), num_clients, state)
        stretch = stretch_of(work)
        if stretch == 1.0:
            return combined
        if state is None:
            raise AdapterError("FedNova needs what the round began with where clients take unequally many steps")
        step = delta(combined.adapter, state.adapter)
        return replace(combined, adapter=moved(state.adapter, step, stretch, combined.adapter))


def _alone(rule: FedAvg, why: str) -> None:
    if rule.filters or rule.noise is not None:
        raise ConfigError([f"aggregator={rule.name}: {why}; use another aggregator with a robust rule or privacy"])


def _steps(update: ClientUpdate) -> float:
    steps = update.metrics.get("steps", 0.0)
    if not steps >= 1:
        raise AdapterError(f"{update.client_id}: FedNova needs the number of its optimizer steps, not {steps:g}")
    return steps


def stretch_of(work: Sequence[tuple[float, float]]) -> float:
    """What the mean update under weights ``p_k / tau_k`` is multiplied by: ``tau_eff * sum_k p_k / tau_k``, at least 1.

    ``work``: weight (not divided by the sum) and steps of each client.
    """
    if len({steps for _, steps in work}) < 2:
        return 1.0
    total = sum(weight for weight, _ in work)
    return sum(w * tau for w, tau in work) / total * sum(w / tau for w, tau in work) / total


@dataclass(frozen=True)
class Scaffold(FedAvg):
    """SCAFFOLD (Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
    arXiv 1910.06378, Algorithm 1 with option II).

    Server: ``x = x + server_lr * mean(dy_k)``, ``c = c + |S|/N * mean(dc_k)`` over the round's clients S out of N.
    Client: every gradient gets ``c - c_k`` added, and ``c_k`` becomes option II's ``c_k - c + (x - y_k) / (K lr)``. For
    plain SGD that is the mean of the K steps' gradients before their correction, and it is computed as that mean.
    ``c_k`` stays at the client, its change travels; all start at 0, so that a first round is FedAvg's. ``server_lr`` is
    1 as in the paper, and weights are equal (``weighting=uniform``).

    Departures: with AdamW, clipping or weight decay ``x - y_k`` is no sum of gradients (AdamW's steps have the size of
    the learning rate, whatever the gradient's), and only a gradient can correct one; Adam then scales the corrected
    gradient, which the paper's theory does not cover. ``weighting=examples`` weights ``dy_k`` and ``dc_k`` alike; ``c``
    is then the weighted mean of all ``c_k`` where all clients take part. A learning rate that decays within a round
    weights the steps in ``x - y_k``, and not in the mean.
    """

    weighting: Weighting = choice("uniform", ("examples", "uniform"))

    def __post_init__(self) -> None:
        """``ConfigError`` beside filters and noise, which the control variates would go past."""
        super().__post_init__()
        _alone(self, "sends control variates beside the adapters, past filters and noise")

    @property
    def mean_step(self) -> float | None:
        """None: what the clients send depends on earlier rounds, through ``c``."""
        return None

    def init(self, adapter: AdapterState) -> OptState:
        """``c = 0``, in float32."""
        return {"c": full_like(adapter, 0.0)}

    def broadcast(self, state: ServerState, client_ids: Sequence[str]) -> Broadcast:
        """With ``c`` of the tensors that train."""
        sent = super().broadcast(state, client_ids)
        c = state.opt_state["c"] if "c" in state.opt_state else self.init(state.adapter)["c"]
        return replace(sent, control=c.without(sent.frozen))

    def combine(self, updates: Iterable[ClientUpdate], num_clients: int, state: ServerState | None = None) -> Combined:
        """The mean of the adapters, and of the changes of the control variates where clients send them."""
        changes = RunningMean()
        sent: list[str] = []

        def seen() -> Iterator[ClientUpdate]:
            for update in updates:
                if update.control is not None:
                    changes.add(update.control, self.weight(update.num_examples))
                    sent.append(update.client_id)
                yield update

        combined = super().combine(seen(), num_clients, state)
        return replace(combined, control=changes.result() if sent else None)

    def step(self, state: OptState, adapter: AdapterState, combined: Combined) -> tuple[OptState, AdapterState]:
        """Both of the paper's server updates. ``AdapterError``: no client sent its control variate's change."""
        if combined.control is None:
            raise AdapterError("Scaffold: no client sent the change of its control variate")
        _, after = super().step({}, adapter, combined)
        part = len(combined.client_ids)
        share = part / max(part, combined.population or 0)
        return {"c": moved(state["c"], combined.control, share, state["c"])}, after
