"""Who of those that a round invited comes back in time: simulated speeds, dropouts, a deadline, over-sampling.

The time is simulated: a client's local steps divided by its speed. Clients that would not be in time are not trained.
What a client is given is drawn from (seed, client) and from (seed, round, client) alone, so a resumed run meets the
same stragglers.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from unfed.base.seeding import numpy_generator


@dataclass(frozen=True)
class Conditions:
    """What clients are like. ``speed``: local steps in a simulated second, one for all or by client (others: 1).

    Log-normal factors on it: ``spread`` is the standard deviation of the logarithm between clients, constant over
    the run, ``jitter`` that from round to round. ``dropout``: probability that a client goes silent in a round.
    ``deadline``: simulated seconds after which a round takes no more updates (``None``: it waits).
    """

    speed: float | Mapping[str, float] = 1.0
    spread: float = 0.0
    jitter: float = 0.0
    dropout: float = 0.0
    deadline: float | None = None

    def seconds(self, client: str, steps: float, seed: int, round_: int) -> float:
        """How long ``client`` takes for ``steps`` in round ``round_``."""
        speed = self.speed.get(client, 1.0) if isinstance(self.speed, Mapping) else self.speed
        log = self.spread * numpy_generator(seed, "speed", client).standard_normal() if self.spread else 0.0
        log += self.jitter * numpy_generator(seed, "speed", round_, client).standard_normal() if self.jitter else 0.0
        return steps / (speed * math.exp(log))

    def silent(self, client: str, seed: int, round_: int) -> bool:
        """Whether ``client`` drops out of round ``round_``."""
        return self.dropout > 0 and numpy_generator(seed, "goes silent", round_, client).random() < self.dropout


@dataclass(frozen=True)
class Turnout:
    """``trained``: those whose updates the round takes, in the order of the invitation. ``spare``: in time, but later
    than enough others, in the order of their return. ``missing``: why the others send nothing. ``seconds``: simulated,
    of all that come back; ``complete``: as many came as the round waits for."""

    trained: tuple[str, ...]
    spare: tuple[str, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    complete: bool = True

    def length(self, conditions: Conditions, used: Collection[str]) -> float | None:
        """Simulated seconds of the round: until the last update that was used, or the deadline where too few came.
        ``None`` where nothing is simulated."""
        if conditions == Conditions():
            return None
        last = max((self.seconds[c] for c in used if c in self.seconds), default=0.0)
        return last if self.complete else max(last, conditions.deadline or 0.0)


def turnout(
    invited: Sequence[str],
    steps: Mapping[str, float],
    enough: int,
    always: Sequence[str],
    conditions: Conditions,
    place: tuple[int, int],
) -> Turnout:
    """Who comes back. ``steps``: each client's local steps; ``enough``: how many updates the round waits for.

    ``always``: clients that are waited for whatever they take and never drop out (those that unlearn). ``place``: seed
    and round. Equal times are ordered by a draw.
    """
    seed, round_ = place
    missing: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for client in invited:
        taken = conditions.seconds(client, steps[client], seed, round_)
        if client in always:
            seconds[client] = taken
        elif conditions.silent(client, seed, round_):
            missing[client] = "dropped out (simulated)"
        elif conditions.deadline is not None and taken > conditions.deadline:
            missing[client] = (
                f"missed the deadline: it would take {taken:.3g} of {conditions.deadline:g} simulated seconds"
            )
        else:
            seconds[client] = taken
    draw = {c: numpy_generator(seed, "return", round_, c).random() for c in seconds}
    back = sorted(seconds, key=lambda c: (c not in always, seconds[c], draw[c]))
    count = max(enough, sum(c in always for c in back))
    first = set(back[:count])
    return Turnout(tuple(c for c in invited if c in first), tuple(back[count:]), missing, seconds, len(back) >= count)
