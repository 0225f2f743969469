"""Which updates of a round are usable: names, shapes, types, finite values, example counts, and lengths.

An update is looked at as it comes and passed on, so that one is in memory at a time; only the comparison of lengths
(``max_norm_ratio``) needs all of them at once.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from unfed.aggregation.adapters.base import Scaling
from unfed.aggregation.adapters.ranks import padded
from unfed.aggregation.geometry import Over, Space
from unfed.base.types import SERVER, AdapterState, Broadcast, ClientFailure, ClientUpdate

FEWEST = 3
"""Of two lengths the median is the mean, and says nothing about either."""


@dataclass(frozen=True)
class ScreeningSettings:
    """``max_norm_ratio``: a step may be that many times as long as the round's median, of what the factors do and of
    the factors themselves (``None``: any length). ``scaling``: alpha/r by module. ``owned``: how many examples each
    client has, where that is known."""

    max_norm_ratio: float | None = None
    scaling: Scaling = 1.0
    owned: Mapping[str, int] = field(default_factory=dict)


@dataclass
class Screening:
    """Lets the usable updates of one round through, with what did not travel filled in; remembers what was dropped and
    why, and what was sent. The server's own update (FLTrust) counts neither as sent nor among the lengths."""

    sent: Broadcast
    settings: ScreeningSettings = field(default_factory=ScreeningSettings)
    failures: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    spared_down: int = 0
    bytes_up: int = 0

    def usable(self, answers: Iterable[ClientUpdate | ClientFailure]) -> Iterator[ClientUpdate]:
        """The answers that can be averaged."""
        fitting = self._fitting(answers)
        if self.settings.max_norm_ratio is None:
            return fitting
        return self._of_ordinary_length(list(fitting), self.settings.max_norm_ratio)

    def _fitting(self, answers: Iterable[ClientUpdate | ClientFailure]) -> Iterator[ClientUpdate]:
        for answer in answers:
            if isinstance(answer, ClientFailure):
                self.failures[answer.client_id] = answer.reason
                continue
            if answer.client_id != SERVER:
                self.bytes_up += answer.sent
            down = self.sent.nbytes((answer.client_id,))
            if answer.nbytes_down is not None:
                self.spared_down += down - answer.nbytes_down
                down = answer.nbytes_down
            if problems := self._problems(answer):
                more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
                self._drop(answer.client_id, f"{problems[0]}{more}")
                continue
            traffic = {"bytes_down": down, "bytes_up": answer.sent}
            self.metrics[answer.client_id] = {**answer.metrics, **traffic}
            whole = answer.adapter.filled(self.sent.start(answer.client_id))
            if answer.client_id in self.sent.own:
                whole = padded(whole, self.sent.adapter)
            update = answer if whole is answer.adapter else replace(answer, adapter=whole)
            del answer, whole  # the next one is read only when this one may go
            yield update
            del update

    def _problems(self, update: ClientUpdate) -> list[str]:
        like = self.sent.returned(update.client_id)
        found = _unlike(update.adapter, like)
        if update.control is not None and self.sent.control is not None:
            found += [f"control variate: {p}" for p in _unlike(update.control, self.sent.control)]
        known = self.settings.owned.get(update.client_id)
        if update.num_examples < 1:
            found.append(f"num_examples is {update.num_examples}")
        elif known is not None and update.num_examples > known:
            found.append(f"num_examples is {update.num_examples}, and by the partition the client has {known}")
        return found

    def _of_ordinary_length(self, held: list[ClientUpdate], ratio: float) -> Iterator[ClientUpdate]:
        """Those whose steps are at most ``ratio`` times as long as the median; where that is 0, all of them."""
        clients = [u for u in held if u.client_id != SERVER]
        reasons: dict[str, str] = {}
        kinds: dict[Over, str] = {"factors": "its factors' step", "effective": "its step"}
        for over, what in kinds.items():
            lengths = {}
            for update in clients:
                start = padded(self.sent.start(update.client_id), self.sent.adapter)
                space = Space.of(start, self.settings.scaling, over)
                lengths[update.client_id] = space.norm(update.adapter)
            median = statistics.median(lengths.values()) if len(lengths) >= FEWEST else 0.0
            for client, length in lengths.items():
                if median > 0.0 and length > ratio * median:
                    times = f"{length / median:.4g} times the round's median of {median:.4g}"
                    reasons[client] = f"{what} is {length:.4g} long, {times} (robust.max_norm_ratio={ratio:g})"
        for update in held:
            if update.client_id in reasons:
                self._drop(update.client_id, reasons[update.client_id])
                self.metrics.pop(update.client_id, None)
            else:
                yield update

    def _drop(self, client_id: str, reason: str) -> None:
        self.failures[client_id] = f"update dropped: {reason}"


def _unlike(state: AdapterState, like: AdapterState) -> list[str]:
    """Names, dtypes, shapes and values. Dtypes first: not all of torch's can be summed up."""
    found = [
        f"{n} is {_name(t.dtype)}, not {_name(like[n].dtype)}"
        for n, t in state.items()
        if state.dtypes != like.dtypes and n in like and t.dtype != like[n].dtype
    ]
    return found or state.problems_against(like)


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
